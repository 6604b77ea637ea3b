"""`fit`: what happens between the compiled chunks of steps."""

import contextlib
import dataclasses
import time
from typing import Any

import numpy as np

from .._boundary import MOST_STEPS, UNROLL, refuse_program
from .._data import Source, Stream, StreamExhaustedError
from .._devices import Decision, Peers, leaf_fingerprints
from .._policy import StopReason
from .._step import (
    AbstractTrainer,
    check_elementwise,
    require_all_data,
    require_optimiser,
    warn_of_line_search,
)
from .._storage import History, open_checkpointer, origin
from .feed import DataExhausted
from .options import FitKeywords, FitOptions
from .pace import Pace
from .progress_bar import ProgressBar
from .remarks import remark
from .run import FitRun
from .subject import AbstractSubject


def fit(
    subject: AbstractSubject,
    trainer: AbstractTrainer,
    data: Any,
    steps: int,
    keywords: FitKeywords,
) -> Any:
    """Implements `Trainer.fit`, for one trainer or for many at once."""
    validation = keywords.get("validation")
    if isinstance(data, int) and not isinstance(steps, int | np.integer):
        raise TypeError(f"`data` is {data}. Give the data first: `fit(data, {data})`.")
    refuse_program("fit", trainer, data, validation, remedy=UNROLL)
    run = None
    try:
        with contextlib.ExitStack() as stack:
            peers = stack.enter_context(Peers(subject.place.mesh, subject.entrance))
            # Within the context, so that other processes hear of an error.
            options = FitOptions(steps, **keywords)
            steps = options.steps
            _check_trainer(trainer, subject, steps)
            source = subject.source(data)
            require_all_data(trainer, source)
            monitor = subject.monitor(options.validation, options.stop)
            if peers.are_many:
                trees = {"trainer": trainer, "data": data, "validation": validation}
                trees = {name: leaf_fingerprints(tree) for name, tree in trees.items()}
                peers.require_same(options.described() | trees)
            checkpointer = None
            if options.checkpoint is not None:
                _check_resumable(source)
                scored = monitor.validation and monitor.validation.batch
                identity = monitor.fingerprint, origin(trainer, source, scored)
                checkpointer = stack.enter_context(
                    open_checkpointer(options.checkpoint, *identity, peers)
                )
            inputs = trainer, source, monitor
            run = FitRun(subject, inputs, options, peers, checkpointer)
            if peers.are_many:
                peers.require_same(run.described())
            try:
                shown = options.progress and peers.is_first
                with ProgressBar(steps, run.taken, shown=shown) as bar:
                    reason = _go_on(run, options, bar)
            finally:
                run.write_checkpoint()
    except KeyboardInterrupt:
        # A second one, while the last state was written.
        if run is None:
            raise
        reason = StopReason.INTERRUPTED
    except DataExhausted:
        if run is None:
            empty = History(np.zeros(0, int), np.zeros(0))
            result = subject.cut_short(trainer, empty, StopReason.DATA_EXHAUSTED)
            raise StreamExhaustedError(0, steps, result) from None
        # The last batch may be the one at which the fit has ended.
        reason = StopReason.DATA_EXHAUSTED
        if not run.stopped:
            result = run.cut_short(reason)
            raise StreamExhaustedError(run.taken, steps, result) from None
    except Exception as error:
        # What was reached is not lost with whatever went wrong.
        if run is not None and not run.is_whole:
            error.add_note("The fit up to here is lost: it was computed in place.")
        elif run is not None and not hasattr(error, "result"):
            with contextlib.suppress(AttributeError):
                error.result = run.cut_short(StopReason.ERROR)  # pyright: ignore
                if run.taken:
                    error.add_note("The fit up to here is `.result` of this error.")
        raise
    result = run.ended(reason)
    if not (lacking := remark(run, result)):
        return result
    # Only a result of many has such members.
    return dataclasses.replace(result, _without_data=tuple(sorted({*lacking})))


def _go_on(run: FitRun, options: FitOptions, bar: ProgressBar) -> StopReason:
    """Takes the remaining steps, and returns why the fit ended."""
    steps, chunk = options.steps, options.chunk
    if run.is_resumed and run.taken >= steps:
        return StopReason.TAKEN_BEFORE
    peers = run.peers
    # Several processes take chunks of the same size.
    pace = Pace(None if chunk or peers.are_many else run.kind())
    size = chunk or pace.first()
    try:
        while run.taken < steps and not run.stopped:
            before, started = run.taken, time.perf_counter()
            run.take(min(size, steps - run.taken))
            taken = run.taken - before
            if chunk is None and taken:
                size = pace.next(taken, time.perf_counter() - started)
            # All processes take part where what is shown lies on many devices.
            shown = run.shown() if peers.are_many else None
            bar.update(taken, lambda shown=shown: shown or run.shown())
            end = run.call(options.callback)
            due = run.checkpoint_is_due
            decision = peers.decide(Decision(size, end and end.name, due))
            size = decision.steps
            if decision.end is not None:
                return StopReason[decision.end]
            if decision.writes_checkpoint:
                run.write_checkpoint()
    except KeyboardInterrupt:
        peers.handles_interrupt = True
        return StopReason.INTERRUPTED
    return StopReason.STEPS_TAKEN


def _check_trainer(
    trainer: AbstractTrainer, subject: AbstractSubject, steps: int
) -> None:
    require_optimiser(trainer)
    check_elementwise(trainer, lambda: subject.template(trainer))
    warn_of_line_search(trainer)
    if subject.count(trainer) + steps > MOST_STEPS:
        raise ValueError(
            f"`steps` is {steps}, and a trainer counts to {MOST_STEPS} at most. Take "
            "fewer."
        )


def _check_resumable(source: Source) -> None:
    if isinstance(source, Stream) and not source.can_resume:
        raise TypeError(
            "`data` is a Stream of an iterable, which a fit that resumes cannot take "
            "up where it was. With `checkpoint`, give it a function of the step: "
            "`vn.Stream(lambda step: batches_from(step))`."
        )

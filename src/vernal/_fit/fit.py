"""`fit`: what happens between the compiled chunks of steps."""

import contextlib
import time
from typing import Any, TypedDict

import numpy as np

from .._boundary import UNROLL, boolean, refuse_program, takes, warn, whole_number
from .._data import Source, Stream, StreamExhaustedError
from .._devices import Decision, Peers, leaf_fingerprints
from .._policy import StopCriterion, StopReason
from .._step import MOST_STEPS, AbstractTrainer, check_elementwise, no_optimiser
from .._storage import Checkpoints, History, open_checkpointer, origin
from .._tree import Selector
from .feed import DataExhausted, next_chunk
from .progress_bar import ProgressBar
from .run import Callback, FitRun
from .subject import AbstractSubject


class FitOptions(TypedDict, total=False):
    """What a fit may be told beside its data and steps, see `Trainer.fit`."""

    record: Selector
    every: int
    validation: tuple[Any, int] | None
    stop: StopCriterion | None
    progress: bool
    callback: Callback | None
    chunk: int | None
    checkpoint: Checkpoints | None


OPTIONS = tuple(FitOptions.__annotations__)
"""Their names."""


def fit(
    trainer: AbstractTrainer,
    data: Any,
    steps: int,
    *,
    record: Any = (),
    every: int = 1,
    validation: Any = None,
    stop: Any = None,
    progress: bool = True,
    callback: Callback | None = None,
    chunk: int | None = None,
    checkpoint: Checkpoints | None = None,
    subject: AbstractSubject,
) -> Any:
    """Takes `steps` steps. The documentation is that of `Trainer.fit`.

    `subject` tells what is fitted: one trainer, or many at once.
    """
    refuse_program("fit", trainer, data, validation, remedy=UNROLL)
    progress = boolean(progress, "progress")
    run = None
    try:
        with contextlib.ExitStack() as stack:
            peers = stack.enter_context(Peers(subject.place.mesh, subject.entrance))
            steps = whole_number(steps, "steps", least=0)
            every = min(whole_number(every, "every", least=1), MOST_STEPS)
            chunk = None if chunk is None else whole_number(chunk, "chunk", least=1)
            _check(trainer, steps, callback, subject)
            source, monitor = subject.source(data), subject.monitor(validation, stop)
            if peers.are_many:
                numbers = {"steps": steps, "every": every, "chunk": chunk}
                presence = {"callback": callback, "checkpoint": checkpoint}
                trees = {"trainer": trainer, "data": data, "validation": validation}
                peers.require_same(
                    numbers
                    | {name: str(type(given)) for name, given in presence.items()}
                    | {name: leaf_fingerprints(tree) for name, tree in trees.items()}
                )
            checkpointer = None
            if checkpoint is not None:
                checkpoint = _checked(checkpoint, source)
                stop, made_of = monitor.fingerprint, origin(trainer, source)
                checkpointer = stack.enter_context(
                    open_checkpointer(checkpoint, stop, made_of, peers)
                )
            is_seen = checkpointer is not None or callback is not None
            options = record, every, checkpointer, is_seen
            run = FitRun(subject, peers, trainer, source, monitor, *options)
            if peers.are_many:
                peers.require_same(run.described())
            try:
                shown = progress and peers.is_first
                with ProgressBar(steps, run.taken, shown=shown) as bar:
                    reason = _go_on(run, steps, bar, callback, chunk)
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
        result = run.cut_short(StopReason.DATA_EXHAUSTED)
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
    if run.taken and (end := subject.bad_end(result)):
        diagnosis = run.diagnosis(end)
        end.raise_if_asked(result, diagnosis.advised)
        if str(diagnosis):
            warn(f"{end.warning} {diagnosis}")
    elif (scores := result.history.validation).size and not np.isfinite(scores).any():
        warn(
            "`validation`: no score was finite, so that `best` is no better than the "
            "model that the fit began with. Check the batch, and `evaluate`."
        )
    return result


def _go_on(
    run: FitRun,
    steps: int,
    bar: ProgressBar,
    callback: Callback | None,
    chunk: int | None,
) -> StopReason:
    """Takes the steps that are left, and tells why it ended."""
    if run.is_resumed and run.taken >= steps:
        return StopReason.TAKEN_BEFORE
    # The first step may be slow, and has to be compiled.
    size, peers = chunk or 1, run.peers
    try:
        while run.taken < steps and not run.stopped:
            before, started = run.taken, time.perf_counter()
            run.take(min(size, steps - run.taken))
            taken = run.taken - before
            if chunk is None and taken:
                size = next_chunk(taken, time.perf_counter() - started)
            # What is shown of many trainers on many devices, all must say.
            told = run.shown() if peers.are_many else None
            bar.update(taken, lambda told=told: told or run.shown())
            end = run.call(callback)
            own = Decision(size, end and end.name, run.checkpoint_is_due)
            decision = peers.decide(own)
            size = decision.steps
            if decision.end is not None:
                return StopReason[decision.end]
            if decision.writes_checkpoint:
                run.write_checkpoint()
    except KeyboardInterrupt:
        peers.handles_interrupt = True
        return StopReason.INTERRUPTED
    return StopReason.STEPS_TAKEN


def _check(
    trainer: AbstractTrainer, steps: int, callback: Any, subject: AbstractSubject
) -> None:
    if callback is not None and not callable(callback):
        raise TypeError(
            f"`callback` is {callback!r}, but must be a function `(trainer, history)` "
            "that returns `None`, `True` to end the fit, or a trainer to go on with."
        )
    if callback is not None:
        takes(callback, 2, "callback", "callback(trainer, history)")
    if trainer.optimiser is None:
        raise no_optimiser(trainer)
    check_elementwise(subject.template(trainer))
    if subject.count(trainer) + steps > MOST_STEPS:
        raise ValueError(
            f"`steps` is {steps}, and a trainer counts to {MOST_STEPS} at most. Take "
            "fewer."
        )


def _checked(checkpoint: Any, source: Source) -> Checkpoints:
    if not isinstance(checkpoint, Checkpoints):
        raise TypeError(
            f"`checkpoint` is {checkpoint!r}, but must be `vn.Checkpoints(directory)`."
        )
    if isinstance(source, Stream) and not source.can_resume:
        raise TypeError(
            "`data` is a Stream of an iterable, which a fit that resumes cannot take "
            "up where it was. With `checkpoint`, give it a function of the step: "
            "`vn.Stream(lambda step: batches_from(step))`."
        )
    return checkpoint

"""`fit`: what happens between the compiled chunks of steps."""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

from ._alike import require_alike
from ._bar import Bar
from ._checkpoint import Checkpoints
from ._data import Source, Stream, StreamExhaustedError
from ._feed import Dry, Feed, Pace
from ._history import History, concatenate
from ._keeper import Keeper
from ._monitor import Monitor, MonitorState
from ._one import One
from ._peers import Peers, Wish, described
from ._record import MOST_ROWS, Record
from ._recorder import Recorder
from ._setup import no_optimiser
from ._step import MOST_STEPS, advance
from ._stop import StopReason
from ._typing import whole_number

ONE = One()

Callback = Callable[[Any, History], Any]


def fit(
    trainer: Any,
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
    kind: One = ONE,
) -> Any:
    """Takes `steps` steps. The documentation is that of `Trainer.fit`.

    `kind` tells what is fitted: one trainer, or many at once.
    """
    steps = whole_number(steps, "steps", least=0)
    every = min(whole_number(every, "every", least=1), MOST_STEPS)
    chunk = None if chunk is None else whole_number(chunk, "chunk", least=1)
    if callback is not None and not callable(callback):
        raise TypeError(
            f"`callback` is {callback!r}, but must be a function `(trainer, history)` "
            "that returns `None`, `True` to end the fit, or a trainer to go on with."
        )
    if trainer.optimiser is None:
        raise no_optimiser(trainer)
    if isinstance(trainer.step_count, Tracer):
        raise TypeError(
            "`fit` runs compiled programs from the host, and cannot be a part of one. "
            "Within `jax.jit`, `jax.vmap` or `jax.grad`, use `vn.unroll`."
        )
    if kind.count(trainer) + steps > MOST_STEPS:
        raise ValueError(
            f"`steps` is {steps}, and a trainer counts to {MOST_STEPS} at most. Take "
            "fewer."
        )
    source, monitor = kind.source(data), kind.monitor(validation, stop)
    run = None
    try:
        with contextlib.ExitStack() as stack:
            peers = stack.enter_context(Peers(kind.place and kind.place.mesh))
            keeper = None
            if checkpoint is not None:
                checkpoint = _checked(checkpoint, source)
                keeper = Keeper(checkpoint, monitor.fingerprint, peers)
                stack.enter_context(keeper)
            run = _Fit(kind, peers, trainer, source, monitor, record, every, keeper)
            if peers.are_many:
                given = {"steps": steps, "every": every, "chunk": chunk}
                trees = {"trainer": trainer, "data": data, "validation": validation}
                told = {name: described(tree) for name, tree in trees.items()}
                peers.require_same(given | told | run.described())
            try:
                shown = progress and peers.is_first
                with Bar(steps, run.taken, shown=shown) as bar:
                    reason = _go_on(run, steps, bar, callback, chunk)
            finally:
                run.keep()
    except KeyboardInterrupt:
        # A second one, while the last state was written.
        if run is None:
            raise
        reason = StopReason.INTERRUPTED
    except Dry:
        if run is None:
            empty = History(np.zeros(0, int), np.zeros(0))
            result = kind.cut_short(trainer, empty, StopReason.DATA_EXHAUSTED)
            raise StreamExhaustedError(0, steps, result) from None
        result = run.cut_short(StopReason.DATA_EXHAUSTED)
        raise StreamExhaustedError(run.taken, steps, result) from None
    except Exception as error:
        # What was reached is not lost with whatever went wrong.
        if run is not None and not hasattr(error, "result"):
            with contextlib.suppress(AttributeError):
                error.result = run.cut_short(StopReason.ERROR)  # pyright: ignore
                error.add_note("The fit up to here is `.result` of this error.")
        raise
    result = kind.ended(run.trainer, run.history(), monitor, run.watched, reason)
    if run.taken:
        kind.raise_if_non_finite(result)
    return result


def _go_on(
    run: "_Fit", steps: int, bar: Bar, callback: Callback | None, chunk: int | None
) -> StopReason:
    """Takes the steps that are left, and tells why it ended."""
    if run.is_resumed and run.taken >= steps:
        return StopReason.TAKEN_BEFORE
    pace, peers = Pace(chunk), run.peers
    try:
        while run.taken < steps and not run.stopped:
            before, started = run.taken, time.perf_counter()
            run.take(min(pace.count, steps - run.taken))
            pace.measured(run.taken - before, time.perf_counter() - started)
            bar.update(run.taken - before, run.shown)
            end, _ = peers.together(lambda: run.call(callback), lambda end: None)
            own = Wish(pace.count, end and end.name, run.is_to_be_kept)
            wish = peers.agree(own)
            pace.count = wish.steps
            if wish.end is not None:
                return StopReason[wish.end]
            if wish.keeps:
                run.keep()
    except KeyboardInterrupt:
        return StopReason.INTERRUPTED
    return StopReason.STEPS_TAKEN


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


def _is_boolean(answer: Any) -> bool:
    # The outcome of a comparison is a boolean of NumPy or of JAX, as often as not.
    is_one = isinstance(answer, bool | np.bool_ | jax.Array)
    return is_one and np.shape(answer) == () and np.asarray(answer).dtype == bool


class _Reached(NamedTuple):
    """How far the chunks have come."""

    trainer: Any
    watched: MonitorState | None
    chunks: int


class _Fit:
    """A fit on its way: the trainer as it is now, and what was recorded so far."""

    def __init__(
        self,
        kind: One,
        peers: Peers,
        trainer: Any,
        source: Source,
        monitor: Monitor,
        record: Any,
        every: int,
        keeper: Keeper | None,
    ):
        self._kind, self._keeper, self.peers = kind, keeper, peers
        self._recorder = Recorder(self._no_history)
        self.monitor, self.watched = monitor, kind.watched(monitor, trainer)
        trainer = kind.placed(trainer)
        self.is_resumed, first = False, kind.count(trainer)
        if keeper is not None:
            trainer, self.watched, history = keeper.restore(
                trainer, first, self.watched
            )
            self.is_resumed = history is not None
            if history is not None:
                self._recorder.extend(history)
                trainer = kind.placed(trainer)
                self.watched = kind.placed_state(self.watched)
        self.trainer: Any = trainer
        self.feed = Feed(source, kind.count(trainer), kind.prepare, peers)
        self.record = Record(kind.template(trainer), record, self._peek)
        self.every = every
        self.taken = kind.count(trainer) - first
        self.stopped = kind.is_over(trainer, self.watched)
        if keeper is not None:
            keeper.begin(self._no_history())

    def _peek(self) -> Any:
        return self._kind.row(self.feed.peek())

    def shown(self) -> dict[str, str]:
        """What is shown of the fit on its way."""
        return self._kind.shown(self.trainer, self.history())

    def take(self, count: int) -> None:
        """Takes `count` steps, unless the fit stops."""
        goal = self.taken + count
        try:
            while self.taken < goal and not self.stopped:
                self._take(goal - self.taken)
        except jax.errors.JaxRuntimeError:
            # Devices of another process no longer answer, as likely as not.
            self.peers.are_lost = self.peers.are_many
            raise

    def _take(self, count: int) -> None:
        reached, pending = _Reached(self.trainer, self.watched, 0), []
        kind, start = self._kind, self._kind.count(self.trainer)
        now = start
        every = kind.number(self.every)
        most_rows = 1 if self.feed.is_stream else MOST_ROWS
        try:
            for source, steps in self.feed.sources(count):
                now += steps
                chunk = kind.run(
                    reached.trainer,
                    source,
                    self.monitor,
                    reached.watched,
                    kind.number(now),
                    every,
                    self.record,
                    most_rows,
                )
                # Not the chunk itself: of a stream's every step it would keep the
                # parameters.
                pending.append((chunk.progress.step_count, chunk.rows, chunk.scores))
                before = reached
                trainer = before.trainer._at(chunk.progress)
                reached = _Reached(trainer, chunk.watched, len(pending))
                # The step before the last is done by now: to ask it costs no waiting,
                # and a loader is not read much further than it is of use.
                if kind.is_over(before.trainer, before.watched):
                    break
        finally:
            # Also where a stream ran dry: what was computed is kept.
            kept = [kind.recorded(*entry) for entry in pending[: reached.chunks]]
            stopped = kind.is_over(reached.trainer, reached.watched)
            taken = self.taken + kind.count(reached.trainer) - start
            self.trainer, self.watched, self.taken, self.stopped = (
                reached.trainer,
                reached.watched,
                taken,
                stopped,
            )
            if kept:
                self._recorder.extend(concatenate(kept))

    def call(self, callback: Callback | None) -> StopReason | None:
        """Calls the callback, if there is one, and tells why to end, if at all."""
        if callback is not None:
            answer = callback(self.trainer, self.history())
            if _is_boolean(answer) and answer:
                return StopReason.CALLBACK
            self._go_on_with(answer)
        if self._keeper is not None and self._keeper.asked_to_end:
            return StopReason.TERMINATED
        return StopReason.INTERRUPTED if self.peers.is_interrupted else None

    def _go_on_with(self, answer: Any) -> None:
        if answer is None or _is_boolean(answer):
            return
        if type(answer) is not type(self.trainer):
            raise TypeError(
                f"`callback` returned an object of type `{type(answer).__name__}`. It "
                "may return `None`, `True` to end the fit, or a trainer to go on with."
            )
        what = "the trainer that `callback` returned"
        require_alike(answer, self.trainer, what, "the one it was given")
        if answer._progress.params is not self.trainer._progress.params:
            # What was seen of other parameters says nothing of these.
            self.watched = self._kind.watched(self.monitor, answer)
        self.trainer = self._kind.placed(answer)
        self.stopped = self._kind.is_over(answer, self.watched)

    @property
    def is_to_be_kept(self) -> bool:
        """Whether a checkpoint is due."""
        step = self._kind.count(self.trainer)
        return self._keeper is not None and self._keeper.is_due(step)

    def keep(self) -> None:
        """Writes a checkpoint, if any are wanted, and all can do so."""
        if self._keeper is not None and not self.peers.are_lost:
            step = self._kind.count(self.trainer)
            self._keeper.write(step, self.trainer, self.watched, self.history())

    def described(self) -> dict[str, str]:
        """Describes what is fitted, as to find out whether another process does so."""
        template, kind = self._kind.template(self.trainer), type(self.trainer)
        batch = self._peek()
        program = eqx.filter_make_jaxpr(lambda t, b: advance(t, b)[0])(template, batch)
        # Where an object lies says nothing of what it is.
        text = re.sub(r" at 0x[0-9a-f]+", "", f"{program[0]} {self.record}")
        return {
            "class": kind.__qualname__,
            "stop": self.monitor.fingerprint,
            "record": self.record.names,
            "program": hashlib.sha256(text.encode()).hexdigest(),
        }

    def _no_history(self) -> History:
        template, shape = self._kind.template(self.trainer), (0, *self._kind.shape)
        shapes = self.record.shapes(template, self._peek)
        loss = np.zeros(shape, self.trainer.best_loss.dtype)
        rows = {k: np.zeros((*shape, *v.shape), v.dtype) for k, v in shapes.items()}
        return History(np.zeros(0, int), loss, rows)

    def history(self) -> History:
        return self._recorder.history

    def cut_short(self, reason: StopReason) -> Any:
        return self._kind.cut_short(self.trainer, self.history(), reason)

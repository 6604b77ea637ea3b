"""`fit`: what happens between the compiled chunks of steps."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._alike import require_alike
from ._bar import Bar
from ._checkpoint import Checkpoints
from ._compiled import Chunk, run_chunk
from ._data import (
    Minibatches,
    Source,
    Stream,
    StreamExhaustedError,
    Whole,
    as_batch,
    as_source,
)
from ._history import History, concatenate
from ._keeper import Keeper
from ._monitor import Monitor, MonitorState
from ._record import MOST_ROWS, Record
from ._result import FitResult
from ._step import MOST_STEPS
from ._stop import StopReason
from ._typing import whole_number

# How long a chunk should take: short enough for a progress bar and for Ctrl-C, long
# enough that what happens between two of them costs nothing.
_CHUNK_SECONDS = 0.5
_FASTEST_GROWTH = 100

Callback = Callable[[Any, History], Any]


def fit(
    trainer: Any,
    data: Any,
    steps: int,
    *,
    record: Any,
    every: int,
    validation: Any,
    stop: Any,
    progress: bool,
    callback: Callback | None,
    chunk: int | None,
    checkpoint: Checkpoints | None,
) -> FitResult[Any, Any]:
    """Takes `steps` steps. The documentation is that of `Trainer.fit`."""
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
    source, monitor = as_source(data), Monitor(validation, stop)
    with contextlib.ExitStack() as stack:
        keeper = None
        if checkpoint is not None:
            keeper = stack.enter_context(Keeper(_checked(checkpoint, source)))
        try:
            run = _Fit(trainer, source, monitor, record, every, keeper)
        except _Dry:
            raise _exhausted(trainer, None, steps) from None
        try:
            with Bar(steps, run.taken, shown=progress) as bar:
                reason = _go_on(run, steps, bar, callback, chunk)
        except _Dry:
            raise _exhausted(trainer, run, steps) from None
        except Exception as error:
            # What was reached is not lost with whatever went wrong.
            with contextlib.suppress(AttributeError):
                error.result = run.result(StopReason.ERROR)  # pyright: ignore
                error.add_note("The fit up to here is `.result` of this error.")
            raise
        finally:
            run.keep()
    if run.trainer.stopped:
        is_bad = run.trainer._is_at_a_bad_step()
        reason = StopReason.NON_FINITE if is_bad else StopReason.POLICY
    elif (met := monitor.reason(run.watched)) is not None:
        reason = met
    result = run.result(reason)
    if run.taken:
        run.trainer._raise_if_non_finite(result)
    return result


def _go_on(
    run: "_Fit", steps: int, bar: Bar, callback: Callback | None, chunk: int | None
) -> StopReason:
    """Takes the steps that are left, and tells why it ended."""
    if run.is_resumed and run.taken >= steps:
        return StopReason.TAKEN_BEFORE
    pace = _Pace(chunk)
    try:
        while run.taken < steps and not run.stopped:
            before, started = run.taken, time.perf_counter()
            run.take(min(pace.count, steps - run.taken))
            pace.measured(run.taken - before, time.perf_counter() - started)
            bar.update(run.taken - before, run.trainer, run.last_losses)
            if callback is not None:
                answer = callback(run.trainer, run.history())
                if _is_boolean(answer) and answer:
                    return StopReason.CALLBACK
                run.go_on_with(answer)
            if run.is_asked_to_end:
                return StopReason.TERMINATED
            run.keep_if_due()
    except KeyboardInterrupt:
        return StopReason.INTERRUPTED
    return StopReason.STEPS_TAKEN


def _exhausted(trainer: Any, run: "_Fit | None", steps: int) -> StreamExhaustedError:
    reason = StopReason.DATA_EXHAUSTED
    if run is None:
        empty = History(np.zeros(0, int), np.zeros(0))
        return StreamExhaustedError(0, steps, FitResult(trainer, empty, reason))
    return StreamExhaustedError(run.taken, steps, run.result(reason))


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


def no_optimiser(trainer: Any) -> ValueError:
    """Says what to do about a trainer that cannot take a step."""
    return ValueError(
        f"`{type(trainer).__name__}` has no optimiser. Give it one: "
        "`Trainer(model, optax.adam(1e-2))` or `trainer.replace(optimiser=...)`."
    )


def _is_boolean(answer: Any) -> bool:
    # The outcome of a comparison is a boolean of NumPy or of JAX, as often as not.
    is_one = isinstance(answer, bool | np.bool_ | jax.Array)
    return is_one and np.shape(answer) == () and np.asarray(answer).dtype == bool


class _Dry(Exception):
    """A stream has no further batch."""


class _Feed:
    """What a fit is fed with: one source for a whole chunk, or one for each step."""

    def __init__(self, trainer: Any, source: Source):
        self.source = source
        self._ahead: list[Any] = []
        if isinstance(source, Stream):
            self._iterator = source.open(int(trainer.step_count))

    @property
    def is_stream(self) -> bool:
        return isinstance(self.source, Stream)

    def _read(self) -> Any:
        if self._ahead:
            return self._ahead.pop()
        try:
            return as_batch(next(self._iterator))
        except StopIteration:
            raise _Dry from None

    def peek(self) -> Any:
        """Returns a batch, or its shapes, without using it up."""
        source = self.source
        if not isinstance(source, Stream):
            zero = jnp.asarray(np.int32(0))
            return eqx.filter_eval_shape(source.next, source.start(zero), zero)[0]
        if not self._ahead:
            self._ahead.append(self._read())
        return self._ahead[-1]

    def sources(self, count: int) -> Iterator[tuple[Whole[Any] | Minibatches, int]]:
        """Yields sources, and the number of steps to take from each."""
        if not isinstance(self.source, Stream):
            yield self.source, count
            return
        for _ in range(count):
            yield Whole(self._read()), 1


class _Fit:
    """A fit on its way: the trainer as it is now, and what was recorded so far."""

    def __init__(
        self,
        trainer: Any,
        source: Source,
        monitor: Monitor,
        record: Any,
        every: int,
        keeper: Keeper | None,
    ):
        self._keeper, self._histories, first = keeper, [], int(trainer.step_count)
        self.monitor, self.watched = monitor, monitor.init(trainer)
        self.is_resumed = False
        if keeper is not None:
            trainer, self.watched, history = keeper.restore(
                trainer, self.watched, repr(monitor.stop)
            )
            self.is_resumed = history is not None
            self._histories = [] if history is None else [history]
        self.trainer: Any = trainer
        self.feed = _Feed(trainer, source)
        self.record = Record(trainer, record, self.feed.peek)
        self.every = every
        self.taken = int(trainer.step_count) - first
        self.stopped = self._is_over(trainer, self.watched)
        if keeper is not None:
            keeper.begin(self._no_history())

    @staticmethod
    def _is_over(trainer: Any, watched: MonitorState | None) -> bool:
        return bool(trainer.stopped) or (watched is not None and bool(watched.is_over))

    @property
    def last_losses(self) -> dict[str, float]:
        """The newest loss and the newest score of a validation, as far as there are."""
        columns = {
            "loss": [history.loss for history in self._histories],
            "validation": [history.validation for history in self._histories],
        }
        return {
            name: float(parts[-1][-1])
            for name, column in columns.items()
            if (parts := [part for part in column if len(part)])
        }

    def take(self, count: int) -> None:
        """Takes `count` steps, unless the fit stops."""
        goal = self.taken + count
        while self.taken < goal and not self.stopped:
            self._take(goal - self.taken)

    def _take(self, count: int) -> None:
        trainer, watched, pending = self.trainer, self.watched, []
        start = now = int(trainer.step_count)
        every = jnp.asarray(np.int32(self.every))
        most_rows = 1 if self.feed.is_stream else MOST_ROWS
        try:
            for source, steps in self.feed.sources(count):
                now += steps
                chunk = run_chunk(
                    trainer,
                    source,
                    self.monitor,
                    watched,
                    jnp.asarray(np.int32(now)),
                    every,
                    self.record,
                    most_rows,
                )
                pending.append(chunk)
                # The step before the last is done by now: to ask it costs no waiting,
                # and a loader is not read much further than it is of use.
                was_stopped = self._is_over(trainer, watched)
                trainer, watched = trainer._at(chunk.progress), chunk.watched
                if was_stopped:
                    break
        finally:
            # Also where a stream ran dry: what was computed is kept.
            kept = [self._recorded(chunk) for chunk in pending]
            taken = self.taken + int(trainer.step_count) - start
            stopped = self._is_over(trainer, watched)
            self.trainer, self.watched, self.taken, self.stopped, self._histories = (
                trainer,
                watched,
                taken,
                stopped,
                self._histories + kept,
            )

    @staticmethod
    def _recorded(chunk: Chunk) -> History:
        end = int(chunk.progress.step_count)
        steps, loss, records = chunk.rows.columns(end)
        if chunk.scores is None:
            return History(steps, loss, records)
        scored, scores, _ = chunk.scores.columns(end + 1)
        return History(steps, loss, records, scores, scored)

    def go_on_with(self, answer: Any) -> None:
        """Takes what a callback returned."""
        if answer is None or _is_boolean(answer):
            return
        if type(answer) is not type(self.trainer):
            raise TypeError(
                f"`callback` returned {answer!r}. It may return `None`, `True` to end "
                "the fit, or a trainer to go on with."
            )
        what = "the trainer that `callback` returned"
        require_alike(answer, self.trainer, what, "the one it was given")
        self.trainer = answer
        self.stopped = self._is_over(answer, self.watched)

    @property
    def is_asked_to_end(self) -> bool:
        return self._keeper is not None and self._keeper.asked_to_end

    def keep(self) -> None:
        """Writes a checkpoint, if any are wanted."""
        if self._keeper is not None:
            self._keeper.write(self.trainer, self.watched, self.history())

    def keep_if_due(self) -> None:
        if self._keeper is not None and self._keeper.is_due(
            int(self.trainer.step_count)
        ):
            self.keep()

    def _no_history(self) -> History:
        shapes = self.record.shapes(self.trainer, self.feed.peek)
        loss = np.zeros(0, self.trainer.best_loss.dtype)
        rows = {k: np.zeros((0, *v.shape), v.dtype) for k, v in shapes.items()}
        return History(np.zeros(0, int), loss, rows)

    def history(self) -> History:
        if not self._histories:
            self._histories = [self._no_history()]
        self._histories = [concatenate(self._histories)]
        return self._histories[0]

    def result(self, reason: StopReason) -> FitResult[Any, Any]:
        return FitResult(self.trainer, self.history(), reason)


class _Pace:
    """How many steps to take at once."""

    def __init__(self, chunk: int | None):
        self._fixed = chunk is not None
        # One step to begin with: it may be a slow one, and it has to be compiled.
        self.count = chunk or 1

    def measured(self, count: int, seconds: float) -> None:
        """Learns from a chunk how many steps the next should have."""
        if not self._fixed and count > 0:
            growth = _CHUNK_SECONDS / max(seconds, 1e-6)
            self.count = max(1, int(count * min(growth, _FASTEST_GROWTH)))

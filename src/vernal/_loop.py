"""`fit`: compiled chunks of steps, and what happens between two of them."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ._data import (
    Minibatches,
    Source,
    Stream,
    StreamExhaustedError,
    Whole,
    as_batch,
    as_source,
    whole_number,
)
from ._history import History, concatenate
from ._nonfinite import NonFiniteError
from ._record import GRAD_NORM, Record, Rows
from ._result import FitResult, StopReason
from ._step import Progress, advance

# How long a chunk should take: short enough for a progress bar and for Ctrl-C, long
# enough that what happens between two of them costs nothing.
_CHUNK_SECONDS = 0.5
_FASTEST_GROWTH = 100

Callback = Callable[[Any, History], Any]


@eqx.filter_jit
def _run_chunk(
    trainer: Any,
    source: Whole[Any] | Minibatches,
    count: Int[Array, ""],
    every: Int[Array, ""],
    record: Record,
) -> tuple[Progress, Rows]:
    """Takes `count` steps, or fewer if the fit stops or the rows are full."""
    progress = trainer._progress
    last = progress.step_count + count

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        progress, cursor, rows = carry
        step = progress.step_count
        batch, cursor = source.next(cursor, step)
        new, outcome = advance(trainer._at(progress), batch)
        values = record.values(progress.params, outcome)
        return new, cursor, rows.add(outcome.loss, values, step % every == 0)

    def goes_on(carry: tuple[Any, ...]) -> Array:
        progress, _, rows = carry
        return (progress.step_count < last) & ~progress.stopped & ~rows.full

    cursor = source.start(progress.step_count)
    batch, _ = jax.eval_shape(source.next, cursor, progress.step_count)
    rows = Rows.empty(progress.best_loss, record.shapes(trainer, batch))
    progress, _, rows = lax.while_loop(goes_on, body, (progress, cursor, rows))
    return progress, rows


def fit(
    trainer: Any,
    data: Any,
    steps: int,
    *,
    record: Any,
    every: int,
    progress: bool,
    callback: Callback | None,
    chunk: int | None,
) -> FitResult[Any, Any]:
    """Takes `steps` steps. The documentation is that of `Trainer.fit`."""
    steps = whole_number(steps, "steps", least=0)
    every = whole_number(every, "every", least=1)
    chunk = None if chunk is None else whole_number(chunk, "chunk", least=1)
    if callback is not None and not callable(callback):
        raise TypeError(
            f"`callback` is {callback!r}, but must be a function "
            "`(trainer, history) -> None`, `True` to end the fit, or a trainer."
        )
    if trainer.optimiser is None:
        raise no_optimiser(trainer)
    feed = _Feed(trainer, as_source(data), steps)
    plan = Record(trainer, record, feed.peek)
    run = _Fit(trainer, steps, plan, every)
    reason = StopReason.STEPS_TAKEN
    with _Bar(steps, shown=progress) as bar:
        pace = _Pace(chunk)
        try:
            while not (run.done or run.stopped):
                count = min(pace.count, steps - run.taken)
                started = time.perf_counter()
                run.take(feed.sources(count))
                pace.measured(run.last_count, time.perf_counter() - started)
                bar.update(run)
                if callback is not None:
                    answer = callback(run.trainer, run.history())
                    if answer is True:
                        reason = StopReason.CALLBACK
                        break
                    run.go_on_with(answer)
        except KeyboardInterrupt:
            reason = StopReason.INTERRUPTED
        except _Dry:
            raise StreamExhaustedError(run.taken, steps, run.result(reason)) from None
    if run.stopped:
        reason = StopReason.NON_FINITE
    result = run.result(reason)
    if run.stopped and trainer.nan_policy.raises:
        last = int(run.trainer.step_count) - 1
        raise NonFiniteError(last, run.trainer.nan_report(), result)
    return result


def no_optimiser(trainer: Any) -> ValueError:
    """Says what to do about a trainer that cannot take a step."""
    return ValueError(
        f"`{type(trainer).__name__}` has no optimiser. Give it one: "
        "`Trainer(model, optax.adam(1e-2))` or `trainer.replace(optimiser=...)`."
    )


class _Dry(Exception):
    """A stream has no further batch."""


class _Feed:
    """The sources of the chunks: one for a whole chunk, or one for each step."""

    def __init__(self, trainer: Any, source: Source, steps: int):
        self.source = source
        self.ahead: list[Any] = []
        if isinstance(source, Stream) and steps > 0:
            self.iterator = source.open(int(trainer.step_count))

    def _read(self) -> Any:
        if self.ahead:
            return self.ahead.pop()
        try:
            return as_batch(next(self.iterator))
        except StopIteration:
            raise _Dry from None

    def peek(self) -> Any:
        """Returns a batch to look at, without using it up."""
        if isinstance(self.source, Stream):
            self.ahead.append(self._read())
            return self.ahead[-1]
        return jax.eval_shape(
            lambda s: s.next(s.start(0), jnp.array(0))[0], self.source
        )

    def sources(self, count: int) -> Iterator[tuple[Whole[Any] | Minibatches, int]]:
        """Yields sources, and the number of steps to take from each."""
        if not isinstance(self.source, Stream):
            yield self.source, count
            return
        for _ in range(count):
            yield Whole(self._read()), 1


class _Fit:
    """A fit on its way: the trainer as it is now, and what was recorded so far."""

    def __init__(self, trainer: Any, steps: int, record: Record, every: int):
        self.trainer = trainer
        self.record = record
        self.every, self._every = every, jnp.asarray(every, jnp.int32)
        self.start = int(trainer.step_count)
        self.steps = steps
        self.taken = 0
        self.last_count = 0
        self.stopped = bool(trainer._progress.stopped)
        self._histories: list[History] = []

    @property
    def done(self) -> bool:
        return self.taken >= self.steps

    def take(self, sources: Iterator[tuple[Any, int]]) -> None:
        trainer, pending = self.trainer, []
        try:
            for source, count in sources:
                count = jnp.asarray(count, jnp.int32)
                progress, rows = _run_chunk(
                    trainer, source, count, self._every, self.record
                )
                pending.append((trainer.step_count, rows))
                trainer = trainer._at(progress)
        finally:
            # Also where the stream ran dry: what was computed is kept.
            histories = [
                rows.to_history(int(start), self.every) for start, rows in pending
            ]
            taken = int(trainer.step_count) - self.start
            self.last_count = taken - self.taken
            self.trainer, self.taken = trainer, taken
            self.stopped = bool(trainer._progress.stopped)
            self._histories += histories

    def go_on_with(self, answer: Any) -> None:
        if answer is None or answer is False:
            return
        if type(answer) is not type(self.trainer):
            raise TypeError(
                f"`callback` returned {type(answer).__name__!r}. It may return `None`, "
                "`True` to end the fit, or a trainer to go on with."
            )
        if jax.tree.structure(answer) != jax.tree.structure(self.trainer):
            raise ValueError(
                "`callback` returned a trainer of another structure. Change its "
                "values alone (rates, scales, parameters): another optimiser or "
                "model needs a fit of its own."
            )
        self.trainer = answer
        self.start = int(answer.step_count) - self.taken
        self.stopped = bool(answer._progress.stopped)

    def history(self) -> History:
        if not self._histories:
            return _empty_history(self.record)
        self._histories = [concatenate(self._histories)]
        return self._histories[0]

    def result(self, reason: StopReason) -> FitResult[Any, Any]:
        return FitResult(self.trainer, self.history(), reason)


def _empty_history(record: Record) -> History:
    names = [*record.paths, *record.metrics]
    names += [GRAD_NORM] if record.grad_norm else []
    none = np.zeros(0)
    return History(none.astype(int), none, dict.fromkeys(names, none))


class _Pace:
    """How many steps to take at once."""

    def __init__(self, chunk: int | None):
        self.fixed = chunk is not None
        # One step to begin with: it may be a slow one, and it has to be compiled.
        self.count = chunk or 1

    def measured(self, count: int, seconds: float) -> None:
        if self.fixed or count == 0:
            return
        growth = _CHUNK_SECONDS / max(seconds, 1e-6)
        self.count = max(1, int(count * min(growth, _FASTEST_GROWTH)))


class _Bar:
    """A progress bar, which says that it compiles until the first step is taken."""

    def __init__(self, steps: int, *, shown: bool):
        self.bar = None
        if shown and steps > 0:
            from tqdm.auto import tqdm

            # `None`: no bar where nobody looks, as in the log file of a batch job.
            bar = tqdm(total=steps, desc="compiling", disable=None, leave=True)
            self.bar = None if bar.disable else bar

    def __enter__(self) -> "_Bar":
        if self.bar is not None:
            self.bar.refresh()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, run: _Fit) -> None:
        if self.bar is None:
            return
        if self.bar.desc.startswith("compiling"):
            self.bar.set_description("fitting", refresh=False)
        shown = {"best": f"{float(run.trainer.best_loss):.6g}"}
        if run._histories and len(run._histories[-1]):
            shown = {"loss": f"{run._histories[-1].loss[-1]:.6g}", **shown}
        bad = max((c.total for c in run.trainer.nan_report().values()), default=0)
        if bad:
            shown["bad"] = str(bad)
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(run.last_count)

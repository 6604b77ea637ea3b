"""What a fit asks of what it fits: here, one trainer."""

import contextlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from .._data import Minibatches, Source, Whole, as_batch, as_source
from .._devices import ANYWHERE, AbstractPlacement
from .._loop import (
    Chunk,
    Ended,
    LoopState,
    Monitor,
    MonitorState,
    Rows,
    Task,
    run_chunk,
    run_chunk_in_place,
)
from .._policy import AT_NON_FINITE, StopReason
from .._step import (
    AbstractTrainer,
    is_at_bad_step,
    nan_report,
    progress_of,
    raise_if_non_finite,
    with_progress,
)
from .._storage import History
from .arrival import checked_end
from .result import FitResult


class BadEnd(NamedTuple):
    """What ended at a value that is not finite: its index, if there are many."""

    index: Any
    trainer: AbstractTrainer
    sentence: str


class One:
    """A fit of one trainer. That of many is another class with the same methods."""

    shape: tuple[int, ...] = ()
    """What stands before the shape of everything that is recorded."""

    entrance = "fit"
    """What the user has called."""

    def __init__(self, place: AbstractPlacement = ANYWHERE):
        """**Arguments:**

        - `place`: where the arrays of the fit lie.
        """
        self.place = place

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What the programs of the fit are made and run in."""
        return self.place.context()

    def source(self, data: Any) -> Source:
        """Turns what a user gave into a source of batches."""
        return self.place.source(as_source(data))

    def prepare(self, batch: Any) -> Any:
        """Turns a batch of a stream into what a step takes."""
        return self.place.share(as_batch(batch, "data"))

    def monitor(self, validation: Any, stop: Any) -> Monitor:
        """Makes the monitor of the fit."""
        return Monitor(validation, stop).placed(self._scored, self.place.put_whole)

    def _scored(self, batch: Any) -> Any:
        """Turns the batch of a validation into what is scored."""
        return self.place.batch(batch, "validation")

    def watched(
        self, monitor: Monitor, trainer: AbstractTrainer
    ) -> MonitorState | None:
        """Makes the first state of the monitor."""
        return self.placed_state(monitor.init(progress_of(trainer)))

    def placed(self, trainer: AbstractTrainer) -> Any:
        """Puts a trainer to where the fit takes place."""
        return self.place.put(trainer)

    def placed_state(self, state: Any) -> Any:
        """Puts what changes from step to step there."""
        return self.place.put_state(state)

    def number(self, value: int) -> Array:
        """Puts a number there that programs do not depend on."""
        return self.place.put_whole(jax.device_put(np.int32(value)))

    def home(self, trainer: AbstractTrainer) -> Any:
        """Brings a trainer back from there."""
        return with_progress(trainer, self.home_state(progress_of(trainer)))

    def home_state(self, state: Any) -> Any:
        """Brings a part of it back."""
        return self.place.home(state)

    def template(self, trainer: AbstractTrainer) -> Any:
        """Returns a trainer that has the names and the shapes of each."""
        return trainer

    def row(self, batch: Any) -> Any:
        """Returns what of a batch each trainer sees, or its shapes."""
        return batch

    def on_host(self, array: Any) -> np.ndarray:
        """Copies an array to the host."""
        return np.asarray(array)

    def count(self, trainer: AbstractTrainer) -> int:
        """Tells how many steps were taken."""
        return int(trainer.step_count)

    def is_over(self, *flags: Any) -> bool:
        """Whether there are no more steps to be taken, as one of the flags says."""
        return any(map(bool, flags))

    def run(self, task: Task, state: LoopState, in_place: bool) -> tuple[Chunk, Ended]:
        """Takes the steps of one chunk.

        **Arguments:**

        - `task`, `state`: what it is given, and what it changes.
        - `in_place`: whether `state` may be overwritten.
        """
        run = run_chunk_in_place if in_place else run_chunk
        with self.context():
            return run(task, state, self.place)

    def recorded(self, step_count: Any, rows: Rows, scores: Rows | None) -> History:
        """Copies what a chunk recorded to the host.

        **Arguments:**

        - `step_count`: of the trainer after the chunk.
        - `rows`, `scores`: the buffers on the device.
        """
        end = int(step_count)
        steps, loss, records = rows.columns(end)
        if scores is None:
            return History(steps, loss, records)
        scored, score, _ = scores.columns(end + 1)
        return History(steps, loss, records, score, scored)

    def shown(self, trainer: AbstractTrainer, history: History) -> dict[str, str]:
        """What a progress bar shows."""
        bad = max(count.total for count in nan_report(trainer).values())
        # First, as a narrow terminal has no room for the last.
        shown = {"non-finite": str(bad)} if bad else {}
        for name in ("loss", "validation"):
            if len(history[name]):
                shown[name] = f"{history[name][-1]:.6g}"
        return shown | {"best": f"{float(trainer.best_loss):.6g}"}

    def ended(
        self,
        trainer: AbstractTrainer,
        history: History,
        monitor: Monitor,
        watched: MonitorState | None,
        reason: StopReason,
        is_all_skipped: np.ndarray,
    ) -> Any:
        """Makes the result of a fit that came to its end.

        **Arguments:**

        - `is_all_skipped`: whether no step was accepted.

        - `reason`: why there were no more chunks, unless the trainer knows better.
        """
        if trainer.stopped:
            is_bad = is_at_bad_step(trainer)
            reason = StopReason.NON_FINITE if is_bad else StopReason.POLICY
        elif (met := monitor.reason(watched)) is not None:
            reason = met
        elif reason is StopReason.STEPS_TAKEN and is_all_skipped:
            reason = StopReason.ALL_SKIPPED
        return self.cut_short(trainer, history, reason)

    def checked(self, result: Any, source: Source) -> Any:
        """Checks that a fit which has converged is at a minimum."""
        return checked_end(result, source) if self.place.mesh is None else result

    def cut_short(
        self, trainer: AbstractTrainer, history: History, reason: StopReason
    ) -> Any:
        """Makes the result of a fit that did not."""
        return FitResult(self.home(trainer), history, reason)

    def bad_end(self, result: Any) -> BadEnd | None:
        """Finds what ended at a value that is not finite, if anything did.

        Of many trainers it is the first, if there is an error to raise or all ended so.
        """
        reason = result.stop_reason
        if reason not in AT_NON_FINITE:
            return None
        return BadEnd((), self.placed(result.trainer), f"`fit`: {reason}")

    def seen(self, source: Whole[Any] | Minibatches, index: Any) -> Any:
        """Returns what one trainer saw of a source: a batch, or all minibatches."""
        return source.batch if isinstance(source, Whole) else source

    def raise_if_non_finite(self, result: Any, explanation: str) -> None:
        """Raises, under a policy that does."""
        raise_if_non_finite(result.trainer, result, explanation)

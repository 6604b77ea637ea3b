"""What a fit asks of what it fits: here, one trainer."""

from typing import Any

from ._compiled import Chunk, run_chunk
from ._data import Minibatches, Source, Whole, as_batch, as_source
from ._history import History
from ._monitor import Monitor, MonitorState
from ._record import Record
from ._result import FitResult
from ._stop import StopReason


class One:
    """A fit of one trainer. That of many is another class with the same methods."""

    shape: tuple[int, ...] = ()
    """What stands before the shape of everything that is recorded."""

    def source(self, data: Any) -> Source:
        """Turns what a user gave into a source of batches."""
        return as_source(data)

    def prepare(self, batch: Any) -> Any:
        """Turns a batch of a stream into what a step takes."""
        return as_batch(batch)

    def monitor(self, validation: Any, stop: Any) -> Monitor:
        """Makes the monitor of the fit."""
        return Monitor(validation, stop)

    def watched(self, monitor: Monitor, trainer: Any) -> MonitorState | None:
        """Makes the first state of the monitor."""
        return monitor.init(trainer._progress)

    def template(self, trainer: Any) -> Any:
        """Returns a trainer that has the names and the shapes of each."""
        return trainer

    def row(self, batch: Any) -> Any:
        """Returns what of a batch each trainer sees, or its shapes."""
        return batch

    def count(self, trainer: Any) -> int:
        """Tells how many steps were taken."""
        return int(trainer.step_count)

    def is_over(self, trainer: Any, watched: MonitorState | None) -> bool:
        """Whether there are no more steps to be taken."""
        return bool(trainer.stopped) or (watched is not None and bool(watched.is_over))

    def run(
        self,
        trainer: Any,
        source: Whole[Any] | Minibatches,
        monitor: Monitor,
        watched: MonitorState | None,
        goal: Any,
        every: Any,
        record: Record,
        most_rows: int,
    ) -> Chunk:
        """Takes the steps of one chunk."""
        return run_chunk(
            trainer, source, monitor, watched, goal, every, record, most_rows
        )

    def shown(self, trainer: Any, history: History) -> dict[str, str]:
        """What a progress bar shows."""
        bad = max(count.total for count in trainer.nan_report().values())
        # First, as a narrow terminal has no room for the last.
        shown = {"non-finite": str(bad)} if bad else {}
        for name in ("loss", "validation"):
            if len(history[name]):
                shown[name] = f"{history[name][-1]:.6g}"
        return shown | {"best": f"{float(trainer.best_loss):.6g}"}

    def ended(
        self,
        trainer: Any,
        history: History,
        monitor: Monitor,
        watched: MonitorState | None,
        reason: StopReason,
    ) -> Any:
        """Makes the result of a fit that came to its end.

        **Arguments:**

        - `reason`: why there were no more chunks, unless the trainer knows better.
        """
        if trainer.stopped:
            is_bad = trainer._is_at_a_bad_step()
            reason = StopReason.NON_FINITE if is_bad else StopReason.POLICY
        elif (met := monitor.reason(watched)) is not None:
            reason = met
        return FitResult(trainer, history, reason)

    def cut_short(self, trainer: Any, history: History, reason: StopReason) -> Any:
        """Makes the result of a fit that did not."""
        return FitResult(trainer, history, reason)

    def raise_if_non_finite(self, result: Any) -> None:
        """Raises, under a policy that does."""
        result.trainer._raise_if_non_finite(result)

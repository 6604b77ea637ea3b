"""A fit of one trainer."""

import dataclasses
from typing import Any, final

import numpy as np

from .._boundary import PyTree
from .._data import Minibatches, Source, Whole, as_batch, as_source
from .._devices import ANYWHERE, AbstractPlacement
from .._loop import (
    Chunk,
    Ended,
    LoopState,
    Monitor,
    MonitorState,
    Task,
    run_chunk,
    run_chunk_in_place,
)
from .._policy import AT_NON_FINITE, StopReason
from .._step import (
    AbstractTrainer,
    data_mark,
    nan_report,
    noted_as,
    progress_of,
    scored_parts,
)
from .._storage import History
from .arrival import checked_end
from .result import FitResult
from .subject import AbstractSubject, BadEnd


@final
@dataclasses.dataclass(frozen=True)
class OneTrainer(AbstractSubject):
    """A fit of one trainer."""

    entrance = "fit"
    place: AbstractPlacement = ANYWHERE

    def source(self, data: Any) -> Source:
        return self.place.source(as_source(data))

    def marks(
        self, trainer: AbstractTrainer, source: Source, by_validation: bool
    ) -> np.ndarray:
        return np.asarray(data_mark(source, scored_parts(trainer, by_validation)))

    def prepare(self, batch: Any) -> Any:
        return self.place.share(as_batch(batch, "data"))

    def prepare_validation(self, batch: Any) -> Any:
        return self.place.batch(batch, "validation")

    def first_monitor_state(
        self, monitor: Monitor, trainer: AbstractTrainer
    ) -> MonitorState | None:
        return self.placed_state(monitor.init(progress_of(trainer)))

    def placed(self, trainer: AbstractTrainer) -> Any:
        return self.place.put(trainer)

    def placed_state(self, state: PyTree) -> Any:
        return self.place.put_state(state)

    def seen(self, source: Whole[Any] | Minibatches, index: Any) -> Any:
        return source.batch if isinstance(source, Whole) else source

    def run(self, task: Task, state: LoopState, in_place: bool) -> tuple[Chunk, Ended]:
        run = run_chunk_in_place if in_place else run_chunk
        with self.place.context():
            return run(task, state, self.place)

    def shown(self, trainer: AbstractTrainer, history: History) -> dict[str, str]:
        bad = max(count.total for count in nan_report(trainer).values())
        # First, as a narrow terminal has no room for the last.
        shown = {"non-finite": str(bad)} if bad else {}
        for name in ("loss", "validation"):
            if len(history[name]):
                shown[name] = f"{history[name][-1]:.6g}"
        return shown | {"best": f"{float(trainer.best_loss):.6g}"}

    def result(
        self, trainer: AbstractTrainer, history: History, reasons: list[StopReason]
    ) -> FitResult[Any, Any]:
        return FitResult(noted_as(self.home(trainer), trainer), history, reasons[0])

    def checked(self, result: Any, source: Source) -> Any:
        if not self.is_here:
            return result
        with self.place.context():
            return checked_end(result, source, self.placed(result.trainer))

    def reasons(self, result: Any) -> tuple[StopReason, ...]:
        return (result.stop_reason,)

    def bad_end(self, result: Any) -> BadEnd | None:
        reason = result.stop_reason
        if reason not in AT_NON_FINITE:
            return None
        return BadEnd((), reason, self.picked(result, ()), f"`fit`: {reason}")

    def picked(self, result: Any, index: Any) -> AbstractTrainer:
        return self.placed(result.trainer)

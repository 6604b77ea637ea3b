"""How a fit ended."""

from typing import Any, Generic, TypeVar, final

import equinox as eqx

from ._history import History
from ._stop import StopReason

TrainerT = TypeVar("TrainerT", covariant=True)
Model = TypeVar("Model", covariant=True)


@final
class FitResult(eqx.Module, Generic[TrainerT, Model]):
    """What a fit returns.

    **Attributes:**

    - `trainer`: the trainer after the last step, ready to go on.
    - `history`: what was recorded.
    - `stop_reason`: why the fit ended; it prints as a sentence.
    """

    trainer: TrainerT
    history: History
    stop_reason: StopReason = eqx.field(static=True)

    @property
    def model(self) -> Model:
        """The model after the last step."""
        return self._trainer.model

    @property
    def best(self) -> Model:
        """The model with the lowest loss that was scored."""
        return self._trainer.best

    @property
    def _trainer(self) -> Any:
        # Its class imports this one, and cannot be named here.
        return self.trainer

    def __repr__(self) -> str:
        bad = max(count.total for count in self._trainer.nan_report().values())
        non_finite = f"non_finite={bad}, " if bad else ""
        return (
            f"FitResult(steps={int(self._trainer.step_count)}, "
            f"best_loss={float(self._trainer.best_loss):.6g}, {non_finite}"
            f"stop_reason={str(self.stop_reason)!r}, history={self.history!r})"
        )

"""How a fit ended."""

import enum
from typing import Any, Generic, TypeVar, final

import equinox as eqx

from ._history import History

TrainerT = TypeVar("TrainerT", covariant=True)
Model = TypeVar("Model", covariant=True)


class StopReason(enum.Enum):
    """Why a fit or a solve ended. Prints as a sentence."""

    STEPS_TAKEN = "All steps were taken."
    TAKEN_BEFORE = "All steps had been taken before: the checkpoint has the result."
    NON_FINITE = (
        "Ended at a value that is not finite: `trainer.nan_report()` says where."
    )
    POLICY = "The NaN policy ended the fit."
    DATA_EXHAUSTED = "The stream ran dry."
    CALLBACK = "The callback ended the fit."
    INTERRUPTED = "The fit was interrupted from the keyboard."
    TERMINATED = "The process was told to end (SIGTERM); the checkpoint has its state."
    ERROR = "An error ended the fit."
    CONVERGED = "The solver converged."
    MAX_STEPS = "The solver took `max_steps` steps and has not converged."
    DIVERGED = "The solver diverged."
    FAILED = (
        "The solver gave up: a linear problem within one of its steps had no solution."
    )

    def __str__(self) -> str:
        """The sentence."""
        return self.value


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
        return (
            f"FitResult(steps={int(self._trainer.step_count)}, "
            f"best_loss={float(self._trainer.best_loss):.6g}, "
            f"stop_reason={str(self.stop_reason)!r}, history={self.history!r})"
        )

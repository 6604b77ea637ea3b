"""How a fit ended."""

from typing import Any, Generic, TypeVar, final

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float

from ._edm import along
from ._history import History
from ._stop import StopReason

TrainerT = TypeVar("TrainerT", covariant=True)
Model = TypeVar("Model", covariant=True)


@final
class FitResult(eqx.Module, Generic[TrainerT, Model]):
    r"""What a fit returns.

    **Attributes:**

    - `trainer`: the trainer after the last step, ready to go on.
    - `history`: what was recorded.
    - `stop_reason`: why the fit ended; it prints as a sentence.
    - `edm`: the estimated distance to the minimum, by how much the loss could still
        fall: $\frac12 g^\top F^{-1} g$, with the gradient $g$ where it ended. NaN where
        it is not known. See [`vernal.Trainer.solve`][].
    """

    trainer: TrainerT
    history: History
    stop_reason: StopReason = eqx.field(static=True)
    edm: Float[Array | np.ndarray, ""] = eqx.field(
        default_factory=lambda: np.array(np.nan)
    )
    _direction: Float[Array, " D"] | None = None

    @property
    def model(self) -> Model:
        """The model after the last step."""
        return self._trainer.model

    @property
    def best(self) -> Model:
        """The model with the lowest loss that was scored."""
        return self._trainer.best

    def explain(self) -> str:
        """Says why the fit ended, and what could still fall.

        ```text
        The solver stopped short of a minimum. The loss could still fall by about 512
        (edm), along power (+0.98), mean (-0.2).
        ```

        The numbers are the direction of the minimum, as far as it can be seen from
        here, with each parameter in units of its own scale.
        """
        if self._direction is None or not np.isfinite(self.edm):
            return str(self.stop_reason)
        direction = np.asarray(self._direction, float)
        is_short = self.stop_reason is not StopReason.CONVERGED
        where = along(direction, self._trainer.params) if is_short else ""
        return (
            f"{self.stop_reason} The loss could still fall by about {self.edm:.3g} "
            f"(edm){where}."
        )

    @property
    def _trainer(self) -> Any:
        # Its class imports this one, and cannot be named here.
        return self.trainer

    def __repr__(self) -> str:
        bad = max(count.total for count in self._trainer.nan_report().values())
        non_finite = f"non_finite={bad}, " if bad else ""
        edm = f"edm={float(self.edm):.3g}, " if np.isfinite(self.edm) else ""
        return (
            f"FitResult(steps={int(self._trainer.step_count)}, "
            f"best_loss={float(self._trainer.best_loss):.6g}, {non_finite}"
            f"{edm}stop_reason={str(self.stop_reason)!r}, history={self.history!r})"
        )

"""How many fits ended."""

from typing import Any, Generic, final

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float
from typing_extensions import TypeVar

from .._boundary import whole_number
from .._pickling import Portable
from .._policy import NanCount, StopReason
from .._storage import History
from .._trainer import Trainer

TrainerT = TypeVar(
    "TrainerT", bound=Trainer[Any, Any], covariant=True, default=Trainer[Any, Any]
)
Model = TypeVar("Model")


@final
class ManyResult(Portable, eqx.Module, Generic[TrainerT]):
    """What [`vernal.fit_many`][] returns. `len(result)` is the number of members.

    **Attributes:**

    - `trainers`: all trainers after the last step, stacked: a trainer whose arrays have
        a row for each member. It can be given to `fit_many` again.
    - `history`: what was recorded, with a column for each member:
        `history.loss[row, i]`. After a member has ended, its column is NaN.
    - `stop_reasons`: why the fit of each ended.
    - `edms`: after a solve, how far the loss of each could still fall, as `edm` of a
        [`vernal.FitResult`][]; NaN after a fit.
    """

    trainers: TrainerT
    history: History
    stop_reasons: tuple[StopReason, ...] = eqx.field(static=True)
    edms: Float[np.ndarray, " members"]

    def __len__(self) -> int:
        return len(self.stop_reasons)

    def trainer(self, index: int) -> TrainerT:
        """The trainer of one member."""
        index = whole_number(index, "index")
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` is {index}, and there are {len(self)} members.")
        is_array = lambda leaf: isinstance(leaf, jax.Array)
        return jax.tree.map(lambda x: x[index] if is_array(x) else x, self.trainers)

    @property
    def losses(self) -> Float[np.ndarray, " members"]:
        """The last recorded loss of each member that is not NaN, if there is one."""
        if not len(self.history):
            return np.full(len(self), np.nan)
        backwards = self.history.loss[::-1]
        last = np.argmin(np.isnan(backwards), axis=0)
        return np.take_along_axis(backwards, last[None], axis=0)[0]

    @property
    def best_losses(self) -> Float[Array, " members"]:
        """The loss of each member's best model, or its validation score."""
        return self.trainers.best_loss

    @property
    def best_index(self) -> int:
        """The member with the lowest of all `best_losses`."""
        return int(np.argmin(self.best_losses))

    @property
    def best(self: "ManyResult[Trainer[Model, Any]]") -> Model:
        """The best model of all members."""
        return self.trainer(self.best_index).best

    def nan_report(self, index: int) -> dict[str, NanCount]:
        """What was not finite in one member, as [`vernal.Trainer.nan_report`][]."""
        return self.trainer(index).nan_report()

    def __repr__(self) -> str:
        best = self.best_index
        return (
            f"ManyResult({len(self)} members, "
            f"best_loss={float(self.best_losses[best]):.6g} of member {best})"
        )

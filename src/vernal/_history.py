"""What a fit recorded, step by step."""

from collections.abc import Mapping
from typing import final

import equinox as eqx
import numpy as np

from ._paths import UnknownPathError, nearest_names

_COLUMNS = ("steps", "loss", "validation", "validation_steps")


@final
class History(eqx.Module):
    """What a fit recorded: the loss, and whatever `record` named beside it.

    Each array has one row for each recorded step. Two histories of consecutive fits
    join with `+`.

    ```python
    result = trainer.fit(data, steps=500, record=("grad_norm", "mean"), every=10)
    plt.plot(result.history.steps, result.history["mean"])
    ```

    **Attributes:**

    - `steps`: the steps that were recorded, counted from the trainer's first.
    - `loss`: the loss at the parameters *before* each of these steps.
    - `validation`: the scores of the validation, of which there may be none.
    - `validation_steps`: how many steps had been taken when it was scored.
    - `records`: what else was recorded, by name. `history["name"]` is short for
        `history.records["name"]`.
    """

    steps: np.ndarray
    loss: np.ndarray
    records: dict[str, np.ndarray]
    validation: np.ndarray
    validation_steps: np.ndarray

    def __init__(
        self,
        steps: np.ndarray,
        loss: np.ndarray,
        records: Mapping[str, np.ndarray] | None = None,
        validation: np.ndarray | None = None,
        validation_steps: np.ndarray | None = None,
    ):
        """**Arguments:** see the attributes."""
        self.steps = steps
        self.loss = loss
        self.records = dict(records or {})
        self.validation = loss[:0] if validation is None else validation
        none = validation_steps is None
        self.validation_steps = steps[:0] if none else validation_steps

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self.records:
            return self.records[name]
        if name in _COLUMNS:
            return getattr(self, name)
        raise UnknownPathError(
            f"The history has no {name!r}. "
            f"{nearest_names(name, [*self.records, *_COLUMNS])} "
            f"To keep it, pass `record=({name!r},)` to `fit`."
        )

    def __len__(self) -> int:
        return len(self.steps)

    def __add__(self, other: "History") -> "History":
        if not isinstance(other, History):
            return NotImplemented
        if self.records.keys() != other.records.keys():
            raise ValueError(
                "Two histories that join must record the same: one has "
                f"{sorted(self.records)}, the other {sorted(other.records)}."
            )
        return concatenate([self, other])

    def __repr__(self) -> str:
        if not len(self):
            return "History(empty)"
        names = "".join(f", {name}" for name in self.records)
        return (
            f"History({len(self)} rows, steps {self.steps[0]} to {self.steps[-1]}, "
            f"loss {self.loss[0]:.6g} to {self.loss[-1]:.6g}{names})"
        )


def concatenate(histories: list[History]) -> History:
    """Joins histories of the same records, in order."""
    if len(histories) == 1:
        return histories[0]
    columns = {
        name: np.concatenate([getattr(history, name) for history in histories])
        for name in _COLUMNS
    }
    records = {
        name: np.concatenate([history.records[name] for history in histories])
        for name in histories[0].records
    }
    return History(records=records, **columns)

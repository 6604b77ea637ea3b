"""What a fit recorded, step by step."""

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, final

import equinox as eqx
import jax
import numpy as np

from .._boundary import file_path, nearest_names
from .._loop import COLUMNS
from .._pickling import Portable
from .._tree import MismatchError, UnknownPathError, to_arrays
from .file import open_file, write_file

# In a file it precedes the names of the records, which may be any.
RECORDS = "records."


@final
class History(Portable, eqx.Module):
    """What a fit recorded: the loss, and whatever `record` named beside it.

    Each array has one row for each recorded step. Two histories of consecutive fits
    join with `+`. The arrays of a result may be changed; those that a callback is given
    are read-only.

    ```python
    result = trainer.fit(data, steps=500, record=("grad_norm", "mean"), every=10)
    plt.plot(result.history.steps, result.history["mean"])
    ```

    **Attributes:**

    - `steps`: the steps that were recorded, counted from the trainer's first.
    - `loss`: the loss at the parameters *before* each of these steps.
    - `validation`: the scores of the validation; empty without one.
    - `validation_steps`: the number of steps taken before each score.
    - `records`: what else was recorded, by name. `history["name"]` is short for
        `history.records["name"]`, and `"name" in history` says whether it is there.
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
        _check_column(steps, "steps")
        if not isinstance(records, Mapping | None):
            raise TypeError(f"`records` is {records!r}, but must map names to arrays.")
        named = {f"records[{name!r}]": rows for name, rows in (records or {}).items()}
        for name, rows in {"loss": loss, **named}.items():
            _check_column(rows, name)
            if len(rows) != len(steps):
                raise ValueError(
                    f"`{name}` has {len(rows)} rows, but `steps` has {len(steps)}."
                )
        self.steps = steps
        self.loss = loss
        self.records = dict(records or {})
        self.validation = loss[:0] if validation is None else validation
        has_scores = validation_steps is not None
        self.validation_steps = validation_steps if has_scores else steps[:0]
        for name in ("validation", "validation_steps"):
            _check_column(getattr(self, name), name)

    def __getitem__(self, name: str) -> np.ndarray:
        if not isinstance(name, str):
            raise TypeError(
                f"`history[...]` takes the name of a column, and {name!r} is none. "
                "Take rows of one column (`history.loss[0]`); `history.to_dict()` has "
                "all of them."
            )
        if name in self.records:
            return self.records[name]
        if name in COLUMNS:
            return getattr(self, name)
        below = [
            path for path in self.records if path.startswith((f"{name}.", f"{name}["))
        ]
        if below:
            raise UnknownPathError(
                f"The history has no {name!r}, which is a node. Of its arrays it has "
                f"{', '.join(map(repr, below))}."
            )
        raise UnknownPathError(
            f"The history has no {name!r}. "
            f"{nearest_names(name, [*self.records, *COLUMNS])} "
            f"To keep it, pass `record=({name!r},)` to `fit`."
        )

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in {*self.records, *COLUMNS}

    def to_dict(self) -> dict[str, np.ndarray]:
        """Returns all that was recorded, by name.

        The scores of a validation and their steps are in it if there are any: two
        columns that are shorter than the others.
        """
        scored = len(self.validation) > 0
        names = COLUMNS if scored else COLUMNS[:2]
        return {name: getattr(self, name) for name in names} | self.records

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the history to one file, which `numpy.load` can read too.

        **Arguments:**

        - `path`: the file. An existing one is replaced.

        **Raises:**

        - `OSError`: if the file cannot be written. An existing one is then unchanged.
        """
        file_path(path, "path")
        write_file(path, to_arrays(OrderedDict(to_columns(self))))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "History":
        """Reads what `save` wrote.

        **Arguments:**

        - `path`: the file.

        **Raises:**

        - `LoadError`: as [`vernal.load`][].
        """
        file_path(path, "path")
        with open_file(path) as (arrays, _):
            columns = {name: np.asarray(leaf.array) for name, leaf in arrays.items()}
        if not columns.keys() >= set(COLUMNS):
            raise MismatchError(
                f"`path`: {os.fspath(path)} holds another tree than a History. Read it "
                "with `vn.load`."
            )
        return from_columns(columns)

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
        for name, rows in self.to_dict().items():
            shape, others = rows.shape[1:], other[name].shape[1:]
            if shape != others:
                raise ValueError(
                    f"Two histories that join must record the same: {name!r} has the "
                    f"shape {shape} in one, and {others} in the other."
                )
        first, second = to_columns(self), to_columns(other)
        return from_columns(
            {name: np.concatenate([first[name], second[name]]) for name in first}
        )

    def __repr__(self) -> str:
        if not len(self):
            return "History(empty)"
        names = "".join(f", {name}" for name in self.records)
        return (
            f"History({len(self)} rows, steps {self.steps[0]} to {self.steps[-1]}, "
            f"loss {self.loss[0]:.6g} to {self.loss[-1]:.6g}{names})"
        )


def _check_column(column: Any, name: str) -> None:
    if not isinstance(column, np.ndarray | jax.Array) or not column.ndim:
        raise TypeError(
            f"`{name}` is {column!r}, but must be an array with an entry for each row."
        )


def to_columns(history: History) -> dict[str, np.ndarray]:
    """Returns the columns of a history by their names in a file."""
    records = {f"{RECORDS}{name}": rows for name, rows in history.records.items()}
    return {name: getattr(history, name) for name in COLUMNS} | records


def from_columns(columns: Mapping[str, np.ndarray]) -> History:
    """Returns the history whose columns `to_columns` returned."""
    records = {
        name.removeprefix(RECORDS): rows
        for name, rows in columns.items()
        if name not in COLUMNS
    }
    return History(records=records, **{name: columns[name] for name in COLUMNS})


class Recorder:
    """Joins histories to one, at a cost that is linear in its length."""

    def __init__(self, empty: Callable[[], History]):
        """`empty` returns a history without rows. It is called only if it is needed."""
        self._empty = empty
        self._columns: dict[str, _Column] = {}

    def extend(self, history: History) -> None:
        new = to_columns(history)
        if not self._columns:
            self._columns = {name: _Column(rows) for name, rows in new.items()}
        else:
            self._require_same_shapes(new)
            for name, column in self._columns.items():
                column.extend(new[name])

    def _require_same_shapes(self, new: dict[str, np.ndarray]) -> None:
        for name, column in self._columns.items():
            before, after = column.rows.shape[1:], new[name].shape[1:]
            if name.startswith(RECORDS) and before != after:
                raise ValueError(
                    f"`record`: {name.removeprefix(RECORDS)!r} has the shape {before} "
                    f"up to step {self._columns['steps'].rows[-1]}, and {after} "
                    "afterwards. What is recorded must have one shape for all batches."
                )

    def history(self, *, is_final: bool = True) -> History:
        """Returns the whole history so far; read-only, unless it is final."""
        if not self._columns:
            self.extend(self._empty())
        columns = {name: column.rows for name, column in self._columns.items()}
        for rows in () if is_final else columns.values():
            rows.flags.writeable = False
        return from_columns(columns)


class _Column:
    """An array with room for more rows at its end."""

    def __init__(self, rows: np.ndarray):
        self._buffer, self._length = rows, len(rows)

    def extend(self, rows: np.ndarray) -> None:
        length = self._length + len(rows)
        if length > len(self._buffer):
            grown = np.empty((2 * length, *rows.shape[1:]), rows.dtype)
            grown[: self._length] = self.rows
            self._buffer = grown
        dtype = np.promote_types(self._buffer.dtype, rows.dtype)
        self._buffer = self._buffer.astype(dtype, copy=False)
        self._buffer[self._length : length] = rows
        self._length = length

    @property
    def rows(self) -> np.ndarray:
        """A view, whose flags are its own."""
        return self._buffer[: self._length]

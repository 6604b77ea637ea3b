"""A history while it grows."""

from collections.abc import Callable

import numpy as np

from .._loop import COLUMNS
from .history import History


class Recorder:
    """Joins histories to one, at a cost that is linear in its length."""

    def __init__(self, empty: Callable[[], History]):
        """**Arguments:**

        - `empty`: makes a history without rows, if it is asked for before there is one.
        """
        self._empty = empty
        self._columns: dict[str, _Column] | None = None
        self._records: dict[str, _Column] = {}

    def extend(self, history: History) -> None:
        """Adds what was recorded since."""
        if self._columns is None:
            self._columns = {name: _Column(getattr(history, name)) for name in COLUMNS}
            self._records = {n: _Column(rows) for n, rows in history.records.items()}
            return
        for name, column in self._records.items():
            old, new = column.rows.shape[1:], history.records[name].shape[1:]
            if old != new:
                raise ValueError(
                    f"`record`: {name!r} has the shape {old} up to step "
                    f"{self._columns['steps'].rows[-1]}, and {new} afterwards. What is "
                    "recorded must have one shape for all batches."
                )
        for name, column in self._columns.items():
            column.extend(getattr(history, name))
        for name, column in self._records.items():
            column.extend(history.records[name])

    def history(self, *, is_final: bool = True) -> History:
        """Returns all of it so far.

        **Arguments:**

        - `is_final`: whether the arrays may be changed. Those that are handed out while
            the fit goes on are a part of its result.
        """
        if self._columns is None:
            self.extend(self._empty())
        rows = lambda columns: {
            name: column.rows if is_final else _read_only(column.rows)
            for name, column in columns.items()
        }
        return History(records=rows(self._records), **rows(self._columns))


def _read_only(rows: np.ndarray) -> np.ndarray:
    view = rows.view()
    view.flags.writeable = False
    return view


class _Column:
    """An array with room for more at its end."""

    def __init__(self, rows: np.ndarray):
        self._room, self._length = rows, len(rows)

    def extend(self, rows: np.ndarray) -> None:
        length = self._length + len(rows)
        if length > len(self._room):
            grown = np.empty((2 * length, *rows.shape[1:]), rows.dtype)
            grown[: self._length] = self.rows
            self._room = grown
        dtype = np.promote_types(self._room.dtype, rows.dtype)
        self._room = self._room.astype(dtype, copy=False)
        self._room[self._length : length] = rows
        self._length = length

    @property
    def rows(self) -> np.ndarray:
        return self._room[: self._length]

"""A history on disk, which grows by rows and is never rewritten."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._history import History
from ._leaves import MismatchError

Columns = Mapping[str, np.ndarray]


class HistoryLog:
    """The rows of a history in files that are only appended to.

    A checkpoint says how many rows belong to it: what was written after it is cut off
    when a fit goes on from there.
    """

    def __init__(self, folder: Path):
        """**Arguments:**

        - `folder`: where the files are, or will be.
        """
        self._tables = _Table(folder, "history"), _Table(folder, "validation")

    def read(self, rows: list[int]) -> History | None:
        """Reads the first rows, and forgets the others; `None` if they are not all."""
        pairs = zip(self._tables, rows, strict=True)
        recorded, scored = (table.read(count) for table, count in pairs)
        if not recorded or not scored:
            return None
        steps, loss, *records = recorded.values()
        names = list(recorded)[2:]
        return History(steps, loss, dict(zip(names, records, strict=True)), **scored)

    def begin(self, like: History) -> None:
        """Checks that what is recorded is what there is already, if there is any."""
        for table, columns in zip(self._tables, _columns(like), strict=True):
            table.begin(columns)

    def append(self, history: History) -> list[int]:
        """Adds what is new in a history.

        **Returns:**

        How many rows there are now, and how many scores of a validation.
        """
        pairs = zip(self._tables, _columns(history), strict=True)
        return [table.append(columns) for table, columns in pairs]


def _columns(history: History) -> tuple[Columns, Columns]:
    recorded = {"steps": history.steps, "loss": history.loss} | history.records
    scored = {
        "validation": history.validation,
        "validation_steps": history.validation_steps,
    }
    return recorded, scored


class _Table:
    """Columns of equal length in one file, as records of fixed size."""

    def __init__(self, folder: Path, name: str):
        self._path, self._header = folder / f"{name}.bin", folder / f"{name}.json"
        self._path.touch()
        self.rows = 0

    def _described(self) -> list[Any]:
        if not self._header.exists():
            return []
        columns = json.loads(self._header.read_text())
        return [(name, dtype, tuple(shape)) for name, dtype, shape in columns]

    def read(self, rows: int) -> dict[str, np.ndarray] | None:
        row = np.dtype(self._described())
        if self._path.stat().st_size < rows * row.itemsize:
            return None
        os.truncate(self._path, rows * row.itemsize)
        self.rows = rows
        table = np.fromfile(self._path, row) if row.names else {}
        return {name: table[name].copy() for name in row.names or ()}

    def begin(self, columns: Columns) -> None:
        described = [(n, c.dtype.str, c.shape[1:]) for n, c in columns.items()]
        there = self._described()
        if self.rows and there != described:
            raise MismatchError(
                f"`checkpoint`: the history in {self._path.parent} has "
                f"{', '.join(name for name, *_ in there)}, and this fit records "
                f"{', '.join(columns)}. Give the same `record`, or another directory."
            )
        self._header.write_text(json.dumps(described))

    def append(self, columns: Columns) -> int:
        length = len(next(iter(columns.values())))
        if length > self.rows:
            table = np.empty(length - self.rows, np.dtype(self._described()))
            for name, column in columns.items():
                table[name] = column[self.rows :]
            with self._path.open("ab") as file:
                table.tofile(file)
            self.rows = length
        return self.rows

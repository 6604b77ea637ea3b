"""A history on disk, which grows by rows and is never rewritten."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ._history import History
from ._leaves import MismatchError


class HistoryLog:
    """The rows of a history in one file, each a record of fixed size.

    A checkpoint says how many rows belong to it: what was written after it is cut off
    when a fit goes on from there.
    """

    def __init__(self, folder: Path):
        """**Arguments:**

        - `folder`: where the file is, or will be.
        """
        self._path, self._header = folder / "history.bin", folder / "history.json"
        self._path.touch()
        self.rows = 0

    def _columns(self) -> list[Any]:
        if not self._header.exists():
            return []
        columns = json.loads(self._header.read_text())
        return [(name, dtype, tuple(shape)) for name, dtype, shape in columns]

    def read(self, rows: int) -> History | None:
        """Reads the first rows, and forgets the others; `None` if they are not all."""
        row = np.dtype(self._columns())
        if self._path.stat().st_size < rows * row.itemsize:
            return None
        os.truncate(self._path, rows * row.itemsize)
        self.rows = rows
        if not row.names:
            return None
        table = np.fromfile(self._path, row)
        steps, loss, *others = (table[name].copy() for name in row.names)
        return History(steps, loss, dict(zip(row.names[2:], others, strict=True)))

    def begin(self, like: History) -> None:
        """Checks that what is recorded is what there is already, if there is any."""
        columns = [(n, c.dtype.str, c.shape[1:]) for n, c in _columns(like)]
        if self.rows and self._columns() != columns:
            there, here = ([name for name, *_ in x] for x in (self._columns(), columns))
            raise MismatchError(
                f"`checkpoint`: the history in {self._path.parent} has "
                f"{', '.join(there)}, and this fit records {', '.join(here)}. Give the "
                "same `record`, or another directory."
            )
        self._header.write_text(json.dumps(columns))

    def append(self, history: History) -> int:
        """Adds rows at the end, and returns how many there are now."""
        table = np.empty(len(history), np.dtype(self._columns()))
        for name, column in _columns(history):
            table[name] = column
        with self._path.open("ab") as file:
            table.tofile(file)
        self.rows += len(history)
        return self.rows


def _columns(history: History) -> Iterator[tuple[str, np.ndarray]]:
    yield "steps", history.steps
    yield "loss", history.loss
    yield from history.records.items()

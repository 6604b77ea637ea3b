"""A history on disk, which grows by rows and is never rewritten."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._tree import MismatchError
from .file import plain
from .history import RECORDS, History, from_columns, to_columns

Columns = Mapping[str, np.ndarray]

# An odd number whose bits are without a pattern: that of the golden ratio.
_MIXER = np.uint64(0x9E3779B97F4A7C15)


class Extent(NamedTuple):
    """How much of a table belongs to a checkpoint."""

    rows: int
    columns: list[Any]
    """The name, dtype and shape of each column."""


class HistoryLog:
    """The rows of a history in files that are only appended to.

    A checkpoint says how many rows belong to it: what was written after it is cut off
    when a fit goes on from there. Each row has a checksum, so that damage to some of
    them costs these rows alone.
    """

    def __init__(self, folder: Path, *, writes: bool):
        """**Arguments:**

        - `folder`: where the files are, or will be.
        - `writes`: whether to write to them. Of several processes one does.
        """
        names = "history", "validation"
        self._tables = tuple(_Table(folder, name, writes) for name in names)

    def read(self, extents: Sequence[Any]) -> tuple[History, str]:
        """Reads the first rows, and says which of them are lost: `""` if none is.

        **Arguments:**

        - `extents`: what `append` returned.
        """
        pairs = zip(self._tables, extents, strict=True)
        read = [table.read(Extent(*extent)) for table, extent in pairs]
        (recorded, whole), (scored, whole_scores) = read
        lost = [
            _lost("rows", recorded["steps"], whole),
            _lost("validation scores", scored["validation_steps"], whole_scores),
        ]
        recorded = {name: rows[whole] for name, rows in recorded.items()}
        scored = {name: rows[whole_scores] for name, rows in scored.items()}
        return from_columns(recorded | scored), " and ".join(filter(None, lost))

    def go_on(self, extents: Sequence[Any], history: History) -> None:
        """Forgets all rows but the first, and goes on from there.

        **Arguments:**

        - `extents`: what `append` returned.
        - `history`: what `read` made of them.
        """
        for table, extent, columns in zip(
            self._tables, extents, _columns(history), strict=True
        ):
            table.go_on(Extent(*extent), len(next(iter(columns.values()))))

    def forget(self) -> None:
        """Begins with nothing."""
        for table in self._tables:
            table.go_on(Extent(0, []), 0)

    def begin(self, like: History) -> None:
        """Checks that what is recorded is what there is already, if there is any."""
        for table, columns in zip(self._tables, _columns(like), strict=True):
            table.begin(columns)

    def append(self, history: History) -> list[Extent]:
        """Adds what is new in a history, and returns how much there is now."""
        pairs = zip(self._tables, _columns(history), strict=True)
        return [table.append(columns) for table, columns in pairs]


def _columns(history: History) -> tuple[Columns, Columns]:
    recorded = to_columns(history)
    scored = {name: recorded.pop(name) for name in ("validation", "validation_steps")}
    return recorded, scored


def _lost(what: str, steps: np.ndarray, whole: np.ndarray) -> str:
    """Says which rows are lost, by the steps between which they were."""
    if whole.all():
        return ""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], whole, [True]])))
    gaps = [
        (f"after step {steps[first - 1]}" if first else "")
        + (" and " if first and last < len(whole) else "")
        + (f"before step {steps[last]}" if last < len(whole) else "")
        for first, last in edges.reshape(-1, 2)
    ]
    more = "; ..." if len(gaps) > 3 else ""
    where = f" ({'; '.join(gaps[:3])}{more})" if gaps[0] else ""
    return f"{np.sum(~whole)} of {len(whole)} {what}{where}"


class _Table:
    """Columns of equal length in one file, as records of fixed size."""

    def __init__(self, folder: Path, name: str, writes: bool):
        self._path, self._writes = folder / f"{name}.bin", writes
        self._extent, self._length = Extent(0, []), 0

    def read(self, extent: Extent) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns the first rows, and which of them are whole."""
        table = np.zeros(extent.rows, _row(extent.columns))
        try:
            with self._path.open("rb") as file:
                data = np.frombuffer(file.read(table.nbytes), np.uint8)
            table.view(np.uint8)[: len(data)] = data
        except (FileNotFoundError, IsADirectoryError):
            pass
        columns = {
            name: table[name].copy().view(jnp.dtype(dtype))
            for name, dtype, _ in extent.columns
        }
        return columns, table["check"] == _checks(table, 0)

    def go_on(self, extent: Extent, length: int) -> None:
        """Goes on after the first rows, of which `length` are whole."""
        self._extent, self._length = extent, length
        if not self._writes:
            return
        if self._path.is_dir():
            place = self._path.parent / "torn" / f"{self._path.name}-{time.time_ns()}"
            place.parent.mkdir(exist_ok=True)
            self._path.rename(place)
        with self._open() as file:
            # Rows that the file lacks become zeros, of which the checksum is wrong.
            file.truncate(extent.rows * _row(extent.columns).itemsize)

    def begin(self, columns: Columns) -> None:
        described = [[n, str(c.dtype), [*c.shape[1:]]] for n, c in columns.items()]
        there = self._extent.columns
        if self._extent.rows and there != described:
            listed = lambda names: ", ".join(n.removeprefix(RECORDS) for n in names)
            raise MismatchError(
                f"`checkpoint`: the history in {self._path.parent} has "
                f"{listed(name for name, *_ in there)}, and this fit records "
                f"{listed(columns)}. Give the same `record`, or another directory."
            )
        self._extent = self._extent._replace(columns=described)

    def append(self, columns: Columns) -> Extent:
        new = {name: column[self._length :] for name, column in columns.items()}
        count = len(next(iter(new.values())))
        if count and self._writes:
            rows, described = self._extent
            table = np.zeros(count, _row(described))
            for name, column in new.items():
                table[name] = plain(column)
            table["check"] = _checks(table, rows)
            with self._open() as file:
                # Over what a write that failed may have left behind.
                file.truncate(rows * table.itemsize)
                file.seek(0, os.SEEK_END)
                file.write(table.tobytes())
            self._extent = Extent(rows + count, described)
            self._length += count
        return self._extent

    def _open(self) -> Any:
        return os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def fields_of(described: list[Any]) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    """Returns the columns of a table as fields of a structured dtype."""
    empty = lambda dtype: plain(np.empty(0, jnp.dtype(dtype))).dtype
    return [(name, empty(dtype), tuple(shape)) for name, dtype, shape in described]


def _row(described: list[Any]) -> np.dtype:
    """Returns the dtype of a row: its checksum and the columns, in whole words."""
    fields = [("check", np.dtype(np.uint64), ()), *fields_of(described)]
    length = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in fields)
    return np.dtype([*fields, ("pad", np.dtype(np.uint8), (-length % 8,))])


def _checks(table: np.ndarray, first: int) -> np.ndarray:
    """Returns a checksum of each row, of which the first has the number `first`.

    Each word counts by its place in the row, and the row by its own: another bit, or
    zeros, or a row elsewhere, give another sum.
    """
    words = table.view(np.uint64).reshape(len(table), table.itemsize // 8)[:, 1:]
    weights = np.arange(1, 2 * words.shape[1], 2, dtype=np.uint64) * _MIXER
    numbers = np.arange(first + 1, first + len(table) + 1, dtype=np.uint64)
    return words @ weights + numbers * _MIXER

"""A history on disk, which grows by rows and is never rewritten."""

import json
import math
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._tree import MismatchError
from .history import RECORDS, History, from_columns, to_columns
from .npy import numpy_view

Columns = Mapping[str, np.ndarray]

# An odd number whose bits have no pattern: the golden ratio.
_MIXER = np.uint64(0x9E3779B97F4A7C15)


class Extent(NamedTuple):
    """How much of a table belongs to a checkpoint."""

    rows: int
    columns: list[Any]
    """The name, dtype and shape of each column."""


class HistoryLog:
    """The rows of a history in files that are only appended to.

    A checkpoint says how many rows belong to it: later ones are cut off when a fit
    resumes from there. Each row has a checksum, so that damage costs the damaged rows
    alone.
    """

    def __init__(self, folder: Path, *, writes: bool):
        """Of several processes only one `writes` to the files."""
        names = "history", "validation"
        self._tables = tuple(Table(folder, name, writes) for name in names)

    def read(self, description: Mapping[str, Any]) -> tuple[History, str]:
        """Reads the history of a checkpoint of any format, and says what of it is lost.

        The second value names the lost rows in words; it is `""` for none.
        """
        if description["format"] == 1:
            pairs = zip(self._tables, description["rows"], strict=True)
            read = [table.read_first_format(*extent) for table, extent in pairs]
        else:
            pairs = zip(self._tables, description["log"], strict=True)
            read = [table.read(Extent(*extent)) for table, extent in pairs]
        (recorded, whole), (scored, whole_scores) = read
        lost = [
            _lost("rows", recorded["steps"], whole),
            _lost("validation scores", scored["validation_steps"], whole_scores),
        ]
        recorded = {name: rows[whole] for name, rows in recorded.items()}
        scored = {name: rows[whole_scores] for name, rows in scored.items()}
        return from_columns(recorded | scored), " and ".join(filter(None, lost))

    def resume(self, description: Mapping[str, Any], history: History) -> None:
        """Goes on after the rows that `read` returned, and removes later ones."""
        if description["format"] == 1:
            # The next checkpoint writes all of it in the present format.
            self.clear()
            return
        parts = zip(self._tables, description["log"], _split(history), strict=True)
        for table, extent, columns in parts:
            table.resume(Extent(*extent), len(next(iter(columns.values()))))

    def clear(self) -> None:
        for table in self._tables:
            table.resume(Extent(0, []), 0)

    def require_columns(self, like: History) -> None:
        """Checks that the next rows have the columns of those on disk."""
        for table, columns in zip(self._tables, _split(like), strict=True):
            table.require_columns(columns)

    def append(self, history: History) -> list[Extent]:
        """Adds what is new in a history, and returns the extents for the checkpoint."""
        pairs = zip(self._tables, _split(history), strict=True)
        return [table.append(columns) for table, columns in pairs]


def _split(history: History) -> tuple[Columns, Columns]:
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


class Table:
    """Rows of fixed size in one file, each with a checksum, which are appended."""

    def __init__(self, folder: Path, name: str, writes: bool):
        self._path, self._writes = folder / f"{name}.bin", writes
        self._extent, self._length = Extent(0, []), 0

    def read(self, extent: Extent) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns the first rows by column, and which of them are whole."""
        table = np.zeros(extent.rows, _row(extent.columns))
        try:
            with self._path.open("rb") as file:
                data = np.frombuffer(file.read(table.nbytes), np.uint8)
            table.view(np.uint8)[: len(data)] = data
        except (FileNotFoundError, IsADirectoryError):
            pass
        return _columns(table, extent.columns), table["check"] == _checks(table, 0)

    def read_first_format(
        self, rows: int, checksum: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Does the same where there is one checksum for all rows."""
        columns = json.loads(self._path.with_suffix(".json").read_text())
        row = np.dtype(_fields(columns))
        data = self._path.read_bytes()[: rows * row.itemsize]
        is_whole = zlib.crc32(data) == checksum
        table = np.frombuffer(data, row) if is_whole else np.zeros(rows, row)
        return _columns(table, columns), np.full(rows, is_whole)

    def resume(self, extent: Extent, length: int) -> None:
        """Goes on after the rows of `extent`, of which `length` are whole."""
        self._extent, self._length = extent, length
        if not self._writes:
            return
        if self._path.is_dir():
            place = self._path.parent / "torn" / f"{self._path.name}-{time.time_ns()}"
            place.parent.mkdir(exist_ok=True)
            self._path.rename(place)
        with self._open() as file:
            # Rows that the file lacks become zeros, whose checksum is wrong.
            file.truncate(extent.rows * _row(extent.columns).itemsize)

    def require_columns(self, columns: Columns) -> None:
        """Checks that the next rows have the columns of those before."""
        described = [[n, str(c.dtype), [*c.shape[1:]]] for n, c in columns.items()]
        present = self._extent.columns
        if self._extent.rows and present != described:
            listed = lambda names: ", ".join(n.removeprefix(RECORDS) for n in names)
            raise MismatchError(
                f"`checkpoint`: the history in {self._path.parent} has "
                f"{listed(name for name, *_ in present)}, and this fit records "
                f"{listed(columns)}. Give the same `record`, or another directory."
            )
        self._extent = self._extent._replace(columns=described)

    def append(self, columns: Columns) -> Extent:
        """Adds the new rows, and returns the extent of all."""
        new = {name: column[self._length :] for name, column in columns.items()}
        count = len(next(iter(new.values())))
        if count and self._writes:
            rows, described = self._extent
            table = np.zeros(count, _row(described))
            for name, column in new.items():
                table[name] = numpy_view(column)
            table["check"] = _checks(table, rows)
            with self._open() as file:
                # Overwrites what a failed write may have left behind.
                file.truncate(rows * table.itemsize)
                file.seek(0, os.SEEK_END)
                file.write(table.tobytes())
            self._extent = Extent(rows + count, described)
            self._length += count
        return self._extent

    def _open(self) -> IO[bytes]:
        return os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _columns(table: np.ndarray, described: list[Any]) -> dict[str, np.ndarray]:
    return {n: table[n].copy().view(jnp.dtype(dtype)) for n, dtype, _ in described}


def _fields(described: list[Any]) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    """Returns the columns of a table as fields of a structured dtype."""
    in_file = lambda dtype: numpy_view(np.empty(0, jnp.dtype(dtype))).dtype
    return [(name, in_file(dtype), tuple(shape)) for name, dtype, shape in described]


def _row(described: list[Any]) -> np.dtype:
    """Returns the dtype of a row: its checksum and the columns, in whole words."""
    fields = [("check", np.dtype(np.uint64), ()), *_fields(described)]
    length = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in fields)
    return np.dtype([*fields, ("pad", np.dtype(np.uint8), (-length % 8,))])


def _checks(table: np.ndarray, first: int) -> np.ndarray:
    """Returns a checksum of each row, of which the first has the number `first`.

    Each word is weighted by its place in the row, and the number of the row is added:
    a flipped bit, zeros, or a row in another place change the sum.
    """
    words = table.view(np.uint64).reshape(len(table), table.itemsize // 8)[:, 1:]
    weights = np.arange(1, 2 * words.shape[1], 2, dtype=np.uint64) * _MIXER
    numbers = np.arange(first + 1, first + len(table) + 1, dtype=np.uint64)
    return words @ weights + numbers * _MIXER

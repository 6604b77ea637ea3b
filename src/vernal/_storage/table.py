"""A table on disk: rows of fixed size, each with a checksum, which are appended."""

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
from .history import RECORDS
from .npy import numpy_view

Columns = Mapping[str, np.ndarray]

# An odd number whose bits have no pattern: the golden ratio.
_MIXER = np.uint64(0x9E3779B97F4A7C15)


class Extent(NamedTuple):
    """How much of a table belongs to a checkpoint."""

    rows: int
    columns: list[Any]
    """The name, dtype and shape of each column."""


class Table:
    """Columns of equal length in one file."""

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

"""A history on disk, which grows by rows and is never rewritten."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ._file import plain
from ._history import RECORDS, History
from ._leaves import MismatchError

Columns = Mapping[str, np.ndarray]


class Extent(NamedTuple):
    """How much of a table belongs to a checkpoint, and the checksum of that."""

    rows: int
    crc: int


class HistoryLog:
    """The rows of a history in files that are only appended to.

    A checkpoint says how many rows belong to it: what was written after it is cut off
    when a fit goes on from there.
    """

    def __init__(self, folder: Path, *, writes: bool):
        """**Arguments:**

        - `folder`: where the files are, or will be.
        - `writes`: whether to write to them. Of several processes one does.
        """
        names = "history", "validation"
        self._tables = tuple(_Table(folder, name, writes) for name in names)

    def read(self, extents: list[Any]) -> History | None:
        """Reads the first rows, and forgets the others; `None` if they are not whole.

        **Arguments:**

        - `extents`: what `append` returned.
        """
        pairs = zip(self._tables, extents, strict=True)
        recorded, scored = (table.read(Extent(*extent)) for table, extent in pairs)
        if not recorded or not scored:
            return None
        records = {
            name.removeprefix(RECORDS): rows
            for name, rows in recorded.items()
            if name.startswith(RECORDS)
        }
        return History(recorded["steps"], recorded["loss"], records, **scored)

    def forget(self) -> None:
        """Begins with nothing."""
        for table in self._tables:
            table.forget()

    def begin(self, like: History) -> None:
        """Checks that what is recorded is what there is already, if there is any."""
        for table, columns in zip(self._tables, _columns(like), strict=True):
            table.begin(columns)

    def append(self, history: History) -> list[Extent]:
        """Adds what is new in a history, and returns how much there is now."""
        pairs = zip(self._tables, _columns(history), strict=True)
        return [table.append(columns) for table, columns in pairs]


def _columns(history: History) -> tuple[Columns, Columns]:
    records = {f"{RECORDS}{name}": rows for name, rows in history.records.items()}
    scored = {
        "validation": history.validation,
        "validation_steps": history.validation_steps,
    }
    return {"steps": history.steps, "loss": history.loss} | records, scored


class _Table:
    """Columns of equal length in one file, as records of fixed size."""

    def __init__(self, folder: Path, name: str, writes: bool):
        self._path, self._header = folder / f"{name}.bin", folder / f"{name}.json"
        self._writes, self._extent = writes, Extent(0, 0)
        if writes:
            self._path.touch()

    def _described(self) -> list[Any]:
        """The name, dtype and shape of each column, of which there may be none yet."""
        try:
            columns = json.loads(self._header.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return []
        return [(name, dtype, tuple(shape)) for name, dtype, shape in columns]

    def read(self, extent: Extent) -> dict[str, np.ndarray] | None:
        described = self._described()
        row = _row(described)
        length = extent.rows * row.itemsize
        with self._path.open("r+b" if self._writes else "rb") as file:
            data = file.read(length)
            if len(data) < length or zlib.crc32(data) != extent.crc:
                return None
            if self._writes:
                file.truncate(length)
        self._extent = extent
        table = np.frombuffer(data, row) if described else {}
        return {
            name: table[name].copy().view(jnp.dtype(dtype))
            for name, dtype, _ in described
        }

    def forget(self) -> None:
        if self._writes:
            self.read(Extent(0, 0))

    def begin(self, columns: Columns) -> None:
        described = [(n, str(c.dtype), c.shape[1:]) for n, c in columns.items()]
        there = self._described()
        if there == described:
            return
        if self._extent.rows:
            told = lambda names: ", ".join(n.removeprefix(RECORDS) for n in names)
            raise MismatchError(
                f"`checkpoint`: the history in {self._path.parent} has "
                f"{told(name for name, *_ in there)}, and this fit records "
                f"{told(columns)}. Give the same `record`, or another directory."
            )
        if self._writes:
            new = self._header.with_suffix(".new")
            new.write_text(json.dumps(described))
            new.replace(self._header)

    def append(self, columns: Columns) -> Extent:
        done, length = self._extent.rows, len(next(iter(columns.values())))
        if length > done and self._writes:
            row = _row(self._described())
            table = np.empty(length - done, row)
            for name, column in columns.items():
                table[name] = plain(column[done:])
            data = table.tobytes()
            with self._path.open("r+b") as file:
                # Over what a write that failed may have left behind.
                file.truncate(done * row.itemsize)
                file.seek(0, os.SEEK_END)
                file.write(data)
            self._extent = Extent(length, zlib.crc32(data, self._extent.crc))
        return self._extent


def _row(described: list[Any]) -> np.dtype:
    empty = lambda dtype: plain(np.empty(0, jnp.dtype(dtype)))
    return np.dtype(
        [(name, empty(dtype).dtype, shape) for name, dtype, shape in described]
    )

"""A history on disk, which grows by rows and is never rewritten."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .history import History, from_columns, to_columns
from .table import Columns, Extent, Table


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

"""Histories in checkpoints of the first format, which had one checksum for all rows."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from .history import History, from_columns
from .history_log import fields_of


def read_first_format(
    folder: Path, extents: Sequence[Sequence[int]]
) -> tuple[History, str]:
    """Reads the history of a checkpoint, and says whether it is lost: `""` if not.

    **Arguments:**

    - `folder`: the directory of checkpoints.
    - `extents`: of the history and of the validation scores, the number of rows and
        their checksum.

    **Raises:**

    - `OSError`, `ValueError`: if what describes the columns is lost or damaged.
    """
    (recorded, lost), (scored, lost_scores) = (
        _columns(folder / name, *extent)
        for name, extent in zip(("history", "validation"), extents, strict=True)
    )
    history = from_columns(recorded | scored)
    return history, " and ".join(filter(None, (lost, lost_scores)))


def _columns(path: Path, rows: int, checksum: int) -> tuple[dict[str, np.ndarray], str]:
    described = json.loads(path.with_suffix(".json").read_text())
    row = np.dtype(fields_of(described))
    data = path.with_suffix(".bin").read_bytes()[: rows * row.itemsize]
    lost = ""
    if zlib.crc32(data) != checksum:
        data, lost = b"", f"{rows} of {rows} rows of the {path.name}"
    table = np.frombuffer(data, row)
    columns = {name: table[name].view(jnp.dtype(kind)) for name, kind, _ in described}
    return {name: column.copy() for name, column in columns.items()}, lost

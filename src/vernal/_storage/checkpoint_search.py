"""Finds the newest checkpoint that is whole."""

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._boundary import warn
from .._tree import MismatchError, NamedArray
from .checkpoint_store import CheckpointStore
from .file import DamagedFileError, NewerFormatError
from .history import History
from .history_log import HistoryLog

# Errors in reading that do not mean that the file is damaged.
_NOT_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EIO)


class FoundCheckpoint(NamedTuple):
    """A checkpoint whose state is whole."""

    step: int
    description: Mapping[str, Any]
    arrays: dict[str, NamedArray]
    history: History
    lost: str
    """Names the rows that its history lacks; `""` for none."""


def find_newest_whole(
    store: CheckpointStore,
    log: HistoryLog,
    read_arrays: Callable[[int, Mapping[str, Any]], dict[str, NamedArray]],
    folder: Path,
) -> FoundCheckpoint | None:
    """Returns the newest checkpoint that is whole, and sets later ones aside.

    One whose history lacks rows comes after all that are whole: from those the same
    rows are computed again. `read_arrays` takes a step and its description.
    """
    steps = store.steps()
    found: FoundCheckpoint | None = None
    damage: dict[int, str] = {}
    for step in steps:
        try:
            description = store.read_description(step)
            history, lost = log.read(description)
            if lost and found:
                continue
            arrays = read_arrays(step, description)
        except (MismatchError, NewerFormatError, MemoryError):
            raise
        except Exception as error:  # Damaged bytes may cause any error.
            if isinstance(error, OSError) and error.errno in _NOT_DAMAGE:
                raise
            damage[step] = str(error)
            continue
        if found:
            damage[found.step] = f"its history lacks {found.lost}"
        found = FoundCheckpoint(step, description, arrays, history, lost)
        if not lost:
            break
    if found is None and damage:
        reasons = "; ".join(f"step {n}: {reason}" for n, reason in damage.items())
        raise DamagedFileError(
            f"`checkpoint`: {folder}: none of the {len(steps)} checkpoints is whole "
            f"({reasons}). Give another directory to begin again."
        )
    for step in sorted(damage, reverse=True):
        if found and step > found.step:
            warn(
                f"The checkpoint of step {step} in {folder} is not whole "
                f"({damage[step]}). It is in {store.set_aside(step)} now; the fit goes "
                f"on from that of step {found.step}."
            )
    return found

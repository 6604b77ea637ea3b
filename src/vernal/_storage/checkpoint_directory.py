"""The directory of a fit's checkpoints: it is recognised, and locked by one fit."""

import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import IO, Any

from .atomic import fcntl
from .file import NewerFormatError

FORMAT = 2

_MARKER = "vernal.json"

# The content of a directory of checkpoints. The marker may be lost or damaged.
_NAMES = {_MARKER, "lock", "steps", "history.bin", "validation.bin"}


def claim(folder: Path) -> IO[str]:
    """Makes a directory, and locks it for one fit until the returned file is closed.

    Raises if it cannot be written to, if another fit is writing to it, if it holds
    something else, or if a later version of vernal has written to it.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"`checkpoint`: {folder} is a file, not a directory. Name another."
        )
    with contextlib.ExitStack() as stack:
        try:
            _require_ours(folder)
            # In this order, the directory is recognised wherever the process is killed.
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "lock").open("a"))
            _lock_or_refuse(lock, folder)
            (folder / "steps").mkdir(exist_ok=True)
            _mark(folder / _MARKER)
        except OSError as error:
            raise OSError(
                error.errno,
                f"`checkpoint`: {folder} cannot be written to ({error}). Give another "
                "directory, or remove what is in the way.",
            ) from error
        stack.pop_all()
        return lock


def _require_ours(folder: Path) -> None:
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    written_by = _format(folder / _MARKER)
    # A process that was killed at its beginning leaves a lock and a marker.
    is_ours = written_by is not None or len(names & _NAMES) > 1
    if not is_ours and names - {"lock", _MARKER}:
        raise ValueError(
            f"`checkpoint`: {folder} holds something else than checkpoints. Give "
            "an empty directory, or one that does not exist yet."
        )
    require_known(written_by or FORMAT, folder)


def require_known(written_by: int, folder: Path) -> None:
    """Checks that this version of vernal knows a format."""
    if written_by > FORMAT:
        raise NewerFormatError(
            f"`checkpoint`: {folder} was written by a later version of vernal. Upgrade "
            "it, or give another directory."
        )


def _format(marker: Path) -> int | None:
    """Returns the format that a marker names; `None` if it is lost or damaged."""
    try:
        return unsealed(marker.read_bytes())["format"]
    except (OSError, ValueError):
        return None


def _mark(marker: Path) -> None:
    if _format(marker) is None:
        new = marker.with_suffix(".new")
        new.write_text(sealed({"format": FORMAT}))
        os.replace(new, marker)


def sealed(content: Any) -> str:
    """Returns something as JSON, with a checksum."""
    text = json.dumps(content)
    return json.dumps({"content": text, "crc": zlib.crc32(text.encode())})


def unsealed(text: str | bytes) -> Any:
    """Undoes `sealed`, or raises a `ValueError` if the text is damaged."""
    try:
        seal = json.loads(text)
        content, crc = seal["content"], seal["crc"]
        is_whole = zlib.crc32(content.encode()) == crc
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("its description is damaged") from error
    if not is_whole:
        raise ValueError("the checksum of its description differs")
    return json.loads(content)


def _lock_or_refuse(lock: IO[str], folder: Path) -> None:
    if fcntl is None:  # On Windows two fits in one directory are not noticed.
        return
    try:
        # The kernel unlocks it when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"`checkpoint`: another fit is writing to {folder} now. Wait for it, or "
            "give another directory."
        ) from None
    except OSError:  # Some file systems of networks have no locks.
        return

"""A file that is written whole, or stays as it was."""

import contextlib
import os
import stat
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # On Windows there is no way to know whether a writer lives.
    fcntl = None


@contextlib.contextmanager
def open_to_replace(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a new file, which replaces `path` at the end of the block.

    It keeps the mode and, where that is allowed, the owner of the file before. Of a
    link, the target is replaced.
    """
    target = Path(os.path.realpath(path))
    old = _check_replaceable(target)
    try:
        _remove_abandoned(target)
        file = _temporary(target)
        temporary = Path(file.name)
        try:
            with file:
                if old is not None:
                    _copy_owner_and_mode(temporary, old)
                yield file
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # Windows does not move an open file.
                temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    except OSError as error:
        left = f" {target} is as it was before." if old else ""
        error.add_note(f"`path`: {target} could not be written.{left}")
        raise


def _check_replaceable(target: Path) -> os.stat_result | None:
    """Returns the `stat` of an existing file, `None` if there is none."""
    try:
        old = target.stat()
    except (FileNotFoundError, NotADirectoryError):
        if target.parent.is_dir():
            return None
        raise FileNotFoundError(
            f"`path`: there is no folder {target.parent}. Make it first."
        ) from None
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(f"`path`: {target} is a folder. Name a file in it.")
    if not stat.S_ISREG(old.st_mode):
        raise OSError(
            f"`path`: {target} is not a regular file, but a pipe, a socket or a "
            "device. Name a file."
        )
    # Root may write to any file, and should not to these.
    if not old.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise PermissionError(
            f"`path`: {target} is read-only. Make it writable, or name another file."
        )
    return old


def _prefix(target: Path) -> str:
    # It is short, since the name of the file may be as long as a name can be.
    return f".vernal-{zlib.crc32(os.fsencode(target.name)):08x}-"


def _temporary(target: Path) -> IO[bytes]:
    """Opens a new file, which is locked while its writer lives."""
    while True:
        name = f"{_prefix(target)}{uuid.uuid4().hex}"
        file = target.with_name(name).open("xb")
        if fcntl is None:
            return file
        with contextlib.suppress(OSError):  # Some file systems have no locks.
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # Another writer removed it before it was locked.


def _remove_abandoned(target: Path) -> None:
    """Removes what killed writers of this file have left."""
    if fcntl is None:
        return
    for left in target.parent.glob(f"{_prefix(target)}*"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _copy_owner_and_mode(temporary: Path, old: os.stat_result) -> None:
    new = temporary.stat()
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with contextlib.suppress(OSError, AttributeError):  # Only root may.
            os.chown(temporary, old.st_uid, old.st_gid)
    if stat.S_IMODE(new.st_mode) != stat.S_IMODE(old.st_mode):
        temporary.chmod(stat.S_IMODE(old.st_mode))


def _sync_folder(folder: Path) -> None:
    """Makes the renaming of a file survive a power cut."""
    with contextlib.suppress(OSError):  # Windows does not open folders.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

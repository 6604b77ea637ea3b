"""`Checkpoints`: where and how often a fit writes its state."""

import datetime
import os
import re
from pathlib import Path
from typing import Any, final

from .._boundary import file_path, whole_number


@final
class Checkpoints:
    """Writes the state of a fit to a directory at intervals, in the background.

    ```python
    checkpoints = vn.Checkpoints("runs/first", every=datetime.timedelta(minutes=1))
    result = trainer.fit(data, steps=1_000_000, checkpoint=checkpoints)
    ```

    Run the same program again, after it was killed or has ended, and the fit takes the
    steps that are left: to the same bits as if nothing had happened. Parameters,
    moments, counts, the best, the projector and the history come from the directory;
    the configuration (the model, rates, policies, the key, the data) comes from the
    program. The arrays and numbers that a callback has changed of it, such as a rate,
    come from the directory too, where the program begins with the same values as
    before; a warning names what else it has changed. A directory is for one fit: a
    checkpoint holds checksums of the data, of the methods and own fields of the
    trainer, and of what of the model is not trained, and a fit with others warns.

    Needs `pip install vernal[checkpoint]`, which is
    [Orbax](https://orbax.readthedocs.io).
    """

    directory: Path
    every: int | datetime.timedelta
    keep: int

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every: int | datetime.timedelta = 100,
        keep: int = 3,
    ):
        """**Arguments:**

        - `directory`: a directory that is empty or does not exist yet; or that of an
            earlier run of the same fit. `~` is the home directory. An object store
            (`gs://...`) must be mounted, since the directory is locked, and the
            history is appended to.
        - `every`: a number of steps, or the time between two checkpoints. A checkpoint
            that is due while the last is still being written is left out. The last
            state of a fit is always written.
        - `keep`: how many of the newest checkpoints to keep.

        **Raises:**

        - `ImportError`: if Orbax is not installed.
        - `TypeError`, `ValueError`: if `directory` is not the path of a directory,
            or `every` or `keep` is not positive.
        """
        _require_orbax()
        self.directory = _local(directory)
        if isinstance(every, datetime.timedelta):
            if every <= datetime.timedelta(0):
                raise ValueError(f"`every` is {every}, but must be a time above zero.")
            self.every = every
        elif isinstance(every, str):
            raise TypeError(
                f"`every` is {every!r}, but must be a number of steps or a time, such "
                "as `datetime.timedelta(minutes=1)`."
            )
        else:
            self.every = whole_number(every, "every", least=1)
        self.keep = whole_number(keep, "keep", least=1)

    def __repr__(self) -> str:
        return (
            f"Checkpoints({str(self.directory)!r}, every={self.every!r}, "
            f"keep={self.keep})"
        )


def _local(directory: Any) -> Path:
    """Returns the absolute path of a directory of this machine."""
    file_path(directory, "directory")
    text = os.fspath(directory)
    if not text.strip():
        raise ValueError(f"`directory` is {text!r}, but must name a directory.")
    # `pathlib` makes one slash of two; a single letter is a drive.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(
            f"`directory` is {text!r}: checkpoints go to a directory of a file system, "
            "not to an address. Mount the store, and give the path of the mount."
        )
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(
            f"`directory` is {text!r}, and there is no such home directory. Write the "
            "path in full."
        ) from error


def _require_orbax() -> None:
    try:
        import orbax.checkpoint  # noqa: F401
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("orbax"):
            raise
        raise ImportError(
            "`Checkpoints` needs Orbax: `pip install vernal[checkpoint]`. (`vn.save`, "
            "which writes one file after a fit, does not.)"
        ) from error

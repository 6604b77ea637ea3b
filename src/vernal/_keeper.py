"""A directory of checkpoints while a fit is under way."""

import contextlib
import datetime
import errno
import json
import logging
import math
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._checkpoint import Checkpoints
from ._file import DamagedFileError, NewerFormatError
from ._frames import warn
from ._history import History
from ._leaves import (
    Kind,
    MismatchError,
    NamedArray,
    from_arrays,
    is_part,
    to_arrays,
)
from ._log import HistoryLog
from ._peers import Peers
from ._snapshot import begun, kinds, require_restorable, restore, snapshot
from ._typing import PyTree

_FORMAT = 1
_MARKER = "vernal.json"

# What Orbax reports on, and reports again when it has raised an error.
_TALKERS = ("absl", "asyncio")

# Of errors in reading, those that say nothing of the file.
_NOT_TORN = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EIO)

# What stands before the paths of what is not the trainer's, but the fit's.
_FITS = "fit."

T = TypeVar("T")

# Arrays below this many bytes are written together: each one by itself takes longer to
# describe than to write.
_LARGE = 2**16


class Kept(NamedTuple):
    """What a checkpoint says of a leaf: what it is, and what was written for it."""

    shape: list[int]
    dtype: str
    data_shape: list[int]
    data_dtype: str


class Keeper:
    """Writes a fit's state to a directory that no other fit writes to."""

    def __init__(self, checkpoints: Checkpoints, stop: str, peers: Peers):
        """Claims the directory.

        **Arguments:**

        - `checkpoints`: what the user wants.
        - `stop`: what tells the criterion of the fit from another one, with which
            nothing of what it remembers is restored.
        - `peers`: the processes of the fit. All write their part of a checkpoint; what
            is one file is written by the first alone.
        """
        import orbax.checkpoint as ocp

        self._ocp: Any = ocp
        self.folder, self._every = checkpoints.directory, checkpoints.every
        self._stop, self._peers = stop, peers
        if max(len(peers.numbers), 1) < jax.process_count():
            raise ValueError(
                "`checkpoint`: in a program of several processes all of them write a "
                "checkpoint together. Pass a `mesh` with the devices of all."
            )
        claim = lambda: _claim(self.folder) if peers.is_first else None
        self._lock, _ = peers.together(claim, lambda lock: None, "a directory")
        self._levels = {name: logging.getLogger(name).level for name in _TALKERS}
        for name in _TALKERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._manager: Any = ocp.CheckpointManager(
            self.folder / "steps",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=checkpoints.keep,
                create=False,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )
        self._log = HistoryLog(self.folder, writes=peers.is_first)
        self._last_step, self._last = -1, None
        self._last_time = time.monotonic()
        self.asked_to_end = False

    def __enter__(self) -> "Keeper":
        self._handler: Any = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._ask_to_end)
        return self

    def _ask_to_end(self, *_: Any) -> None:
        self.asked_to_end = True

    def __exit__(self, *exc: Any) -> None:
        """Waits for what is being written, and gives the directory free."""
        try:
            with self._writing():
                self._manager.wait_until_finished()
        finally:
            # What is wrong with it was said by then.
            with contextlib.suppress(Exception):
                self._manager.close()
            if self._lock is not None:
                self._lock.close()
            for name, level in self._levels.items():
                logging.getLogger(name).setLevel(level)
            if self._handler is not None:
                signal.signal(signal.SIGTERM, self._handler)
        if self.asked_to_end:
            # Everything is written: now the process may end, or do what it wants.
            signal.raise_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what to do if a checkpoint cannot be written."""
        try:
            yield
        except Exception as error:
            raise OSError(
                f"{self._source} could not be written to: {error}\nThe checkpoints "
                "before this one are as they were. Make room, and run the program "
                "again: it goes on from the last of them."
            ) from error

    def restore(
        self, trainer: Any, first: int, watched: PyTree
    ) -> tuple[Any, PyTree, History | None]:
        """Puts the newest checkpoint that is whole into a trainer, if there is one.

        **Arguments:**

        - `trainer`: the trainer.
        - `first`: how many steps it has taken.
        - `watched`: what the fit's monitor remembers, as yet nothing.

        **Returns:**

        The trainer, what the monitor remembers, and the history so far, `None` for
        none.
        """
        # Those of the program: a callback may have given others since.
        self._begun = begun(trainer)
        steps = sorted(self._manager.all_steps(), reverse=True)
        torn: dict[int, Any] = {}
        for step in steps:
            try:
                meta, arrays = self._read(step, trainer, watched)
                history = self._log.read(meta["rows"])
            except (MismatchError, MemoryError):
                raise
            except Exception as error:  # Torn bytes may mean anything.
                if isinstance(error, OSError) and error.errno in _NOT_TORN:
                    raise
                meta, arrays, history, reason = {}, {}, None, error
            else:
                reason = "its history is incomplete"
            if history is None:
                torn[step] = reason
                continue
            if step < first:
                raise ValueError(
                    f"`checkpoint`: {self.folder} holds a fit at step {step}, and the "
                    f"trainer is at step {first} already. Give each fit a directory "
                    "of its own."
                )
            for number, reason in torn.items():
                warn(
                    f"The checkpoint of step {number} in {self.folder} is not whole "
                    f"({reason}). It is in {self._put_aside(number)} now; going on "
                    f"from that of step {step}."
                )
            self._last_step = step
            own, fits = _split(arrays)
            if meta["stop"] == self._stop and kinds(fits) == kinds(to_arrays(watched)):
                watched = from_arrays(fits, watched, self._source)
            return restore(own, trainer, self._source), watched, history
        if torn:
            reasons = "; ".join(f"step {n}: {reason}" for n, reason in torn.items())
            raise DamagedFileError(
                f"{self._source}: none of the {len(steps)} checkpoints is whole "
                f"({reasons}). Give another directory to begin anew."
            )
        self._log.forget()
        return trainer, watched, None

    def holds(self, trainer: Any) -> None:
        """Takes note that the newest checkpoint is of this very state."""
        self._last = trainer._progress

    def _put_aside(self, step: int) -> Path:
        """Moves a checkpoint out of the way, rather than to throw it away."""
        place = self.folder / "torn" / f"{step}-{time.time_ns()}"

        def move() -> None:
            if self._peers.is_first:
                place.parent.mkdir(exist_ok=True)
                (self.folder / "steps" / str(step)).rename(place)

        self._peers.together(move, lambda _: None, "a torn checkpoint")
        self._manager.reload()
        return place

    def begin(self, like: History) -> None:
        """Says what is recorded, before the first `write`."""
        self._log.begin(like)

    @property
    def _source(self) -> str:
        return f"`checkpoint`: {self.folder}"

    def _read(
        self, step: int, trainer: Any, watched: PyTree
    ) -> tuple[Any, dict[str, NamedArray]]:
        ocp = self._ocp
        described = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=described)["meta"]
        leaves = {path: Kept(*fields) for path, *fields in meta["leaves"]}
        kept = {path: Kind(tuple(k.shape), k.dtype) for path, k in leaves.items()}
        require_restorable(_split(kept)[0], trainer, self._source)
        own = snapshot(trainer) | _of_the_fit(watched)
        anywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = {
            path: jax.ShapeDtypeStruct(
                leaves[path].data_shape,
                leaves[path].data_dtype,
                # A part of the state that starts anew has no place here.
                sharding=own[path].array.sharding if path in own else anywhere,
            )
            for path in meta["large"]
        }
        small = np.zeros(len(_padded(bytes(meta["bytes"]))), np.uint8)
        wanted = ocp.args.StandardRestore([small, *target.values()])
        small, *large = self._manager.restore(
            step, args=ocp.args.Composite(state=wanted)
        )["state"]
        small = np.asarray(small)[: meta["bytes"]]
        if zlib.crc32(small.tobytes()) != meta["crc"]:
            raise ValueError("the checksum is another")
        arrays, place = dict(zip(target, large, strict=True)), 0
        if [_checksum(array) for array in arrays.values()] != meta["sums"]:
            raise ValueError("the checksum of an array is another")
        for path, leaf in leaves.items():
            if path not in target:
                dtype, shape = jnp.dtype(leaf.data_dtype), leaf.data_shape
                end = place + dtype.itemsize * math.prod(shape)
                arrays[path] = small[place:end].view(dtype).reshape(shape)
                place = end
        return meta, {path: NamedArray(kept[path], arrays[path]) for path in leaves}

    def is_due(self, step: int) -> bool:
        """Whether it is time to write, and the last write is done."""
        if isinstance(self._every, datetime.timedelta):
            since = time.monotonic() - self._last_time
            is_due = since >= self._every.total_seconds()
        else:
            is_due = step // self._every > max(self._last_step, 0) // self._every
        return is_due and not self._manager.is_saving_in_progress()

    def write(self, step: int, trainer: Any, watched: PyTree, history: History) -> None:
        """Writes a checkpoint in the background, unless there is one of this state.

        **Arguments:**

        - `step`: how many steps were taken.
        - `trainer`: the trainer now.
        - `watched`: what the fit's monitor remembers.
        - `history`: the whole history.
        """
        if trainer._progress is self._last:
            return
        with self._writing():
            self._write(step, trainer, watched, history)
        self._last, self._last_step = trainer._progress, step
        self._last_time = time.monotonic()

    def _write(
        self, step: int, trainer: Any, watched: PyTree, history: History
    ) -> None:
        is_back = step <= self._last_step
        if is_back:
            # A callback has gone back to where the fit was before.
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                self._manager.delete(step)
        arrays = snapshot(trainer) | self._begun | _of_the_fit(watched)
        small, large = _apart(arrays)
        add = lambda: self._log.append(history)
        extents, _ = self._peers.together(add, lambda _: None, "a checkpoint")
        meta = {
            "rows": extents,
            "stop": self._stop,
            "leaves": [
                [path, *leaf.kind, leaf.array.shape, str(leaf.array.dtype)]
                for path, leaf in arrays.items()
            ],
            "large": list(large),
            "sums": [_checksum(array) for array in large.values()],
            "bytes": len(small),
            "crc": zlib.crc32(small),
        }
        state = [np.frombuffer(_padded(small), np.uint8), *large.values()]
        ocp = self._ocp
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
            force=True,
        )
        if is_back:
            # Not before there is another to go on from.
            self._manager.wait_until_finished()
            for later in self._manager.all_steps():
                if later > step:
                    self._manager.delete(later)


def _of_the_fit(watched: PyTree) -> dict[str, NamedArray]:
    return {f"{_FITS}{path}": leaf for path, leaf in to_arrays(watched).items()}


def _padded(small: bytes) -> bytes:
    # Orbax writes no array without elements.
    return small or bytes(1)


def _split(paths: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Tells apart what belongs to the trainer, and what to the fit."""
    fits = {p: leaf for p, leaf in paths.items() if p.startswith(_FITS)}
    own = {p: leaf for p, leaf in paths.items() if p not in fits}
    return own, {p.removeprefix(_FITS): leaf for p, leaf in fits.items()}


def _apart(arrays: Mapping[str, NamedArray]) -> tuple[bytes, dict[str, Any]]:
    """Returns the bytes of all small arrays, and the large ones as they are."""
    large = {p: leaf.array for p, leaf in arrays.items() if _is_large(leaf.array)}
    small = [leaf.array for p, leaf in arrays.items() if p not in large]
    return b"".join(np.asarray(x).tobytes() for x in jax.device_get(small)), large


def _is_large(array: Any) -> bool:
    return array.nbytes >= _LARGE or is_part(array)


@jax.jit
def _sum(array: Array) -> Array:
    """Adds up the bits of an array, each word times its place, on its own device."""
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag])
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    word = min(array.dtype.itemsize, 4)
    words = lax.bitcast_convert_type(array, f"uint{8 * word}").ravel()
    places = 2 * lax.iota(jnp.uint32, words.size) + 1
    return jnp.sum(words.astype(jnp.uint32) * places, dtype=jnp.uint32)


def _checksum(array: Any) -> int:
    return int(_sum(array))


def _claim(folder: Path) -> IO[str]:
    """Makes a directory one's own, until the file that is returned is closed."""
    marker = folder / _MARKER
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"`checkpoint`: {folder} is a file, not a directory.")
    try:
        # A lock alone is what a process leaves that was killed in its first moments.
        is_other = folder.exists() and not marker.exists() and _names(folder) - {"lock"}
        if is_other:
            raise ValueError(
                f"`checkpoint`: {folder} holds something else than checkpoints. Give "
                "an empty directory, or one that does not exist yet."
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        error.add_note(f"`checkpoint`: {folder} cannot be written to. Give another.")
        raise
    _lock_or_refuse(lock, folder)
    if not marker.exists():
        marker.write_text(json.dumps({"format": _FORMAT}))
    elif json.loads(marker.read_text() or "{}").get("format", 0) > _FORMAT:
        raise NewerFormatError(
            f"`checkpoint`: {folder} was written by a later version of vernal. Upgrade "
            "it, or give another directory."
        )
    (folder / "steps").mkdir(exist_ok=True)
    return lock


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _lock_or_refuse(lock: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # On Windows two fits in one directory go unnoticed.
        return
    try:
        # The kernel unlocks it when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(
            f"`checkpoint`: another fit is writing to {folder} now. Wait for it, or "
            "give another directory."
        ) from None
    except OSError:  # Some file systems of networks know no locks.
        return

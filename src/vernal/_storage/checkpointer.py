"""Writes checkpoints while a fit is under way, and restores from them."""

import contextlib
import datetime
import errno
import json
import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from .._boundary import PyTree, warn
from .._devices import Peers
from .._step import AbstractTrainer, progress_of
from .._tree import MismatchError, NamedArray, from_arrays, to_arrays
from .checkpoint_directory import claim, require_known
from .checkpoint_format import layout, leaves, pack, sealed, unpack, unsealed
from .checkpoints import Checkpoints
from .file import DamagedFileError, NewerFormatError
from .first_log import read_first_format
from .history import History
from .history_log import HistoryLog
from .origin import differences
from .snapshot import begun, kinds, require_restorable, restore, snapshot

# What Orbax reports on, and reports again when it has raised an error.
_TALKERS = ("absl", "asyncio")

# Errors in reading that do not mean that the file is damaged.
_NOT_TORN = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EIO)

# What stands before the paths of what is not the trainer's, but the fit's.
_FITS = "fit."

T = TypeVar("T")


class _Found(NamedTuple):
    """A checkpoint of which the state is whole."""

    step: int
    meta: Mapping[str, Any]
    arrays: dict[str, NamedArray]
    history: History
    lost: str
    """What its history lacks, in words; `""` for nothing."""


class Keeper:
    """Writes a fit's state to a directory that no other fit writes to."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        stop: str,
        made_of: Mapping[str, Any],
        peers: Peers,
    ):
        """**Arguments:**

        - `checkpoints`: what the user wants.
        - `stop`: what tells the criterion of the fit from another one, with which
            nothing of what it remembers is restored.
        - `made_of`: the class and the data, as `origin` describes them.
        - `peers`: the processes of the fit. All write their part of a checkpoint; what
            is one file is written by the first alone.
        """
        if max(len(peers.numbers), 1) < jax.process_count():
            raise ValueError(
                "`checkpoint`: in a program of several processes all of them write a "
                "checkpoint together. Pass a `mesh` with the devices of all."
            )
        self.folder, self._every = checkpoints.directory, checkpoints.every
        self._keep, self._stop, self._peers = checkpoints.keep, stop, peers
        self._made_of = made_of
        self._last_step, self._last = -1, None
        self._last_time = time.monotonic()
        self.asked_to_end = False

    def __enter__(self) -> "Keeper":
        """Claims the directory."""
        import orbax.checkpoint as ocp

        self._ocp: Any = ocp
        with contextlib.ExitStack() as stack:
            # Everything is written at the end: then the process may end as it was told.
            stack.enter_context(
                _on_sigterm(self._ask_to_end, lambda: self.asked_to_end)
            )
            own = lambda: claim(self.folder) if self._peers.is_first else None
            lock, _ = self._peers.together(own, lambda lock: None, "a directory")
            stack.enter_context(lock or contextlib.nullcontext())
            stack.enter_context(_silent())
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                create=False,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                # To make them in the background, Orbax's threads wait for signals that
                # are numbered in the whole process: those of another fit would do.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            )
            self._manager: Any = ocp.CheckpointManager(
                self.folder / "steps", options=options
            )
            stack.callback(self._close)
            self._log = HistoryLog(self.folder, writes=self._peers.is_first)
            self._exits = stack.pop_all()
        return self

    def _ask_to_end(self, *_: Any) -> None:
        self.asked_to_end = True

    def __exit__(self, *exc: Any) -> None:
        """Waits for what is being written, and releases the directory."""
        self._exits.close()

    def _close(self) -> None:
        try:
            with self._writing():
                self._manager.wait_until_finished()
        finally:
            # What is wrong with it was said by then.
            with contextlib.suppress(Exception):
                self._manager.close()

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
        self, trainer: AbstractTrainer, first: int, watched: PyTree
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
        found = self._find(trainer, watched)
        if found is None:
            self._log.forget()
            return trainer, watched, None
        if found.step < first:
            raise ValueError(
                f"{self._source} holds a fit at step {found.step}, and the trainer is "
                f"at step {first} already. Give each fit a directory of its own."
            )
        if found.lost:
            warn(
                f"The history in {self.folder} is damaged: {found.lost} are lost. The "
                f"state of step {found.step} is whole; going on from it without them."
            )
        self._warn_of_another(found.meta)
        if found.meta["format"] == 1:
            # The next checkpoint writes all of it, as it is written now.
            self._log.forget()
        else:
            self._log.go_on(found.meta["log"], found.history)
        self._last_step = found.step
        own, fits = _split(found.arrays)
        is_same = found.meta["stop"] == self._stop
        if is_same and kinds(fits) == kinds(to_arrays(watched)):
            watched = from_arrays(fits, watched, self._source)
        return restore(own, trainer, self._source), watched, found.history

    def _warn_of_another(self, meta: Mapping[str, Any]) -> None:
        # Checkpoints of earlier versions do not say.
        old = meta.get("made_of") if self._peers.is_first else None
        if odd := list(differences(old, self._made_of)) if old else []:
            warn(
                f"{self._source} was written by a fit {' and '.join(odd)}. The fit "
                "takes up its state and its history, with what this program gives. If "
                "that is not on purpose, give each fit a directory of its own."
            )

    def _find(self, trainer: AbstractTrainer, watched: PyTree) -> _Found | None:
        """Returns the newest checkpoint that is whole, and puts later ones aside.

        One whose history lacks rows comes after all that are whole: from those the same
        rows are made again.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        found: _Found | None = None
        torn: dict[int, str] = {}
        for step in steps:
            try:
                meta = self._described(step)
                history, lost = self._logged(meta)
                if lost and found:
                    continue
                arrays = self._read(step, meta, trainer, watched)
            except (MismatchError, NewerFormatError, MemoryError):
                raise
            except Exception as error:  # Torn bytes may mean anything.
                if isinstance(error, OSError) and error.errno in _NOT_TORN:
                    raise
                torn[step] = str(error)
                continue
            if found:
                torn[found.step] = f"its history lacks {found.lost}"
            found = _Found(step, meta, arrays, history, lost)
            if not lost:
                break
        if found is None and torn:
            reasons = "; ".join(f"step {n}: {reason}" for n, reason in torn.items())
            raise DamagedFileError(
                f"{self._source}: none of the {len(steps)} checkpoints is whole "
                f"({reasons}). Give another directory to begin anew."
            )
        for number in sorted(torn, reverse=True):
            if found and number > found.step:
                warn(
                    f"The checkpoint of step {number} in {self.folder} is not whole "
                    f"({torn[number]}). It is in {self._put_aside(number)} now; going "
                    f"on from that of step {found.step}."
                )
        return found

    def holds(self, trainer: AbstractTrainer) -> None:
        """Takes note that the newest checkpoint is of this very state."""
        self._last = progress_of(trainer)

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

    def _described(self, step: int) -> Mapping[str, Any]:
        described = self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
        kept = self._manager.restore(step, args=described)["meta"]
        if "rows" in kept:
            return kept | {"format": 1}
        meta = unsealed(json.dumps(kept))
        require_known(meta["format"], self.folder)
        return meta

    def _logged(self, meta: Mapping[str, Any]) -> tuple[History, str]:
        if meta["format"] == 1:
            return read_first_format(self.folder, meta["rows"])
        return self._log.read(meta["log"])

    def _read(
        self,
        step: int,
        meta: Mapping[str, Any],
        trainer: AbstractTrainer,
        watched: PyTree,
    ) -> dict[str, NamedArray]:
        written = {path: leaf.kind for path, leaf in leaves(meta).items()}
        require_restorable(_split(written)[0], trainer, self._source)
        own = snapshot(trainer) | _of_the_fit(watched)
        anywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        # A part of the state that starts anew has no place here.
        place = lambda path: own[path].array.sharding if path in own else anywhere
        wanted = self._ocp.args.StandardRestore(layout(meta, place))
        wanted = self._ocp.args.Composite(state=wanted)
        return unpack(meta, self._manager.restore(step, args=wanted)["state"])

    def is_due(self, step: int) -> bool:
        """Whether it is time to write, and the last write is done."""
        if isinstance(self._every, datetime.timedelta):
            since = time.monotonic() - self._last_time
            is_due = since >= self._every.total_seconds()
        else:
            is_due = step // self._every > max(self._last_step, 0) // self._every
        return is_due and not self._manager.is_saving_in_progress()

    def write(
        self, step: int, trainer: AbstractTrainer, watched: PyTree, history: History
    ) -> None:
        """Writes a checkpoint in the background, unless there is one of this state.

        **Arguments:**

        - `step`: how many steps were taken.
        - `trainer`: the trainer now.
        - `watched`: what the fit's monitor remembers.
        - `history`: the whole history.
        """
        if progress_of(trainer) is self._last:
            return
        with self._writing():
            self._write(step, trainer, watched, history)
        self._last, self._last_step = progress_of(trainer), step
        self._last_time = time.monotonic()

    def _write(
        self, step: int, trainer: AbstractTrainer, watched: PyTree, history: History
    ) -> None:
        is_back = step <= self._last_step
        if is_back:
            # A callback has gone back to where the fit was before.
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                self._manager.delete(step)
        arrays = snapshot(trainer) | self._begun | _of_the_fit(watched)
        description, state = pack(arrays)
        add = lambda: self._log.append(history)
        extents, _ = self._peers.together(add, lambda _: None, "a checkpoint")
        fit = {"log": extents, "stop": self._stop, "made_of": self._made_of}
        meta = sealed(fit | description)
        ocp = self._ocp
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                meta=ocp.args.JsonSave(json.loads(meta)),
            ),
            force=True,
        )
        if is_back:
            # Not before there is another to go on from.
            self._manager.wait_until_finished()
            for later in self._manager.all_steps():
                if later > step:
                    self._manager.delete(later)


@contextlib.contextmanager
def _on_sigterm(ask: Any, was_asked: Any) -> Iterator[None]:
    """Has SIGTERM asked for, rather than obeyed, until the end of a fit."""
    is_main = threading.current_thread() is threading.main_thread()
    # A handler that Python does not know of could not be put back.
    before = signal.getsignal(signal.SIGTERM) if is_main else None
    if before is None:
        yield
        return
    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if was_asked():
            signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drops what Orbax logs.

    With a filter of its own: levels would be those of all fits in the process.
    """

    def is_other(record: logging.LogRecord) -> bool:
        # `asyncio` reports a task that was given up, with the path of its code.
        text = str(record.msg) if record.name == "asyncio" else record.pathname
        return "orbax" not in text

    loggers = [logging.getLogger(name) for name in _TALKERS]
    for logger in loggers:
        logger.addFilter(is_other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_other)


def _of_the_fit(watched: PyTree) -> dict[str, NamedArray]:
    return {f"{_FITS}{path}": leaf for path, leaf in to_arrays(watched).items()}


def _split(paths: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Tells apart what belongs to the trainer, and what to the fit."""
    fits = {p: leaf for p, leaf in paths.items() if p.startswith(_FITS)}
    own = {p: leaf for p, leaf in paths.items() if p not in fits}
    return own, {p.removeprefix(_FITS): leaf for p, leaf in fits.items()}

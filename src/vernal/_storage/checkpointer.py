"""Writes checkpoints while a fit is under way, and restores from them."""

import contextlib
import datetime
import errno
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from .._boundary import PyTree, warn
from .._devices import Peers
from .._step import AbstractTrainer, TrainerT, progress_of
from .._tree import MismatchError, NamedArray, from_arrays, to_arrays
from .changed_config import Beginning
from .checkpoint_directory import claim
from .checkpoint_store import CheckpointStore, leaves, silenced_orbax
from .checkpoints import Checkpoints
from .file import DamagedFileError, NewerFormatError
from .history import History
from .history_log import HistoryLog
from .origin import differences
from .positions import as_meaning, in_place, meaning_of
from .sigterm import deferred_sigterm
from .snapshot import (
    beneath,
    initial_hyperparams,
    kinds,
    require_restorable,
    restore,
    snapshot,
    without,
)

# The name before the paths of what belongs to the fit, and not to the trainer.
_FIT = "fit"

# The name before the paths of what a callback has changed of the configuration.
_CONFIG = "config"

# Errors in reading that do not mean that the file is damaged.
_NOT_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EIO)


@contextlib.contextmanager
def open_checkpointer(
    checkpoints: Checkpoints, stop: str, made_of: Mapping[str, Any], peers: Peers
) -> Iterator["Checkpointer"]:
    """Claims a directory, and releases it when everything is written.

    `stop` is the fingerprint of the fit's stop criterion, `made_of` what `origin`
    returns of its class and its data.
    """
    if max(len(peers.numbers), 1) < jax.process_count():
        raise ValueError(
            "`checkpoint`: in a program of several processes all of them write a "
            "checkpoint together. Pass a `mesh` with the devices of all."
        )
    folder = checkpoints.directory
    own = lambda: claim(folder) if peers.is_first else None
    with contextlib.ExitStack() as stack:
        # It ends the process at the end, when everything is written.
        is_terminating = stack.enter_context(deferred_sigterm())
        stack.enter_context(peers.run(own, "a directory") or contextlib.nullcontext())
        stack.enter_context(silenced_orbax())
        identity = {"stop": stop, "made_of": made_of}
        checkpointer = Checkpointer(checkpoints, identity, peers, is_terminating)
        stack.callback(checkpointer.close)
        yield checkpointer


class Checkpointer:
    """Writes the state of a fit to a directory, and restores it."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        identity: Mapping[str, Any],
        peers: Peers,
        is_terminating: Callable[[], bool],
    ):
        """`identity` has `stop` and `made_of`, as `open_checkpointer` takes them.

        `is_terminating` says whether SIGTERM was received, so that the fit is to end.
        """
        self._folder, self._identity = checkpoints.directory, identity
        self._peers, self.is_terminating = peers, is_terminating
        self._store = CheckpointStore(self._folder, checkpoints.keep, peers)
        self._log = HistoryLog(self._folder, writes=peers.is_first)
        self._every = checkpoints.every
        self._last_step, self._last_time = 0, time.monotonic()
        self._initial: dict[str, NamedArray] = {}
        """The hyperparameters that the program begins with."""
        self._beginning: Beginning | None = None
        """The configuration that the program begins with."""
        self._written = None
        """The progress that the newest checkpoint holds."""

    def is_due(self, step: int) -> bool:
        """Whether it is time to write, and the last write is done."""
        every = self._every
        if isinstance(every, datetime.timedelta):
            is_time = time.monotonic() - self._last_time >= every.total_seconds()
        else:
            is_time = step // every > self._last_step // every
        return is_time and not self._store.is_writing

    def close(self) -> None:
        """Waits for what is being written."""
        with self._explained():
            self._store.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what to do if a checkpoint cannot be written."""
        try:
            yield
        except Exception as error:
            raise OSError(
                f"{self._source} could not be written to: {error}\nThe checkpoints "
                "before this one are as they were. Make room, and run the program "
                "again: it goes on from the last of them."
            ) from error

    @property
    def _source(self) -> str:
        return f"`checkpoint`: {self._folder}"

    def restore(
        self,
        trainer: AbstractTrainer,
        known: TrainerT,
        first: int,
        monitor_state: PyTree,
    ) -> tuple[Any, TrainerT, PyTree, History | None]:
        """Puts the newest checkpoint that is whole into a trainer, if there is one.

        `known` is the trainer as the user knows it, which is returned with the
        configuration of the checkpoint. `first` is how many steps the trainer has
        taken. The history is `None` if there is no checkpoint.
        """
        # A callback may set others later.
        self._initial = initial_hyperparams(trainer)
        self._beginning = beginning = Beginning(known)
        own = {_FIT: monitor_state}
        expected = snapshot(trainer) | to_arrays(own)
        expected |= _under_config(beginning.arrays)
        found = self._newest_whole(trainer, expected)
        if found is None:
            self._log.clear()
            return trainer, known, monitor_state, None
        if found.step < first:
            raise ValueError(
                f"{self._source} holds a fit at step {found.step}, and the trainer is "
                f"at step {first} already. Give each fit its own directory."
            )
        if found.lost:
            warn(
                f"The history in {self._folder} is damaged: {found.lost} are lost. The "
                f"state of step {found.step} is whole; the fit goes on from it without "
                "them."
            )
        if self._peers.is_first:
            self._warn_of_others(found.description)
        self._log.resume(found.description, found.history)
        self._last_step = found.step
        written = beneath(found.arrays, _FIT)
        is_same = found.description["stop"] == self._identity["stop"]
        if is_same and kinds(written) == kinds(to_arrays(own)):
            monitor_state = from_arrays(written, own, self._source)[_FIT]
        state = without(found.arrays, _FIT, _CONFIG)
        meaning = as_meaning(found.description)
        state = in_place(state, trainer, meaning, self._source)
        restored = restore(state, trainer, self._source)
        now = beneath(found.arrays, _CONFIG)
        now = {path.removeprefix(f"{_CONFIG}."): leaf for path, leaf in now.items()}
        if (odd := [*beneath(now, "optimiser")]) and meaning.is_elsewhere(trainer):
            raise MismatchError(
                f"{self._source}: a callback had changed {odd[0]!r}, and the rules of "
                "the optimiser have another order now, by which that is another "
                "rule's. Give them the order that they had."
            )
        changes = now, found.description.get("before", {}), self._source
        restored, known = (beginning.applied(x, *changes) for x in (restored, known))
        return restored, known, monitor_state, found.history

    def _newest_whole(
        self, trainer: AbstractTrainer, expected: Mapping[str, NamedArray]
    ) -> "_Found | None":
        """Returns the newest checkpoint that is whole, and sets later ones aside.

        One whose history lacks rows comes after all that are whole: from those the same
        rows are computed again.
        """
        steps = self._store.steps()
        found: _Found | None = None
        damage: dict[int, str] = {}
        for step in steps:
            try:
                description = self._store.read_description(step)
                history, lost = self._log.read(description)
                if lost and found:
                    continue
                arrays = self._read_arrays(step, description, trainer, expected)
            except (MismatchError, NewerFormatError, MemoryError):
                raise
            except Exception as error:  # Damaged bytes may cause any error.
                if isinstance(error, OSError) and error.errno in _NOT_DAMAGE:
                    raise
                damage[step] = str(error)
                continue
            if found:
                damage[found.step] = f"its history lacks {found.lost}"
            found = _Found(step, description, arrays, history, lost)
            if not lost:
                break
        if found is None and damage:
            reasons = "; ".join(f"step {n}: {reason}" for n, reason in damage.items())
            raise DamagedFileError(
                f"{self._source}: none of the {len(steps)} checkpoints is whole "
                f"({reasons}). Give another directory to begin again."
            )
        for step in sorted(damage, reverse=True):
            if found and step > found.step:
                warn(
                    f"The checkpoint of step {step} in {self._folder} is not whole "
                    f"({damage[step]}). It is in {self._store.set_aside(step)} now; "
                    f"the fit goes on from that of step {found.step}."
                )
        return found

    def _read_arrays(
        self,
        step: int,
        description: Mapping[str, Any],
        trainer: AbstractTrainer,
        expected: Mapping[str, NamedArray],
    ) -> dict[str, NamedArray]:
        written = {path: leaf.kind for path, leaf in leaves(description).items()}
        state, meaning = without(written, _FIT, _CONFIG), as_meaning(description)
        names = in_place({p: p for p in state}, trainer, meaning, self._source)
        state = {path: state[name] for path, name in names.items()}
        require_restorable(state, trainer, self._source, meaning=meaning)
        # Leaves that are not restored, or are NumPy's, may lie anywhere.
        anywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        own = {p: getattr(x.array, "sharding", anywhere) for p, x in expected.items()}
        own |= {name: own.get(path, anywhere) for path, name in names.items()}
        sharding = lambda path: own.get(path, anywhere)
        return self._store.read_arrays(step, description, sharding)

    def _warn_of_others(self, description: Mapping[str, Any]) -> None:
        """Warns if a checkpoint is of another fit, or lacks what a callback changed."""
        # Checkpoints of earlier versions do not say.
        old = description.get("made_of")
        if odd := list(differences(old, self._identity["made_of"])) if old else []:
            warn(
                f"{self._source} was written by a fit {' and '.join(odd)}. This fit "
                "takes over its state and its history, with what this program gives. "
                "If that is not on purpose, give each fit its own directory."
            )
        if lost := description.get("lost"):
            warn(
                f"{self._source}: a callback had changed {', '.join(map(repr, lost))} "
                "of the trainer, which a checkpoint cannot hold. This fit goes on with "
                "what the program gives. Keep what changes in arrays and numbers, or "
                "let the callback change it at each call."
            )

    def require_columns(self, like: History) -> None:
        """Checks that what is recorded fits the history on disk, before a `write`."""
        self._log.require_columns(like)

    def mark_as_written(self, trainer: AbstractTrainer) -> None:
        """Notes that the newest checkpoint holds this trainer."""
        self._written = progress_of(trainer)

    def write(
        self,
        step: int,
        trainer: AbstractTrainer,
        monitor_state: PyTree,
        history: History,
    ) -> None:
        """Writes a checkpoint in the background, unless there is one of this state."""
        if progress_of(trainer) is self._written:
            return
        with self._explained():
            arrays = snapshot(trainer) | self._initial
            arrays |= to_arrays({_FIT: monitor_state})
            extra = {**self._identity, **meaning_of(trainer)._asdict()}
            if self._beginning is not None:
                now, before, lost = self._beginning.changes(trainer)
                arrays |= _under_config(now)
                extra |= {"before": before, "lost": lost}
            add = lambda: self._log.append(history)
            extra["log"] = self._peers.run(add, "a checkpoint")
            self._store.write(step, arrays, extra)
        self.mark_as_written(trainer)
        self._last_step, self._last_time = step, time.monotonic()


def _under_config(leaves: Mapping[str, NamedArray]) -> dict[str, NamedArray]:
    return {f"{_CONFIG}.{path}": leaf for path, leaf in leaves.items()}


class _Found(NamedTuple):
    """A checkpoint whose state is whole."""

    step: int
    description: Mapping[str, Any]
    arrays: dict[str, NamedArray]
    history: History
    lost: str
    """Names the rows that its history lacks; `""` for none."""

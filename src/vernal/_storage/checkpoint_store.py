"""Checkpoints on disk, written and read by Orbax."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._devices import Peers
from .._tree import NamedArray
from .checkpoint_directory import require_known
from .checkpoint_format import layout, pack, sealed, unpack, unsealed

# These loggers report what Orbax raises as an error too.
_LOGGERS = ("absl", "asyncio")


class CheckpointStore:
    """The checkpoints in a directory, each under the number of its step."""

    def __init__(self, folder: Path, keep: int, peers: Peers):
        """`keep` is how many checkpoints to keep; each process writes its part."""
        import orbax.checkpoint as ocp

        self._ocp: Any = ocp
        self._folder, self._peers = folder, peers
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # To make them in the background, Orbax's threads wait for signals that are
            # numbered in the whole process: those of another fit would do.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager: Any = ocp.CheckpointManager(folder / "steps", options=options)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def read_description(self, step: int) -> Mapping[str, Any]:
        """Returns what `write` described, and the number of the format."""
        wanted = self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
        written = self._manager.restore(step, args=wanted)["meta"]
        if "rows" in written:
            return written | {"format": 1}
        description = unsealed(json.dumps(written))
        require_known(description["format"], self._folder)
        return description

    def read_arrays(
        self, step: int, description: Mapping[str, Any], sharding: Callable[[str], Any]
    ) -> dict[str, NamedArray]:
        """Returns the arrays of a checkpoint, each with the sharding for its path."""
        args = self._ocp.args
        wanted = args.StandardRestore(layout(description, sharding))
        wanted = args.Composite(state=wanted)
        return unpack(description, self._manager.restore(step, args=wanted)["state"])

    def write(
        self, step: int, arrays: Mapping[str, NamedArray], extra: Mapping[str, Any]
    ) -> None:
        """Writes a checkpoint in the background, and removes those of later steps.

        `extra` is added to the description of the arrays, for JSON.
        """
        latest = self._manager.latest_step()
        goes_back = latest is not None and step <= latest
        if goes_back:
            self.wait()
            if step in self._manager.all_steps():
                self._manager.delete(step)
        description, state = pack(arrays)
        meta = json.loads(sealed({**extra, **description}))
        args = self._ocp.args
        items = {"state": args.StandardSave(state), "meta": args.JsonSave(meta)}
        self._manager.save(step, args=args.Composite(**items), force=True)
        if goes_back:
            # The later ones go only when there is another to resume from.
            self.wait()
            for later in self._manager.all_steps():
                if later > step:
                    self._manager.delete(later)

    @property
    def is_writing(self) -> bool:
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits for what is being written, and raises what went wrong with it."""
        self._manager.wait_until_finished()

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way, and returns where it is."""
        place = self._folder / "torn" / f"{step}-{time.time_ns()}"

        def move() -> None:
            if self._peers.is_first:
                place.parent.mkdir(exist_ok=True)
                (self._folder / "steps" / str(step)).rename(place)

        self._peers.run(move, "a torn checkpoint")
        self._manager.reload()
        return place

    def close(self) -> None:
        """Waits for what is being written, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            # `wait` has raised what `close` could raise.
            with contextlib.suppress(Exception):
                self._manager.close()


@contextlib.contextmanager
def silenced_orbax() -> Iterator[None]:
    """Drops what Orbax logs.

    It does so with a filter: a level would hold for all fits of the process.
    """

    def is_of_another(record: logging.LogRecord) -> bool:
        # `asyncio` reports a task that was cancelled, with the path of its code.
        text = str(record.msg) if record.name == "asyncio" else record.pathname
        return "orbax" not in text

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(is_of_another)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_of_another)

"""Checkpoints on disk: arrays, and a description with checksums, by Orbax."""

import contextlib
import json
import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._devices import Peers
from .._tree import Kind, NamedArray, is_part, weighted_sum, words
from .checkpoint_directory import FORMAT, require_known, sealed, unsealed
from .npy import is_extended

# Arrays of fewer bytes are written together: Orbax takes longer to describe one than to
# write it.
_LARGE = 2**16

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


class Leaf(NamedTuple):
    """A leaf, and the array that was written for it."""

    shape: list[int]
    dtype: str
    data_shape: list[int]
    data_dtype: str

    @property
    def kind(self) -> Kind:
        return Kind(tuple(self.shape), self.dtype)


def pack(arrays: Mapping[str, NamedArray]) -> tuple[dict[str, Any], list[Any]]:
    """Returns a description of arrays, and what to write: few arrays."""
    large = {p: leaf.array for p, leaf in arrays.items() if _is_large(leaf.array)}
    others = [leaf.array for path, leaf in arrays.items() if path not in large]
    small = b"".join(np.asarray(x).tobytes() for x in jax.device_get(others))
    description = {
        "format": FORMAT,
        "leaves": [
            [path, *leaf.kind, leaf.array.shape, str(leaf.array.dtype)]
            for path, leaf in arrays.items()
        ],
        "large": list(large),
        "sums": [_checksum(array) for array in large.values()],
        "bytes": len(small),
        "crc": zlib.crc32(small),
    }
    # Orbax does not write an array without elements.
    padded = np.frombuffer(small or bytes(1), np.uint8)
    return description, [padded, *large.values()]


def leaves(description: Mapping[str, Any]) -> dict[str, Leaf]:
    return {path: Leaf(*fields) for path, *fields in description["leaves"]}


def layout(
    description: Mapping[str, Any], sharding: Callable[[str], Any]
) -> list[np.ndarray | jax.ShapeDtypeStruct]:
    """Returns the shapes of the arrays that were written, each with its sharding."""
    written = leaves(description)
    large = [
        jax.ShapeDtypeStruct(leaf.data_shape, leaf.data_dtype, sharding=sharding(path))
        for path, leaf in ((path, written[path]) for path in description["large"])
    ]
    return [np.zeros(max(description["bytes"], 1), np.uint8), *large]


def unpack(description: Mapping[str, Any], written: list[Any]) -> dict[str, NamedArray]:
    """Undoes `pack`, or raises a `ValueError` if a checksum differs."""
    padded, *large = written
    small = np.asarray(padded)[: description["bytes"]]
    if zlib.crc32(small.tobytes()) != description["crc"]:
        raise ValueError("the checksum differs")
    if [_checksum(array) for array in large] != description["sums"]:
        raise ValueError("the checksum of an array differs")
    arrays, start = dict(zip(description["large"], large, strict=True)), 0
    named = {}
    for path, leaf in leaves(description).items():
        if path not in arrays:
            dtype, shape = jnp.dtype(leaf.data_dtype), leaf.data_shape
            end = start + dtype.itemsize * math.prod(shape)
            arrays[path] = small[start:end].view(dtype).reshape(shape)
            start = end
        named[path] = NamedArray(leaf.kind, arrays[path])
    return named


def _is_large(array: Any) -> bool:
    # Orbax does not write all dtypes of one byte or less that NumPy lacks.
    is_odd = is_extended(array.dtype) and array.dtype.itemsize == 1
    return is_part(array) or (array.nbytes >= _LARGE and not is_odd)


@jax.jit
def _weighted_sum(array: Array) -> Array:
    return weighted_sum(words(array))


def _checksum(array: Any) -> int:
    return int(_weighted_sum(array))

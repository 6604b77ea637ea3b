"""What a fit is fed with, and how much at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import spelled_leaves, warn
from .._data import Minibatches, Source, Stream, Whole
from .._devices import Peers
from .._tree import to_arrays

# How long a chunk should take: short enough for a progress bar and for Ctrl-C, long
# enough that what happens between two of them costs nothing.
_CHUNK_SECONDS = 0.5
_FASTEST_GROWTH = 100


# How many values a stream may have for what is static in its batches.
_MOST_STATIC = 3

# What there is after the last batch.
_DRY = "the stream ran dry"


class Dry(Exception):
    """A stream has no further batch."""


class Feed:
    """What a fit is fed with: one source for a whole chunk, or one for each step."""

    def __init__(
        self,
        source: Source,
        step: int,
        prepare: Callable[[Any], Any],
        peers: Peers,
    ):
        """**Arguments:**

        - `source`: where batches come from.
        - `step`: the step to begin with.
        - `prepare`: what is done to a batch of a stream before it is used.
        - `peers`: who reads from a stream each time that this process does.
        """
        self.source, self._peers = source, peers
        self._prepare = prepare
        self._ahead: list[Any] = []
        self._static = _Static()
        if isinstance(source, Stream):
            self._iterator = source.open(step)

    @property
    def is_stream(self) -> bool:
        return isinstance(self.source, Stream)

    def _read(self) -> Any:
        if self._ahead:
            return self._ahead.pop()
        batch, told = self._peers.together(self._next, self._told, "a batch")
        if _DRY in told:
            raise Dry
        if odd := [shapes for shapes in told if shapes != told[0]]:
            raise ValueError(
                "`data`: all processes must give equally large shares of a batch, but "
                f"one gives {told[0]} and another {odd[0]}."
            )
        return batch

    def _next(self) -> Any:
        batch = next(self._iterator, _DRY)
        if batch is _DRY:
            return _DRY
        batch = self._prepare(batch)
        self._static.look(batch)
        return batch

    def _told(self, batch: Any) -> str:
        if batch is _DRY or not self._peers.are_many:
            return _DRY if batch is _DRY else ""
        return ", ".join(str(leaf.kind) for leaf in to_arrays(batch).values())

    def peek(self) -> Any:
        """Returns a batch, or its shapes, without using it up."""
        source = self.source
        if not isinstance(source, Stream):
            zero = jnp.asarray(np.int32(0))
            return eqx.filter_eval_shape(source.next, source.start(zero), zero)[0]
        if not self._ahead:
            self._ahead.append(self._read())
        return self._ahead[-1]

    def sources(self, count: int) -> Iterator[tuple[Whole[Any] | Minibatches, int]]:
        """Yields sources, and the number of steps to take from each."""
        if not isinstance(self.source, Stream):
            yield self.source, count
            return
        for _ in range(count):
            yield Whole(self._read()), 1


class _Static:
    """What is no array in the batches of a stream, of which each value compiles."""

    def __init__(self) -> None:
        self._seen: list[dict[str, Any]] = []

    def look(self, batch: Any) -> None:
        """Warns, once, if it has been changing from batch to batch."""
        is_array = lambda leaf: isinstance(leaf, jax.Array)
        if len(self._seen) > _MOST_STATIC or all(map(is_array, jax.tree.leaves(batch))):
            return
        leaves = spelled_leaves("batch", batch)
        static = {where: leaf for where, leaf in leaves if not is_array(leaf)}
        if static in self._seen:
            return
        self._seen.append(static)
        if len(self._seen) <= _MOST_STATIC:
            return
        last = self._seen[-2]
        both = [path for path in static if path in last and last[path] != static[path]]
        changes = [f"{p} (from {last[p]!r} to {static[p]!r})" for p in both[:4]]
        if changes:
            warn(
                f"`data`: the batches of the stream change in {', '.join(changes)}, "
                "which is static: each new value is compiled anew. Make it an array, "
                "`numpy.asarray(...)`, or leave it out."
            )


class Pace:
    """How many steps to take at once."""

    def __init__(self, chunk: int | None):
        self._fixed = chunk is not None
        # One step to begin with: it may be a slow one, and it has to be compiled.
        self.count = chunk or 1

    def measured(self, count: int, seconds: float) -> None:
        """Learns from a chunk how many steps the next should have."""
        if not self._fixed and count > 0:
            growth = _CHUNK_SECONDS / max(seconds, 1e-6)
            self.count = max(1, int(count * min(growth, _FASTEST_GROWTH)))

"""The batches of a fit."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from .._boundary import spelled_leaves, warn
from .._data import Minibatches, Source, Stream, Whole, batch_shapes
from .._devices import Peers
from .._tree import to_arrays

# How many values static leaves in the batches of a stream may have without a warning.
_MAX_STATIC_VALUES = 3

# Stands for the batch after the last one.
_EXHAUSTED = "exhausted"


class DataExhausted(Exception):
    """A stream has no further batch."""


class Feed:
    """The batches of a fit: one source for a whole chunk, or a batch for each step."""

    def __init__(
        self, source: Source, step: int, prepare: Callable[[Any], Any], peers: Peers
    ):
        """`step` is the first one; `prepare` is applied to each batch of a stream."""
        self.source, self._prepare, self._peers = source, prepare, peers
        self._next_batch: list[Any] = []
        self._static_values: list[dict[str, Any]] = []
        if isinstance(source, Stream):
            self._iterator = source.open(step)
            # A function of the step begins anew.
            self._unused = [] if source.can_resume else source.unused

    def peek(self) -> Any:
        """Returns the next batch, or its shapes, without using it up."""
        source = self.source
        if not isinstance(source, Stream):
            return batch_shapes(source, jax.device_put(np.int32(0)))
        if not self._next_batch:
            self._next_batch.append(self._read())
        return self._next_batch[0]

    def sources(self, count: int) -> Iterator[tuple[Whole[Any] | Minibatches, int]]:
        """Yields sources, and the number of steps to take from each."""
        if not isinstance(self.source, Stream):
            yield self.source, count
            return
        for _ in range(count):
            batch = self._next_batch.pop() if self._next_batch else self._read()
            self._unused.clear()
            yield Whole(batch), 1

    def _read(self) -> Any:
        batch, shares = self._peers.run_and_gather(
            self._read_own, self._summary, "a batch"
        )
        if _EXHAUSTED in shares:
            raise DataExhausted
        if odd := [share for share in shares if share != shares[0]]:
            raise ValueError(
                "`data`: all processes must give equally large shares of a batch, but "
                f"one gives {shares[0]} and another {odd[0]}."
            )
        return batch

    def _read_own(self) -> Any:
        if not self._unused:
            own = next(self._iterator, _EXHAUSTED)
            if own is _EXHAUSTED:
                return _EXHAUSTED
            self._unused.append(own)
        batch = self._prepare(self._unused[0])
        self._warn_of_static_values(batch)
        return batch

    def _summary(self, batch: Any) -> str:
        """Returns the shapes in a batch, where other processes must have the same."""
        if batch is _EXHAUSTED or not self._peers.are_many:
            return _EXHAUSTED if batch is _EXHAUSTED else ""
        return ", ".join(str(leaf.kind) for leaf in to_arrays(batch).values())

    def _warn_of_static_values(self, batch: Any) -> None:
        """Warns, once, if static leaves change from batch to batch."""
        seen, is_array = self._static_values, lambda leaf: isinstance(leaf, jax.Array)
        if len(seen) > _MAX_STATIC_VALUES:
            return
        if all(map(is_array, jax.tree.leaves(batch))):
            return
        leaves = spelled_leaves("batch", batch)
        static = {where: leaf for where, leaf in leaves if not is_array(leaf)}
        if static in seen:
            return
        seen.append(static)
        if len(seen) <= _MAX_STATIC_VALUES:
            return
        last = seen[-2]
        both = [path for path in static if path in last and last[path] != static[path]]
        changes = [f"{p} (from {last[p]!r} to {static[p]!r})" for p in both[:4]]
        if changes:
            warn(
                f"`data`: the batches of the stream change in {', '.join(changes)}, "
                "which is static: each new value is compiled again. Make it an array, "
                "`numpy.asarray(...)`, or leave it out."
            )

"""Which data a best was scored on: losses of other data do not compare."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from .._boundary import PyTree
from .._data import Minibatches, Source, Stream
from .._program import chosen
from .._tree import checksum, checksums, is_part, to_arrays
from .progress import UNKNOWN_DATA, Best, Progress, held_best

ONE_BATCH_AT_A_TIME = 1
"""The mark of batches that Python hands over one by one: these compare."""

# Of arrays with more bytes only a sample is looked at, which takes a few milliseconds.
_MAX_BYTES = 2**24


def data_mark(source: Source, fields: Mapping[str, Any]) -> int:
    """Returns a number for all that the losses of a fit depend on beside the model.

    This is the source of its batches, and the fields that a class adds to a trainer.
    """
    seen = in_source(source), fields
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(seen))
    if isinstance(source, Stream) or is_traced:
        return ONE_BATCH_AT_A_TIME
    return _mark(checksums(seen, _MAX_BYTES))


def in_source(source: Source) -> Any:
    """Returns what the batches of a source are made of, `None` for a stream."""
    if isinstance(source, Stream):
        return None
    if isinstance(source, Minibatches):
        return {"minibatches of": source.arrays, "size": source.size}
    return source.batch


def marks_of_rows(rows: PyTree, shared: PyTree, members: int) -> list[int]:
    """Returns the mark of each of many members, each of which has a row.

    `rows` and `shared` are pairs as `data_mark` makes of a source and its fields, with
    `None` for all that the other one has.
    """
    common, own = checksums(shared, _MAX_BYTES), to_arrays(rows)
    if not own:
        return [_mark(common)] * members
    kinds = {p: str(x.kind._replace(shape=x.kind.shape[1:])) for p, x in own.items()}
    sums = {path: _sums_of_rows(leaf.array) for path, leaf in own.items()}
    of_member = lambda i: {path: [kinds[path], sums[path][i]] for path in own}
    return [_mark(common | of_member(i)) for i in range(members)]


def _sums_of_rows(array: Array) -> list[int | None]:
    if is_part(array):
        return [None] * len(array)
    return [checksum(row, _MAX_BYTES) for row in np.asarray(array)]


def _mark(sums: Mapping[str, Any]) -> int:
    found = zlib.crc32(repr(sorted(sums.items())).encode())
    return max(found, ONE_BATCH_AT_A_TIME + 1)


def begun_on(
    progress: Progress,
    marks: np.ndarray,
    by_validation: bool,
    on_host: Callable[[Array], np.ndarray],
) -> Progress:
    """Returns the progress for a fit that scores on data with these marks.

    A best of other data, or that was scored otherwise, is dropped.
    """
    known, validated = map(on_host, (progress.scored_on, progress.is_validated))
    is_other = (known != UNKNOWN_DATA) & (known != marks) | (validated != by_validation)
    progress = dataclasses.replace(
        progress,
        is_validated=jax.device_put(np.full(known.shape, by_validation)),
        scored_on=jax.device_put(np.asarray(marks, known.dtype)),
    )
    if not is_other.any():
        return progress
    infinite = np.full(known.shape, np.inf, progress.best_loss.dtype)
    best = Best(progress.params, progress.state, jax.device_put(infinite))
    if not is_other.all():
        best = jax.tree.map(
            lambda new, old: jnp.where(_beside(is_other, new), new, old),
            best,
            held_best(progress),
        )
    return dataclasses.replace(
        progress, best=best.params, best_state=best.state, best_loss=best.loss
    )


def _beside(flags: np.ndarray, rows: Array) -> np.ndarray:
    return flags.reshape(-1, *[1] * (rows.ndim - 1))


def stepped_on(progress: Progress, mark: int | UInt32[Array, ""]) -> Progress:
    """Does the same within a program, of one trainer, unless that has stopped."""
    mark, known = jnp.asarray(mark, jnp.uint32), progress.scored_on
    is_other = (known != UNKNOWN_DATA) & (known != mark) | progress.is_validated
    is_other &= ~progress.stopped
    best = chosen(
        is_other,
        lambda: Best(
            progress.params, progress.state, jnp.full_like(progress.best_loss, jnp.inf)
        ),
        lambda: held_best(progress),
        reads=held_best(progress),
    )
    return dataclasses.replace(
        progress,
        best=best.params,
        best_state=best.state,
        best_loss=best.loss,
        is_validated=progress.is_validated & ~is_other,
        scored_on=jnp.where(progress.stopped, known, mark),
    )

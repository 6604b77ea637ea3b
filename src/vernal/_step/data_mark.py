"""Which data a best was scored on: losses of other data do not compare."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from .._boundary import PyTree, is_traced
from .._data import Minibatches, Source, Stream
from .._program import chosen
from .._tree import LeafSum, choose, leaf_sums, row_sums
from .progress import UNKNOWN, Best, Progress, held_best

# Stands for batches that Python hands over one by one: these compare.
_ONE_BY_ONE = "one by one", 1


def data_mark(source: Source, parts: Mapping[str, Any]) -> int:
    """Returns a number for all that the losses of a fit depend on beside the model.

    This is the source of its batches, and the parts of a trainer that score them.
    """
    seen = in_source(source)
    seen = _ONE_BY_ONE if is_traced(seen) else seen
    parts = compared(seen, parts)
    (mark,) = _marks(leaf_sums((seen, {} if is_traced(parts) else parts)), 1)
    return mark


def compared(seen: Any, parts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Picks the parts that count: of single batches, as of `step`, only own fields."""
    return {"fields": parts["fields"]} if seen is _ONE_BY_ONE else parts


def in_source(source: Source) -> Any:
    """Returns what the batches of a source are made of."""
    if isinstance(source, Stream):
        return _ONE_BY_ONE
    if isinstance(source, Minibatches):
        return {"minibatches of": source.arrays, "size": source.size}
    return source.batch


def marks_of_rows(rows: PyTree, shared: PyTree, members: int) -> list[int]:
    """Returns the mark of each of many members, each of which has a row.

    `rows` and `shared` are pairs as `data_mark` makes of a source and its parts, with
    `None` for the arrays that the other one has.
    """
    sums = leaf_sums(shared) + row_sums(eqx.filter(rows, eqx.is_array))
    return _marks(sums, members)


def _marks(sums: list[LeafSum], members: int) -> list[int]:
    sums = sorted(sums, key=lambda leaf: (leaf.path, leaf.kind))
    names = zlib.crc32(repr([leaf[:2] for leaf in sums]).encode())
    columns = [np.broadcast_to(np.asarray(leaf.total), members) for leaf in sums]
    table = np.stack(columns, axis=1) if columns else np.zeros((members, 0))
    rows = table.astype(np.uint32)
    return [max(zlib.crc32(row.tobytes(), names), 1) for row in rows]


BATCH_BY_BATCH = _marks(leaf_sums((_ONE_BY_ONE, {})), 1)[0]
"""The mark of the batches of single steps."""


def begun_on(
    progress: Progress,
    marks: Any,
    by_validation: bool,
    stopped: Any,
    is_scored_otherwise: bool | Bool[np.ndarray, " members"],
    on_host: Callable[[Array], np.ndarray],
) -> Progress:
    """Returns the progress for a fit that scores on data with these marks.

    A best of other data, or code, or that was scored otherwise, is dropped. Of a member
    that has `stopped` only its loss is: it has no other best.
    """
    known, validated = map(on_host, (progress.scored_on, progress.is_validated))
    is_other = (known != UNKNOWN) & ((known != marks) | is_scored_otherwise)
    is_other |= validated != by_validation
    marked = jax.device_put(np.asarray(marks, known.dtype))
    if not is_other.any():
        return dataclasses.replace(progress, scored_on=marked)
    infinite = np.full(known.shape, np.inf, progress.best_loss.dtype)
    new = Best(progress.params, progress.state, jax.device_put(infinite))
    old = held_best(progress)._replace(best_loss=new.best_loss)
    best = _chosen(is_other, _chosen(is_other & stopped, old, new), held_best(progress))
    return dataclasses.replace(
        progress,
        **best._asdict(),
        is_validated=jax.device_put(np.full(known.shape, by_validation)),
        scored_on=marked,
    )


def _chosen(flags: Any, new: Best, old: Best) -> Best:
    """Takes the new rows where they are flagged."""
    if flags.all() or not flags.any():
        return new if flags.any() else old
    return choose(flags, new, old)


def stepped_on(
    progress: Progress, mark: int | UInt32[Array, ""], is_scored_otherwise: Any = False
) -> Progress:
    """Does the same within a program, of one trainer, unless that has stopped."""
    mark, known = jnp.asarray(mark, jnp.uint32), progress.scored_on
    is_other = (known != UNKNOWN) & ((known != mark) | is_scored_otherwise)
    is_other |= progress.is_validated
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
        **best._asdict(),
        is_validated=progress.is_validated & ~is_other,
        scored_on=jnp.where(progress.stopped, known, mark),
    )

"""Many fits in one program: a row for each of them, and one loop around all."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ._compiled import Chunk, Taken, is_over, run_loop, take_one
from ._data import Minibatches, Whole
from ._monitor import Monitor, MonitorState
from ._record import Record, Rows
from ._step import Progress, scored_anew
from ._typing import PyTree

Flags = tuple[bool, ...]


class Spread(eqx.Module):
    """Which leaves have a row for each member, along their first axis.

    All else is shared. `group` members are computed at a time.
    """

    size: int = eqx.field(static=True)
    group: int = eqx.field(static=True)
    config: Flags = eqx.field(static=True)
    monitor: Flags = eqx.field(static=True)
    source: Flags = eqx.field(static=True)


def apart(
    tree: PyTree, flags: Sequence[bool]
) -> tuple[list[Array], Callable[[Sequence[Array]], Any]]:
    """Takes the flagged leaves out of a tree.

    **Returns:**

    These leaves, and a function that puts others in their place.
    """
    leaves, structure = jax.tree.flatten(tree)

    def join(own: Sequence[Array]) -> Any:
        rest = iter(own)
        pairs = zip(leaves, flags, strict=True)
        return structure.unflatten([next(rest) if flag else x for x, flag in pairs])

    return [x for x, flag in zip(leaves, flags, strict=True) if flag], join


def member(tree: PyTree, flags: Sequence[bool], index: int) -> Any:
    """Picks one member of a tree that is spread."""
    own, join = apart(tree, flags)
    return join([leaf[index] for leaf in own])


@eqx.filter_jit
def run_chunk_of_many(
    trainers: Any,
    source: Whole[Any] | Minibatches,
    monitor: Monitor,
    watched: MonitorState | None,
    goal: Int[Array, ""],
    every: Int[Array, ""],
    record: Record,
    most_rows: int,
    spread: Spread,
) -> Chunk:
    """Does for many trainers what `run_chunk` does for one.

    There is one loop with one condition around a body that is mapped: a loop that is
    mapped itself would copy all of its buffers in each step.
    """
    fixed = (trainers._at(None), monitor, source)
    flags = (*spread.config, *spread.monitor, *spread.source)
    step = jnp.max(trainers.step_count)

    def run(fixed: Any, progress: Progress, watched: MonitorState | None) -> Chunk:
        return _run_group(
            fixed, spread, progress, watched, goal, step, every, record, most_rows
        )

    progress = trainers._progress
    if spread.group == spread.size:
        return run(fixed, progress, watched)
    own, join = apart(fixed, flags)
    split = lambda x: x.reshape(-1, spread.group, *x.shape[1:])
    one_group = lambda xs: run(join(xs[0]), *xs[1:])
    chunk = lax.map(one_group, jax.tree.map(split, (own, progress, watched)))
    merge = lambda x: x.reshape(-1, *x.shape[2:])
    return Chunk(
        progress=jax.tree.map(merge, chunk.progress),
        watched=jax.tree.map(merge, chunk.watched),
        rows=_merged(chunk.rows),
        scores=None if chunk.scores is None else _merged(chunk.scores),
    )


def _merged(rows: Rows) -> Rows:
    """Joins the rows of all groups: a row has a column for each member."""
    merge = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    values = {name: merge(value) for name, value in rows.values.items()}
    return Rows(merge(rows.loss), values, rows.first[0], rows.every[0])


def _run_group(
    fixed: tuple[Any, Monitor, Whole[Any] | Minibatches],
    spread: Spread,
    progress: Progress,
    watched: MonitorState | None,
    goal: Int[Array, ""],
    step: Int[Array, ""],
    every: Int[Array, ""],
    record: Record,
    most_rows: int,
) -> Chunk:
    config, monitor, source = fixed
    own_config, join_config = apart(config, spread.config)
    own_monitor, join_monitor = apart(monitor, spread.monitor)
    start = jax.vmap(lambda p: scored_anew(p, monitor.validates))(progress)

    def take(
        progress: Progress, watched: MonitorState | None, batch: Any, is_due: Array
    ) -> Taken:
        flags = spread.source if isinstance(source, Whole) else _none(batch)
        own_batch, join_batch = apart(batch, flags)

        def take_member(
            config: list[Array],
            monitor: list[Array],
            batch: list[Array],
            progress: Progress,
            watched: MonitorState | None,
        ) -> Taken:
            trainer = join_config(config)._at(progress)
            batch, own = join_batch(batch), join_monitor(monitor)
            return take_one(trainer, watched, batch, is_due, own, record)

        taken = jax.vmap(take_member)(
            own_config, own_monitor, own_batch, progress, watched
        )
        return _held(taken, progress, watched)

    like = start.best_loss
    shapes = _shapes(spread, config, source, start, step, record)
    shapes = {
        n: jax.ShapeDtypeStruct((len(like), *s.shape), s.dtype)
        for n, s in shapes.items()
    }
    rows = Rows.empty(like, shapes, step, every, most_rows)
    scores = monitor.room(like, step, most_rows)
    return run_loop(
        take, source, monitor, goal, step, Chunk(start, watched, rows, scores)
    )


def _shapes(
    spread: Spread,
    config: Any,
    source: Whole[Any] | Minibatches,
    progress: Progress,
    step: Int[Array, ""],
    record: Record,
) -> dict[str, Any]:
    """Finds what is recorded of one member."""
    first = member(config, spread.config, 0)._at(jax.tree.map(lambda x: x[0], progress))

    def first_batch() -> Any:
        if isinstance(source, Whole):
            source_ = member(source, spread.source, 0)
        else:
            source_ = source
        return eqx.filter_eval_shape(source_.next, source_.start(step), step)[0]

    return record.shapes(first, first_batch)


def _held(taken: Taken, progress: Progress, watched: MonitorState | None) -> Taken:
    """Holds the members that are over, of which there may be none."""
    over = is_over(progress, watched)

    def hold() -> tuple[Progress, MonitorState | None]:
        def pick(new: Array, old: Array) -> Array:
            mask = over.reshape(-1, *[1] * (new.ndim - 1))
            return jnp.where(mask, old, new)

        new = (taken.progress, taken.watched)
        return jax.tree.map(pick, new, (progress, watched))

    go_on = lambda: (taken.progress, taken.watched)
    progress, watched = lax.cond(jnp.any(over), hold, go_on)
    return Taken(progress, watched, taken.loss, taken.values)


def _none(tree: PyTree) -> Flags:
    return (False,) * len(jax.tree.leaves(tree))

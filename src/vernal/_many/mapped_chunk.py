"""Many fits in one program: a row for each of them, and one loop around all."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._boundary import PyTree
from .._data import Minibatches, Whole
from .._devices import ANYWHERE, AbstractPlacement
from .._loop import (
    Chunk,
    Ended,
    MonitorState,
    Moving,
    Record,
    Rows,
    Taken,
    Task,
    is_over,
    run_loop,
    take_one,
)
from .._program import program
from .._step import Progress, with_comparable_best, with_progress

Flags = tuple[bool, ...]

T = TypeVar("T")
R = TypeVar("R")


class Spread(eqx.Module):
    """Which leaves have a row for each member, along their first axis.

    All else is shared. `group` members are computed at a time.
    """

    group: int = eqx.field(static=True)
    config: Flags = eqx.field(static=True)
    monitor: Flags = eqx.field(static=True)
    source: Flags = eqx.field(static=True)
    place: AbstractPlacement = ANYWHERE


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


def in_groups(fn: Callable[[T], R], rows: T, group: int, place: AbstractPlacement) -> R:
    """Calls a function with some members at a time, and joins what it returns.

    Each device has its share in every group.

    **Arguments:**

    - `fn`: a function of a tree with a row for each member, which returns one.
    - `rows`: that of all members.
    - `group`: how many members to give it at a time.
    - `place`: where the members are.
    """
    size = len(jax.tree.leaves(rows)[0])
    if group == size:
        return fn(rows)
    parts = place.size

    def split(x: Array) -> Array:
        rest = x.shape[1:]
        groups = x.reshape(parts, -1, group // parts, *rest).swapaxes(0, 1)
        return groups.reshape(-1, group, *rest)

    def merge(x: Array) -> Array:
        rest = x.shape[2:]
        whole = x.reshape(-1, parts, group // parts, *rest).swapaxes(0, 1)
        return whole.reshape(size, *rest)

    groups = place.pin_rows(jax.tree.map(split, rows), 1)
    return jax.tree.map(merge, lax.map(fn, groups))


def chunk_of_many(task: Task, moving: Moving, spread: Spread) -> tuple[Chunk, Ended]:
    """Does for many trainers what `chunk_of_one` does for one.

    There is one loop with one condition around a body that is mapped: a loop that is
    mapped itself would copy all of its buffers in each step.
    """
    fixed = (task.trainer, task.monitor, task.source)
    step = jnp.max(moving.progress.step_count)
    own, join = apart(fixed, (*spread.config, *spread.monitor, *spread.source))

    def run(members: tuple[list[Array], Moving]) -> Chunk:
        own, moving = members
        trainer, monitor, source = join(own)
        part = task._replace(trainer=trainer, monitor=monitor, source=source)
        return _by_member(_run_group(part, moving, spread, step))

    chunk = _by_step(in_groups(run, (own, moving), spread.group, spread.place))
    moving = spread.place.pin_rows(chunk.moving)
    # What goes to the host goes from one device.
    chunk = Chunk(*moving, *spread.place.pin(tuple(chunk[2:])))
    return chunk, Ended.of(chunk)


run_many = program(chunk_of_many)
run_many_in_place = program(chunk_of_many, donate="all-except-first")


def _by_member(chunk: Chunk) -> Chunk:
    """Gives all of a chunk a row for each member: what is recorded has one by step."""
    turn = lambda rows: Rows(
        jnp.moveaxis(rows.loss, 1, 0),
        {name: jnp.moveaxis(value, 1, 0) for name, value in rows.values.items()},
        jnp.broadcast_to(rows.first, rows.loss.shape[1:]),
        jnp.broadcast_to(rows.every, rows.loss.shape[1:]),
    )
    scores = None if chunk.scores is None else turn(chunk.scores)
    return chunk._replace(rows=turn(chunk.rows), scores=scores)


def _by_step(chunk: Chunk) -> Chunk:
    """The other way round."""
    turn = lambda rows: Rows(
        jnp.moveaxis(rows.loss, 0, 1),
        {name: jnp.moveaxis(value, 0, 1) for name, value in rows.values.items()},
        rows.first[0],
        rows.every[0],
    )
    scores = None if chunk.scores is None else turn(chunk.scores)
    return chunk._replace(rows=turn(chunk.rows), scores=scores)


def _run_group(
    task: Task, moving: Moving, spread: Spread, step: Int[Array, ""]
) -> Chunk:
    config, source, monitor, record = task[:4]
    progress, watched = moving
    own_config, join_config = apart(config, spread.config)
    own_monitor, join_monitor = apart(monitor, spread.monitor)
    start = jax.vmap(lambda p: with_comparable_best(p, monitor.validates))(progress)

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
            trainer = with_progress(join_config(config), progress)
            batch, own = join_batch(batch), join_monitor(monitor)
            return take_one(trainer, watched, batch, is_due, own, record)

        taken = jax.vmap(take_member)(
            own_config, own_monitor, own_batch, progress, watched
        )
        taken = _held(taken, progress, watched)
        return spread.place.pin_rows(taken)

    like = start.best_loss
    shapes = _shapes(spread, config, source, start, step, record)
    shapes = {
        n: jax.ShapeDtypeStruct((len(like), *s.shape), s.dtype)
        for n, s in shapes.items()
    }
    rows = Rows.empty(like, shapes, step, task.every, task.most_rows)
    scores = monitor.room(like, step, task.most_rows)
    none_yet = jnp.zeros_like(start.stopped)
    chunk = Chunk(start, watched, rows, scores, none_yet)
    return run_loop(take, source, monitor, task.goal, step, chunk)


def _shapes(
    spread: Spread,
    config: Any,
    source: Whole[Any] | Minibatches,
    progress: Progress,
    step: Int[Array, ""],
    record: Record,
) -> dict[str, Any]:
    """Finds what is recorded of one member."""
    first = with_progress(
        member(config, spread.config, 0), jax.tree.map(lambda x: x[0], progress)
    )

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
    return taken._replace(progress=progress, watched=watched)


def _none(tree: PyTree) -> Flags:
    return (False,) * len(jax.tree.leaves(tree))

"""Many fits in one program: a row for each of them, and one loop around all."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._boundary import PyTree
from .._data import Whole, batch_shapes
from .._devices import ANYWHERE, AbstractPlacement
from .._loop import (
    Chunk,
    Ended,
    LoopState,
    Rows,
    Taken,
    Task,
    run_loop,
    run_small_loop,
    take_one,
)
from .._program import may_hang, program
from .._step import AbstractTrainer, loss_at, with_progress
from .._tree import choose

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

    @property
    def flags(self) -> Flags:
        """The flags of the trainer's configuration, the monitor and the source."""
        return (*self.config, *self.monitor, *self.source)


def apart(tree: PyTree, flags: Sequence[bool]) -> tuple[Any, Any]:
    """Splits a tree into its flagged leaves and the others, for `eqx.combine`."""
    return eqx.partition(tree, jax.tree.structure(tree).unflatten(flags))


def member(tree: PyTree, flags: Sequence[bool], index: Any) -> Any:
    """Picks one member, or many, of a tree whose flagged leaves have a row for each."""
    rows, shared = apart(tree, flags)
    return eqx.combine(jax.tree.map(lambda leaf: leaf[index], rows), shared)


def in_groups(fn: Callable[[T], R], rows: T, group: int, place: AbstractPlacement) -> R:
    """Calls a function with the rows of `group` members at a time; joins the results.

    Each device has its share in every group.
    """
    size = len(jax.tree.leaves(rows)[0])
    if group == size:
        return fn(rows)
    parts, count = place.size, size // group

    def split(x: Array) -> Array:
        rest = x.shape[1:]
        groups = x.reshape(parts, count, group // parts, *rest).swapaxes(0, 1)
        return groups.reshape(count, group, *rest)

    def merge(x: Array) -> Array:
        rest = x.shape[2:]
        whole = x.reshape(count, parts, group // parts, *rest).swapaxes(0, 1)
        return whole.reshape(size, *rest)

    groups = place.pin_rows(jax.tree.map(split, rows), 1)
    return jax.tree.map(merge, lax.map(fn, groups))


def at_once(
    trainer: AbstractTrainer, batch: Any, group: int, place: AbstractPlacement
) -> int:
    """Returns how many members of a group to compute at once, by one of them.

    Each device has a single one where many could wait for each other for ever.
    """
    hangs = may_hang(loss_at, trainer.params, trainer, batch)
    return place.size if hangs else group


def chunk_of_many(task: Task, state: LoopState, spread: Spread) -> tuple[Chunk, Ended]:
    """Does for many trainers what `chunk_of_one` does for one.

    There is one loop with one condition around a body that is mapped: a loop that is
    mapped itself would copy all of its buffers in each step.
    """
    step = jnp.max(state.progress.step_count)
    parts = task.trainer, task.monitor, task.source
    trainer, _, source = member(parts, spread.flags, 0)
    first = jax.tree.map(lambda leaf: leaf[0], state.progress)
    one = with_progress(trainer, first), batch_shapes(source, step)
    group = at_once(*one, spread.group, spread.place)
    spread = dataclasses.replace(spread, group=group)
    rows, shared = apart(parts, spread.flags)

    def run(own: tuple[PyTree, LoopState]) -> Chunk:
        rows, state = own
        trainer, monitor, source = eqx.combine(rows, shared)
        part = task._replace(trainer=trainer, monitor=monitor, source=source)
        chunk = _run_group(part, state, spread, step)
        return _turned(chunk, lambda x: jnp.broadcast_to(x, (group,)))

    chunk = in_groups(run, (rows, state), group, spread.place)
    _, *recorded = _turned(chunk, lambda x: x[0])
    # What goes to the host goes from one device.
    chunk = Chunk(spread.place.pin_rows(chunk.state), *spread.place.pin(recorded))
    return chunk, Ended.of(chunk)


run_many = program(chunk_of_many)
run_many_in_place = program(chunk_of_many, in_place=True)


def _turned(chunk: Chunk, fn: Callable[[Array], Array]) -> Chunk:
    """Swaps the axes of steps and members in all that is recorded.

    `fn` changes the number of the first row and of steps between rows.
    """

    def turned(rows: Rows) -> Rows:
        columns = rows.loss, rows.values
        loss, values = jax.tree.map(lambda x: x.swapaxes(0, 1), columns)
        return Rows(loss, values, fn(rows.first), fn(rows.every))

    scores = None if chunk.scores is None else turned(chunk.scores)
    return chunk._replace(rows=turned(chunk.rows), scores=scores)


def _run_group(
    task: Task, state: LoopState, spread: Spread, step: Int[Array, ""]
) -> Chunk:
    parts, progress = (task.trainer, task.monitor), state.progress
    rows, shared = apart(parts, (*spread.config, *spread.monitor))
    # One branch for all members. An accelerator would wait for the host at it.
    members = "members" if jax.default_backend() == "cpu" else None

    def take(state: LoopState, batch: Any, is_due: Array) -> Taken:
        is_whole = isinstance(task.source, Whole)
        flags = spread.source if is_whole else [False] * len(jax.tree.leaves(batch))
        own_batch, shared_batch = apart(batch, flags)

        def take_member(rows: PyTree, batch: PyTree, state: LoopState) -> Taken:
            trainer, monitor = eqx.combine(rows, shared)
            one = task._replace(trainer=trainer, monitor=monitor)
            whole = eqx.combine(batch, shared_batch)
            return take_one(one, state, whole, is_due, members=members)

        taken = jax.vmap(take_member, axis_name=members)(rows, own_batch, state)
        return spread.place.pin_rows(_held(taken, state))

    first, monitor, source = member((*parts, task.source), spread.flags, 0)
    one = task._replace(trainer=first, monitor=monitor, source=source)
    shapes = one.shapes(jax.tree.map(lambda leaf: leaf[0], progress), step)
    shapes = {
        name: jax.ShapeDtypeStruct((spread.group, *shape.shape), shape.dtype)
        for name, shape in shapes.items()
    }
    start = task.begin(state, shapes, step)
    chunk = run_small_loop(take, task, start, step)
    return run_loop(take, task, start, step) if chunk is None else chunk


def _held(taken: Taken, old: LoopState) -> Taken:
    """Takes back the step of each member that is over."""
    return taken._replace(state=choose(old.is_over, old, taken.state))

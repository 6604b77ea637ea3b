"""Blocks of bare steps: a good step has no guard, and its state is not copied.

A bare step returns whether it was bad. If it was, the loop goes back to the beginning
of the block, of which it keeps a copy, takes the good steps again, and guards the bad
one. What is computed twice is computed by the same code, and so to the same bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Bool, Int

from .._program import calls_host
from .._step import Progress, advance_bare, has_turned_bad, with_progress
from .task import Chunk, LoopState, Taken, Task, monitored, recorded

# How many steps a block has at most.
_SIZE = 128

# On a CPU one thread copies the best, at each step that lowers the loss. From this size
# on, in bytes, it is copied once in a block while all steps do: blocks of fewer steps.
_LARGE_BEST, _SIZE_OF_LARGE = 2**20, 32

# The size in bytes of the largest state of which there is room for a second copy.
_LARGEST = 2**28

_UNKNOWN = -1

Flag = Bool[Array, ""]

Bare = Callable[[Progress, LoopState, Any, Array, Flag | None], tuple[Taken, Flag]]


def bare_step(task: Task, state: LoopState, step: Int[Array, ""]) -> Bare | None:
    """Returns a step without guards, or `None` if each step needs one.

    A step that calls back to Python, to print or to raise, must not be taken twice.
    """
    ranks = task.monitor.validation is None
    is_large = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) > _LARGEST
    is_watched = not task.trainer.nan_policy.leaves_good_steps
    if task.guard == "always" or is_watched or is_large:
        return None

    def take(
        begin: Progress, state: LoopState, batch: Any, is_due: Array, copies: Any
    ) -> Any:
        trainer = with_progress(task.trainer, state.progress)
        options = {"ranks": ranks, "copies": copies}
        new, outcome, is_bad = advance_bare(trainer, batch, begin, **options)
        return monitored(task, state, new, outcome, is_due), is_bad

    cursor: Any = task.source.start(step)
    batch, _ = task.source.next(cursor, step)
    copies = jnp.array(True) if _copies_late(task, state) else None
    arguments = state.progress, state, batch, task.monitor.is_due(step), copies
    traced, shapes, static = eqx.filter_make_jaxpr(take)(*arguments)
    if calls_host(traced):
        return None
    structure = jax.tree.structure(shapes)

    def bare(*arguments: Any) -> tuple[Taken, Bool[Array, ""]]:
        leaves = jax.tree.leaves(eqx.filter(arguments, eqx.is_array))
        # A constant is returned as a number.
        returned = map(jnp.asarray, jaxpr_as_fun(traced)(*leaves))
        return eqx.combine(structure.unflatten(returned), static)

    return bare


def _copies_late(task: Task, state: LoopState) -> bool:
    """Whether it is worth not to copy the best at each step: a large one, on a CPU."""
    if jax.default_backend() != "cpu" or task.monitor.validation is not None:
        return False
    best = state.progress.best, state.progress.best_state
    return sum(leaf.nbytes for leaf in jax.tree.leaves(best)) >= _LARGE_BEST


class _Point(NamedTuple):
    """Where a block begins or ends."""

    state: LoopState
    cursor: Any
    step: Int[Array, ""]


class _Blocks(NamedTuple):
    """What changes from block to block."""

    begin: _Point
    """Of the last block."""
    now: _Point
    """The end of the last block: of no use if there was a bad step in it."""
    chunk: Chunk
    """What was recorded, also of steps that were taken back."""
    is_bad: Bool[Array, ""]
    """Whether the last block had a bad step."""
    bad_step: Int[Array, ""]
    """The next step that is known to be bad, or `_UNKNOWN`."""
    is_searching: Bool[Array, ""]
    """Whether one of the next steps is bad, but it is not known which."""
    is_steady: Flag | None
    """Whether each step of the last block lowered the loss: the next copies late."""
    is_stale: Flag | None
    """Whether the best of the last block was not copied: it is taken again."""


def run_blocks(
    bare: Bare,
    take: Callable[[LoopState, Any, Array], Taken],
    task: Task,
    start: Chunk,
    step: Int[Array, ""],
) -> Chunk:
    """Does what `run_loop` does, by `bare` for good steps and `take` for bad ones."""
    end, no = task.end(start), jnp.array(False)
    now = _Point(start.state, task.source.start(step), step)
    unknown, chunk = jnp.full_like(step, _UNKNOWN), start._replace(state=None)
    late = no if _copies_late(task, start.state) else None
    blocks = _Blocks(now, now, chunk, no, unknown, no, late, late)

    def goes_on(blocks: _Blocks) -> Array:
        now, goes_back = blocks.now, _goes_back(blocks)
        is_there = (now.step >= end) | (now.step == blocks.bad_step)
        return ~(is_there | now.state.is_over | goes_back)

    def run(blocks: _Blocks) -> _Blocks:
        """Takes good blocks, and goes back where one is bad, or its best is stale."""
        one = lambda blocks: _block(bare, task, blocks, end)
        blocks = lax.while_loop(goes_on, one, blocks)
        goes_back = _goes_back(blocks)
        now = lax.cond(goes_back, lambda: blocks.begin, lambda: blocks.now)
        return blocks._replace(now=now)

    def run_fresh(blocks: _Blocks) -> _Blocks:
        """Takes blocks until the best is not stale."""
        if blocks.is_stale is None:
            return run(blocks)
        again = lambda blocks: run(blocks._replace(is_stale=no))
        is_stale = lambda blocks: blocks.is_stale
        return lax.while_loop(is_stale, again, blocks._replace(is_stale=~no))

    def run_and_guard(blocks: _Blocks) -> _Blocks:
        blocks = run_fresh(blocks)._replace(is_bad=no)
        is_due = blocks.now.step == blocks.bad_step
        return lax.cond(is_due, lambda: _guarded(take, task, blocks), lambda: blocks)

    if task.guard == "never":
        blocks = run_fresh(blocks)
    else:
        blocks = lax.while_loop(goes_on, run_and_guard, blocks)
    return blocks.chunk._replace(state=blocks.now.state, needs_guard=blocks.is_bad)


def _goes_back(blocks: _Blocks) -> Flag:
    """Whether the last block has to be taken again."""
    return blocks.is_bad if blocks.is_stale is None else blocks.is_bad | blocks.is_stale


def _block(bare: Bare, task: Task, blocks: _Blocks, end: Int[Array, ""]) -> _Blocks:
    """Takes a block of bare steps: it ends early where one is bad."""
    begin, bad_step = blocks.now, blocks.bad_step
    size = _SIZE if blocks.is_steady is None else _SIZE_OF_LARGE
    size = jnp.where(blocks.is_searching, 1, size)
    end = jnp.where(bad_step == _UNKNOWN, end, jnp.minimum(end, bad_step))
    # Added last: the count is close to the largest integer in long fits.
    stop = begin.step + jnp.minimum(size, end - begin.step)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        chunk, (state, cursor, step), _, late = carry
        batch, cursor = task.source.next(cursor, step)
        is_due, steady = task.monitor.is_due(step + 1), blocks.is_steady
        copies = None if steady is None else ~steady | (step + 1 == stop)
        taken, is_bad = bare(begin.state.progress, state, batch, is_due, copies)
        if copies is not None:
            is_steady, is_stale = late
            lower = taken.state.progress.best_loss < state.progress.best_loss
            late = is_steady & lower, jnp.where(lower, ~copies, is_stale)
        chunk = recorded(chunk, step, taken)._replace(state=None)
        return chunk, _Point(taken.state, cursor, step + 1), is_bad, late

    def goes_on(carry: tuple[Any, ...]) -> Array:
        _, point, is_bad, _ = carry
        return (point.step < stop) & ~point.state.is_over & ~is_bad

    late = None if blocks.is_steady is None else (jnp.array(True), jnp.array(False))
    carry = blocks.chunk, begin, jnp.array(False), late
    chunk, now, is_last_bad, late = lax.while_loop(goes_on, body, carry)
    # A state that has turned bad does not say at which step: one by one, then.
    is_bad = is_last_bad | has_turned_bad(now.state.progress, begin.state.progress)
    has_accepted = blocks.chunk.has_accepted | ~is_bad
    chunk = chunk._replace(has_accepted=has_accepted)
    blocks = blocks._replace(begin=begin, now=now, chunk=chunk, is_bad=is_bad)
    if late is not None:
        is_steady, is_stale = late
        is_steady &= ~(is_bad | is_stale)
        blocks = blocks._replace(is_steady=is_steady, is_stale=is_stale & ~is_bad)
    if task.guard == "never":  # the program with guards looks for the step
        return blocks
    is_found = is_bad & (is_last_bad | (now.step - begin.step == 1))
    return blocks._replace(
        bad_step=jnp.where(is_found, now.step - 1, bad_step),
        is_searching=~is_found & (blocks.is_searching | is_bad),
    )


def _guarded(
    take: Callable[[LoopState, Any, Array], Taken], task: Task, blocks: _Blocks
) -> _Blocks:
    """Takes the step that is known to be bad, with its guard."""
    state, cursor, step = blocks.now
    batch, cursor = task.source.next(cursor, step)
    taken = take(state, batch, task.monitor.is_due(step + 1))
    return blocks._replace(
        now=_Point(taken.state, cursor, step + 1),
        chunk=recorded(blocks.chunk, step, taken)._replace(state=None),
        bad_step=jnp.full_like(step, _UNKNOWN),
    )

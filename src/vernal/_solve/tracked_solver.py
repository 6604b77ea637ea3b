"""A solver of Optimistix that keeps what a fit keeps: the losses and the best."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from .._boundary import PyTree
from .._policy import all_finite
from .._tree import choose

# As many leaves as are fused rather than joined.
_FEW = 16

_SCORED = (optx.AbstractGaussNewton, optx.AbstractQuasiNewton)


def keeps_score(solver: Any) -> bool:
    """Whether a solver evaluates its first point, and keeps what it saw at the last.

    Those of these families do: their state has the auxiliary output of the point they
    are at. Their search must accept the first point, as those of Optimistix do. Each
    evaluation beside the solver's own takes as long to compile.
    """
    is_own = lambda part: type(part).__module__.startswith("optimistix.")
    return isinstance(solver, _SCORED) and is_own(solver) and is_own(solver.search)


def joins(solver: Any, start: PyTree) -> bool:
    """Whether a solver is given all numbers in one array, and not in the tree `start`.

    Each leaf takes some tenths of a second to compile. A norm of the user's own, or a
    transformation of Optax, may know the leaves.
    """
    if len(jax.tree.leaves(start)) <= _FEW or not keeps_score(solver):
        return False
    return solver.norm in (optx.max_norm, optx.rms_norm, optx.two_norm)


class Seen(NamedTuple):
    """What a solved function returns beside its value.

    It names the point, as solvers differ in which evaluation they report when; and
    `is_seen`, as they report zeros before the first.
    """

    loss: Float[Array, ""]
    point: PyTree
    is_seen: Bool[Array, ""]


class Tracked(NamedTuple):
    """Where a solver is, and what it knows; the losses and the best point so far."""

    point: PyTree
    state: Any
    seen: Seen
    steps: Int[Array, ""]
    losses: Float[Array, " rows"]
    best: PyTree
    best_loss: Float[Array, ""]
    is_broken: Bool[Array, ""]
    is_over: Bool[Array, ""]


def track(
    fn: Callable[[PyTree, Any], tuple[Array, Seen]],
    solver: Any,
    start: PyTree,
    options: dict[str, Any],
    losses: Float[Array, " rows"],
    goal: Int[Array, ""],
) -> tuple[Tracked, Bool[Array, ""], optx.RESULTS]:
    """Takes the steps of a solver, up to the count `goal`, within a compiled program.

    The goal is an array, so that one program serves any number of steps. This is the
    loop of Optimistix, which keeps neither losses nor a best, and which defines what
    differentiates the solution: nobody does, and that takes long to trace. Returns also
    whether the solver is done, and its own result.
    """
    fn = eqx.filter_closure_convert(fn, start, None)
    structs, tags = fn.out_struct, frozenset[object]()  # pyright: ignore
    best_loss = jnp.full((), jnp.inf, losses.dtype)
    # Not every solver looks at its first point before it moves on.
    if not keeps_score(solver):
        _, seen = fn(start, None)
        _, best_loss = better(start, seen.loss, start, best_loss)
    begin = solver.init(fn, start, None, options, *structs, tags)
    arrays, others = eqx.partition(begin, eqx.is_array)

    def ends(point: PyTree, arrays: Any) -> tuple[Bool[Array, ""], optx.RESULTS]:
        state = eqx.combine(arrays, others)
        return solver.terminate(fn, point, None, options, state, tags)

    def asked(now: Tracked, point: PyTree) -> Tracked:
        is_done, result = ends(point, now.state)
        is_over = is_done | (result != optx.RESULTS.successful)
        return now._replace(is_over=is_over | now.is_broken | (now.steps >= goal))

    def step(now: Tracked) -> Tracked:
        state = eqx.combine(now.state, others)
        point, state, seen = solver.step(fn, now.point, None, options, state, tags)
        loss = jnp.where(seen.is_seen, seen.loss, now.best_loss)
        best, best_loss = better(seen.point, loss, now.best, now.best_loss)
        # A non-finite trial point is harmless; a non-finite iterate is not.
        is_at = functools.partial(eqx.tree_equal, seen.point)
        is_lost = seen.is_seen & (is_at(now.point) | is_at(point)) & ~jnp.isfinite(loss)
        new = Tracked(
            point=point,
            state=eqx.filter(state, eqx.is_array),
            seen=seen,
            steps=now.steps + 1,
            losses=now.losses.at[now.steps].set(loss),
            best=best,
            best_loss=best_loss,
            is_broken=is_lost | ~all_finite(point),
            is_over=now.is_over,
        )
        # As Optimistix does, with the point before the step.
        return asked(new, now.point)

    unseen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), structs[1])
    known = jnp.zeros_like(goal), losses, start, best_loss, ~all_finite(start)
    first = asked(Tracked(start, arrays, unseen, *known, jnp.array(False)), start)
    last = jax.lax.while_loop(lambda now: ~now.is_over, step, first)
    state = eqx.combine(last.state, others)
    is_done, result = ends(last.point, last.state)
    args = fn, last.point, last.seen, None, options, state, tags, result
    point, seen, _ = solver.postprocess(*args)
    return last._replace(point=point, state=state, seen=seen), is_done, result


def better(
    point: PyTree, loss: Float[Array, ""], best: PyTree, best_loss: Float[Array, ""]
) -> tuple[PyTree, Float[Array, ""]]:
    """Returns the point of the lower loss, and the loss, if both are finite."""
    is_better = (loss < best_loss) & all_finite((loss, point))
    return choose(is_better, (point, loss), (best, best_loss))

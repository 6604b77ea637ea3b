"""A minimum with some elements held, by the solver that a user gives."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._constraints import Bounds
from .._minimum import Curved, Local, Triangle, distance_of, settled
from .._policy import StopReason
from .._program import program
from .._projection import make_projector
from .._solve import IS_OVER, REASONS, Problem, Start, run_solver
from .._step import live, with_bounds
from .._tree import ravel, unravel
from .conditional import Held, Space

# How often other elements may be held at their bounds.
_MOST_ROUNDS = 8


class Solved(NamedTuple):
    """Where a solver ended: the parameters, the likelihood, and how."""

    flat: Float[Array, " D"]
    nll: Float[Array, ""]
    reason: Int[Array, ""]
    local: Local | None

    def is_minimum(self) -> bool:
        """Whether it is a minimum of what is not held."""
        local, reason = jax.device_get((self.local, self.reason))
        found = settled(REASONS[reason], distance_of(local))
        return found is StopReason.CONVERGED or _is_flat(local)


def _is_flat(local: Any) -> bool:
    """Whether the likelihood does not depend on what is not held, as where all is."""
    if isinstance(local, Triangle):
        return not np.any(local.factor[:-1, :-1])
    is_curved = isinstance(local, Curved)
    return is_curved and not np.any(local.slope) and not np.any(local.hessian)


@program
def solve_at(
    space: Space,
    problem: Problem,
    held: Held,
    tries: Float[Array, "T D"],
    goal: Int[Array, ""],
) -> Solved:
    """Solves from the best of several points; an interval of one value holds."""
    params, dtype = space.trainer.params, space.flat.dtype
    size = space.flat.size
    is_held = jnp.any(held.unit_vectors(size) > 0, axis=0)
    at = held.goal(size)
    low, high = (jnp.where(is_held, at, limit) for limit in space.limits())
    bounds = Bounds.between(unravel(low, params), unravel(high, params))
    trainer = with_bounds(space.trainer, bounds)
    tries = jnp.clip(tries, low[None, :], high[None, :])
    losses = jax.vmap(space.nll)(tries)
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    infinite = jnp.full((), jnp.inf, jnp.result_type(float))

    def once(flat: Float[Array, " D"]) -> tuple[Solved, Array]:
        here = live(trainer, unravel(flat, params))
        projector = make_projector(space.metric, here.params, "")
        latent = jnp.zeros(projector.latent_size, projector.latent_like.dtype)
        begin = Start(
            *(latent, here.params, here.state),
            *(infinite, jnp.array(False), jnp.full_like(infinite, jnp.nan)),
        )
        end = run_solver(here, projector, begin, problem, goal)
        flat = ravel(end.params, dtype)
        is_over = [end.reason == REASONS.index(reason) for reason in IS_OVER]
        is_final = end.is_settled | jnp.any(jnp.stack(is_over))
        return Solved(flat, space.nll(flat), end.reason, end.local), is_final

    def again(carry: Any) -> Any:
        count, last, _ = carry
        new, is_final = once(last.flat)
        has_fallen = (count == 0) | (new.nll < last.nll)
        return count + 1, new, is_final | ~has_fallen

    first = tries[jnp.argmin(losses)]
    like, _ = jax.eval_shape(once, first)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    goes_on = lambda carry: ~carry[2] & (carry[0] < _MOST_ROUNDS)
    begin = (jnp.zeros_like(goal), none._replace(flat=first), jnp.array(False))
    return jax.lax.while_loop(goes_on, again, begin)[1]

"""A minimum with some elements held, by the solver that a user gives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._constraints import Bounds
from .._minimum import Local, distance_of, measure, settled
from .._policy import StopReason
from .._program import program
from .._projection import make_projector
from .._solve import IS_OVER, REASONS, End, Problem, Start, run_solver
from .._step import AbstractTrainer, defined, live, template_of, with_bounds
from .._tree import ravel, unravel
from .conditional import Held, Space

# How often other elements may be held at their bounds.
_MOST_ROUNDS = 8


def by_solver(
    space: Space, problem: Problem, held: Held, flat: Any, goal: Int[Array, ""]
) -> tuple[Any, float, bool]:
    """Solves from a point, in rounds if there are bounds.

    Returns the parameters, the negative log-likelihood, and whether they are a minimum.
    """
    # Where it is not finite, no solver moves.
    lowest, reason = float(run_nll(space, flat)), StopReason.NON_FINITE
    is_falling = False
    for _ in range(_MOST_ROUNDS if np.isfinite(lowest) else 0):
        found = run_round(space, problem, held, flat, goal)
        flat, nll, end = jax.device_get(found)
        has_fallen, lowest = nll < lowest, float(nll)
        distance = distance_of(end.local)
        hidden = np.fmax(distance.tolerance, distance.spacing)
        is_falling = bool(distance.edm > hidden)
        reason = settled(REASONS[end.reason], distance)
        if end.is_settled or reason in IS_OVER or not has_fallen:
            break
    is_minimum, is_seen = reason is StopReason.CONVERGED, np.isfinite(lowest)
    if template_of(space.trainer).bijections is None:
        # Slopes see a fall between two parameters that nearly cancel, which second
        # derivatives do not. At the edge of a map they leave out all its curvature.
        is_seen &= not is_falling
    if not is_minimum and is_seen and "loss" not in defined(space.trainer):
        # Without any slope the curvature is in what Gauss-Newton leaves out.
        whole = distance_of(run_distance(space, held, flat))
        is_minimum = whole.is_minimum and not whole.is_unclear
    return flat, lowest, is_minimum


@program
def run_nll(space: Space, flat: Float[Any, " D"]) -> Float[Array, ""]:
    """Returns the negative log-likelihood, of which a model may take long by itself."""
    return space.nll(flat)


@functools.partial(program, in_order=True)
def run_round(
    space: Space,
    problem: Problem,
    held: Held,
    flat: Float[Any, " D"],
    goal: Int[Array, ""],
) -> tuple[Array, Array, End]:
    here = _held_there(space, held, flat)
    projector = make_projector(space.metric, here.params, "")
    latent = jnp.zeros(projector.latent_size, projector.latent_like.dtype)
    infinite = jnp.full((), jnp.inf, jnp.result_type(float))
    none = jnp.full_like(infinite, jnp.nan)
    state: Any = here.state
    begin = Start(latent, here.params, state, infinite, none)
    end = run_solver(here, projector, begin, problem, goal)
    ended = ravel(end.params, flat.dtype)
    return ended, space.nll(ended), end


@program
def run_distance(space: Space, held: Held, flat: Float[Any, " D"]) -> Local:
    """Measures the distance to the minimum by the whole second derivatives."""
    here = _held_there(space, held, flat)
    # The tolerance of a loss is a fraction of what it is given: of an error bar here.
    unit = space.error_scale**2
    return measure(here, None, space.batch, "loss", unit)


def _held_there(space: Space, held: Held, flat: Float[Any, " D"]) -> AbstractTrainer:
    """Returns the trainer at a point; an interval of one value holds an element."""
    params = space.trainer.params
    limits = [jnp.where(held.flags, held.goal, limit) for limit in space.limits()]
    bounds = Bounds.between(*(unravel(limit, params) for limit in limits))
    here = live(with_bounds(space.trainer, bounds), unravel(flat, params))
    return live(here, bounds.clip(here.params))

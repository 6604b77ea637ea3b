"""Many trainers solved one after the other, if one of them meets an error."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._boundary import PyTree, warn
from .._policy import StopReason
from .._solve import REASONS, End, Problem, Start, in_parameters, run, run_solver
from .._step import (
    AbstractTrainer,
    in_free_coordinates,
    initial_opt_state,
    stripped,
)
from .members import Members


def solve_each(
    members: Members, problem: Problem, goal: Int[Array, ""]
) -> tuple[tuple[End, PyTree], list[int]]:
    """Solves for each by itself. Under `jax.vmap` an `eqx.error_if` ends all of them.

    Returns how each ended and the first states of their optimisers, stacked, and the
    indices of those that met an error.
    """
    ends, errors = [], {}
    for index in range(members.trainers.step_count.shape[0]):
        trainer, batch = members.one(problem.batch, index)
        alone = problem._replace(batch=batch)
        inner = in_free_coordinates(trainer)
        args = stripped(inner), inner.projector, Start.of(inner), alone, goal
        try:
            end = jax.block_until_ready(run(*args))
        except RuntimeError as error:
            end, errors[index] = _unmoved(*args), error
        end = in_parameters(end, trainer)
        opt_state = initial_opt_state(trainer.optimiser, end.params, end.latent)
        ends.append((end, opt_state))
    if errors:
        first, error = next(iter(errors.items()))
        found = re.search(r"EquinoxRuntimeError: (.+)", str(error))
        message = found[1] if found else str(error).strip().splitlines()[0]
        warn(
            f"{len(errors)} of {len(ends)} members met an error, and are where they "
            f"began. That of member {first}: {message}"
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *ends), list(errors)


def _unmoved(
    trainer: AbstractTrainer, projector: Any, held: Start, problem: Problem, goal: Any
) -> End:
    """The end of a solver that has not taken a step."""
    shapes = eqx.filter_eval_shape(run_solver, trainer, projector, held, problem, goal)
    end: End = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return end._replace(
        params=trainer.params,
        latent=held.latent,
        best=held.best,
        best_state=held.state,
        best_loss=jnp.asarray(held.loss, end.best_loss.dtype),
        step_count=trainer.step_count,
        reason=jnp.full_like(end.reason, REASONS.index(StopReason.FAILED)),
        stumble=trainer.params,
        local=jax.tree.map(
            lambda x: jnp.full_like(x, jnp.nan if eqx.is_inexact_array(x) else 0),
            end.local,
        ),
    )

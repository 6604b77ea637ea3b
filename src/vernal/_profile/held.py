"""A solve with some elements held, within a compiled program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._boundary import PyTree
from .._constraints import Bounds
from .._curvature import matmul, of_jacobian, traced
from .._minimum import Local
from .._projection import (
    DenseWhitening,
    EigenProjector,
    NullPolicy,
    jacobian_rtol,
    make_projector,
    whiten_spectrum,
)
from .._solve import IS_OVER, REASONS, Problem, Start, run_solver
from .._step import (
    AbstractTrainer,
    bounds_of,
    live,
    negative_log_likelihood,
    step_key,
    with_bounds,
)
from .._tree import ravel, ravel_dtype, unravel

# How often other elements may be held at their bounds in a solve.
_MOST_ROUNDS = 8


class Scan(NamedTuple):
    """What the solves of a profile share.

    - `trainer`: the trainer at the minimum, stripped.
    - `metric`: whitens all parameters there, without a bound.
    - `goal`: the most steps of a solve.
    """

    trainer: AbstractTrainer
    metric: DenseWhitening
    problem: Problem
    goal: Int[Array, ""]

    @property
    def flat(self) -> Float[Array, " D"]:
        """The parameters at the minimum."""
        return ravel(self.trainer.params)

    def limits(self) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """Returns the bounds of all elements, infinite where there is none."""
        params, dtype = self.trainer.params, ravel_dtype(self.trainer.params)
        bounds = bounds_of(self.trainer) or Bounds({}, {})
        low, high = (ravel(side, dtype) for side in bounds.limits(params))
        return low, high

    def model(self, flat: Float[Array, " D"]) -> Any:
        """Returns the model with these parameters."""
        return live(self.trainer, unravel(flat, self.trainer.params)).model

    def nll(self, flat: Float[Array, " D"]) -> Float[Array, ""]:
        """Returns the negative logarithm of the likelihood, with the priors."""
        trainer = live(self.trainer, unravel(flat, self.trainer.params))
        return negative_log_likelihood(trainer, self.problem.batch, step_key(trainer))


class Point(NamedTuple):
    """Where a solve ended: the parameters, the likelihood, and how."""

    flat: Float[Array, " D"]
    nll: Float[Array, ""]
    reason: Int[Array, ""]
    local: Local | None


def solve_at(
    scan: Scan,
    index: Int[Array, " H"],
    values: Float[Array, " H"],
    tries: Float[Array, "T D"],
) -> Point:
    """Solves for all elements but some, which are held at their values.

    An interval of one value holds an element.

    **Arguments:**

    - `index`: which elements are held.
    - `values`: their values; one that is NaN is not held.
    - `tries`: where the others may start. The best of these is taken, or the point on
        the tangent at the first.
    """
    params, (low, high) = scan.trainer.params, scan.limits()
    is_held = jnp.zeros(low.size, bool).at[index].set(~jnp.isnan(values))
    at = jnp.zeros_like(low).at[index].set(jnp.nan_to_num(values))
    low, high = jnp.where(is_held, at, low), jnp.where(is_held, at, high)
    bounds = Bounds.between(unravel(low, params), unravel(high, params))
    trainer = with_bounds(scan.trainer, bounds)
    whitening = _of_others(scan, is_held)
    tangent = _tangent(scan, whitening, jnp.where(is_held, at - tries[0], 0))
    starts = jnp.concatenate([(tries[0] + tangent)[None], tries])
    starts = jnp.clip(starts, low[None, :], high[None, :])
    losses = jax.vmap(scan.nll)(starts)
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    first = starts[jnp.argmin(losses)]

    def solve(flat: Float[Array, " D"]) -> tuple[Point, Bool[Array, ""]]:
        here = live(trainer, unravel(flat, params))
        projector = make_projector(whitening, here.params, "")
        problem = scan.problem._replace(rows=1)
        end = run_solver(here, projector, _start(here, projector), problem, scan.goal)
        ended = ravel(end.params, flat.dtype)
        is_over = [end.reason == REASONS.index(reason) for reason in IS_OVER]
        is_final = end.is_settled | jnp.any(jnp.stack(is_over))
        return Point(ended, scan.nll(ended), end.reason, end.local), is_final

    if bounds_of(scan.trainer) is None:
        return solve(first)[0]
    once = traced(solve, first)

    def again(carry: tuple[Any, Point, Any]) -> tuple[Any, Point, Any]:
        count, point, _ = carry
        new, is_final = once(jnp.where(count == 0, first, point.flat))
        has_fallen = (count == 0) | (new.nll < point.nll)
        return count + 1, new, is_final | ~has_fallen

    like, _ = jax.eval_shape(once, first)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    goes_on = lambda carry: ~carry[2] & (carry[0] < _MOST_ROUNDS)
    start = (jnp.zeros_like(scan.goal), none, jnp.array(False))
    return jax.lax.while_loop(goes_on, again, start)[1]


def _start(trainer: AbstractTrainer, projector: EigenProjector) -> Start:
    latent = jnp.zeros(projector.latent_size, projector.latent_like.dtype)
    infinite = jnp.full((), jnp.inf, jnp.result_type(float))
    none = jnp.full_like(infinite, jnp.nan)
    state: PyTree = trainer.state
    return Start(latent, trainer.params, state, infinite, jnp.array(False), none)


def _factor(metric: DenseWhitening) -> Float[Array, "D D"]:
    """Returns a matrix whose Gram matrix is the curvature."""
    return metric.vectors.T / metric.roots[:, None] / metric.scale[None, :]


def _of_others(scan: Scan, is_held: Bool[Array, " D"]) -> DenseWhitening:
    """Whitens the elements that are not held, given those that are."""
    free = jnp.where(is_held[None, :], 0, _factor(scan.metric))
    eps = float(jnp.finfo(free.dtype).eps)
    nulls = NullPolicy(on_null="prior").or_rtol(jacobian_rtol(len(free), eps))
    return whiten_spectrum(of_jacobian(free), scan.trainer.params, nulls, eps, "")


def _tangent(
    scan: Scan, whitening: DenseWhitening, step: Float[Array, " D"]
) -> Float[Array, " D"]:
    """Returns a step of the held elements, and with it that of the others."""
    factor = _factor(scan.metric)
    pull = matmul(factor.T, matmul(factor, step))
    others = whitening.apply(whitening.transpose(jnp.where(step != 0, 0, pull)))
    return step - jnp.where(step != 0, 0, others).astype(step.dtype)

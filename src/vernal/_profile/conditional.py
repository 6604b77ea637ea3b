"""Minima with some elements held, many in one compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Bool, Float, Int

from .._constraints import Bounds
from .._curvature import (
    Mode,
    Subject,
    choose_mode,
    columns,
    gradient,
    hessian_product,
    jacobian_matrix,
    matmul,
    positive,
    traced,
)
from .._policy import all_finite
from .._program import program
from .._projection import DenseWhitening
from .._solve import choose
from .._step import (
    AbstractTrainer,
    bounds_of,
    defined,
    live,
    negative_log_likelihood,
    real_residuals,
    step_key,
)
from .._tree import ravel, unravel

# How far the likelihood may be above a minimum; a last step goes on from there.
_TOLERANCE = 1e-9

_MOST_DAMPING = 1e6

# Squared lengths, in standard errors.
_SHORT = 0.1

# What is added to the curvature along what is held, without effect.
_STIFF = 3.0

# How often other elements may be held at their bounds in a step.
_MOST_ROUNDS = 8


class Space(NamedTuple):
    """What is minimised, and in which space.

    - `trainer`: the trainer at the minimum, stripped.
    - `metric`: whitens all parameters there, without a bound.
    - `most_steps`: the most steps for each point.
    """

    trainer: AbstractTrainer
    batch: Any
    jac: Mode | None
    metric: DenseWhitening
    most_steps: Int[Array, ""]

    @property
    def flat(self) -> Float[Array, " D"]:
        """The parameters at the minimum."""
        return ravel(self.trainer.params, self.metric.dtype)

    def limits(self) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """Returns the bounds of all elements, infinite where there is none."""
        params, dtype = self.trainer.params, self.metric.dtype
        bounds = bounds_of(self.trainer) or Bounds({}, {})
        low, high = (ravel(side, dtype) for side in bounds.limits(params))
        return low, high

    def at(self, flat: Float[Array, " D"]) -> Any:
        """Returns the trainer with these parameters."""
        return live(self.trainer, unravel(flat, self.trainer.params))

    def nll(self, flat: Float[Array, " D"]) -> Float[Array, ""]:
        """Returns the negative logarithm of the likelihood, with the priors."""
        key = step_key(self.trainer)
        return negative_log_likelihood(self.at(flat), self.batch, key)


class Held(NamedTuple):
    """Which elements are held, two at most, and where.

    - `units`: their unit vectors; zeros where there is none.
    - `goal`: their values, at their places; zeros elsewhere.
    """

    units: Float[Any, "*K 2 D"]
    goal: Float[Any, "*K D"]

    @property
    def flags(self) -> Bool[Any, "*K D"]:
        """Which elements are held."""
        return self.units.any(axis=-2)


class Points(NamedTuple):
    """Minima, or where to begin.

    - `flat`: the parameters.
    - `response`: how they move with the elements that are held.
    - `nll`: the negative log-likelihood, with the priors.
    - `is_minimum`: whether it is the lowest where these are held.
    """

    flat: Float[Any, "*K D"]
    response: Float[Any, "*K D 2"]
    nll: Float[Any, "*K"]
    is_minimum: Bool[Any, "*K"]


@program
def run_points(
    space: Space,
    held: Held,
    parents: Int[Any, " K"],
    points: Points,
    blocks: Int[Any, ""],
    width: int,
) -> Points:
    """Finds minima, `width` at a time, in the order of the rows.

    The row of a point has where it begins; or it begins where its parent, which is in
    an earlier block, ended.
    """
    expand = _expansion(space)
    one = lambda held, begin: _minimum(space, expand, held, begin)

    def block(index: Array, points: Points) -> Points:
        first = index * width
        pick = lambda x: jax.lax.dynamic_slice_in_dim(x, first, width)
        begin = jax.tree.map(lambda x: x[pick(parents)], points)
        found = jax.vmap(one)(jax.tree.map(pick, held), begin)
        put = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda x, new: put(x, new, first, 0), points, found)

    return jax.lax.fori_loop(0, blocks, block, points)


class _Expansion(NamedTuple):
    """The negative log-likelihood, and its derivatives in the whitened space."""

    value: Float[Array, ""]
    slope: Float[Array, " D"]
    curvature: Float[Array, "D D"]


def _expansion(space: Space) -> Callable[[Array], _Expansion]:
    """Returns the function that expands to second order; of residuals, Gauss-Newton."""
    trainer, flat, dtype = space.trainer, space.flat, space.metric.dtype
    key, batch, matrix = step_key(trainer), space.batch, space.metric.matrix()
    is_squares = "residuals" in defined(trainer)
    name = "residuals" if is_squares else "nll"
    subject = Subject(f"`{name}` of `{type(trainer).__name__}`", space.jac)
    of = real_residuals if is_squares else negative_log_likelihood
    fn = traced(lambda flat: of(space.at(flat), batch, key).astype(dtype), flat)
    zero = jnp.zeros(matrix.shape[1], dtype)
    order = ("fwd", "bwd") if is_squares else ("bwd", "fwd")
    mode = choose_mode(fn, flat, subject, order)

    def expand(flat: Array) -> _Expansion:
        near = lambda latent: fn(flat + matmul(matrix, latent))
        if is_squares:
            vector, jacobian = near(zero), jacobian_matrix(near, zero, mode)
            squares, slope = 0.5 * jnp.sum(vector**2), matmul(vector, jacobian)
            return _Expansion(squares, slope, matmul(jacobian.T, jacobian))
        product = hessian_product(near, zero, subject)
        return _Expansion(
            near(zero), gradient(near, zero, mode), columns(product, zero)
        )

    return expand


class _Step(NamedTuple):
    """A step to the point `to`, where the likelihood has risen by `edm`.

    `response` is that of all elements to those that are held. It `is_known` which are
    at their bounds.
    """

    to: Float[Array, " D"]
    edm: Float[Array, ""]
    response: Float[Array, "D 2"]
    is_known: Bool[Array, ""]


class _State(NamedTuple):
    """The lowest point so far, its surroundings, and the step to the next one."""

    flat: Float[Array, " D"]
    around: _Expansion
    rest: Float[Array, "D D"]
    damping: Float[Array, ""]
    step: _Step
    tried: Int[Array, ""]
    is_done: Bool[Array, ""]


def _minimum(
    space: Space, expand: Callable[[Array], _Expansion], held: Held, begin: Points
) -> Points:
    """Finds the minimum by damped Newton steps in the whitened space.

    The first step goes along the response of the point where it begins.
    """
    flat, dtype = begin.flat, begin.flat.dtype
    eps, scale = float(jnp.finfo(dtype).eps), space.metric.scale
    spacing = 0.5 * jnp.sum((16 * eps * flat / scale) ** 2)

    def goes_on(state: _State) -> Array:
        is_hopeless = state.damping > _MOST_DAMPING
        return ~state.is_done & ~is_hopeless & (state.tried < space.most_steps)

    def iterate(state: _State) -> _State:
        found = expand(state.step.to)
        rounding = 4 * eps * jnp.abs(found.value)
        is_lower = found.value <= state.around.value + rounding
        is_lower &= all_finite(found)
        new, old = (state.step.to, found), (state.flat, state.around)
        flat, around = choose(is_lower, new, old)
        rest = jnp.where(is_lower, _rest(space, state, found), 0)
        less = jnp.where(state.damping > 0.1, state.damping / 8, 0)
        more = jnp.maximum(8 * state.damping, 0.125)
        damping = jnp.where(is_lower, less, more)
        whole = around._replace(curvature=around.curvature + rest)
        step = _step(space, whole, damping, flat, held)
        limit = jnp.maximum(_TOLERANCE, rounding + spacing)
        is_done = is_lower & step.is_known & (damping == 0) & (step.edm <= limit)
        return _State(flat, around, rest, damping, step, state.tried + 1, is_done)

    zero, no = jnp.zeros((), dtype), jnp.array(False)
    moved = matmul(held.units, held.goal - flat)
    first = jnp.where(held.flags, held.goal, flat + matmul(begin.response, moved))
    # Far away the others may be better where they are.
    tries = jnp.stack([first, jnp.where(held.flags, held.goal, flat)])
    tries = jnp.clip(tries, *(limit[None, :] for limit in space.limits()))
    losses = jax.vmap(space.nll)(tries)
    first = tries[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]
    step = _Step(first, zero, begin.response, no)
    unit = jnp.eye(flat.size, dtype=dtype)
    unknown = _Expansion(jnp.full((), jnp.inf, dtype), 0 * flat, unit)
    count = jnp.zeros_like(space.most_steps)
    state = _State(flat, unknown, 0 * unit, zero, step, count, no)
    end = jax.lax.while_loop(goes_on, iterate, state)
    flat = jnp.where(end.is_done, end.step.to, end.flat)
    nll = end.around.value - jnp.where(end.is_done, end.step.edm, 0)
    return Points(flat, end.step.response, nll, end.is_done)


def _rest(space: Space, state: _State, new: _Expansion) -> Float[Array, "D D"]:
    """Learns from a step what the curvature leaves out, as that of Gauss-Newton does.

    It is the least symmetric update that explains the change of the slope, Powell's.
    See Dennis and Schnabel, *Numerical Methods for Unconstrained Optimization* (1983).
    """
    old, step = state.around, space.metric.invert(state.step.to - state.flat)
    missing = new.slope - old.slope - matmul(new.curvature + state.rest, step)
    square = jnp.vdot(step, step)
    is_known = jnp.isfinite(old.value) & (square > 0) & (square < _SHORT)
    unit = step / jnp.where(is_known, square, 1)
    half = missing - 0.5 * jnp.vdot(missing, unit) * step
    update = half[:, None] * unit[None, :]
    return state.rest + jnp.where(is_known, update + update.T, 0)


def _step(
    space: Space,
    around: _Expansion,
    damping: Float[Array, ""],
    flat: Float[Array, " D"],
    held: Held,
) -> _Step:
    """Finds the next step: that of a normal distribution, given what is held.

    Elements that it would move beyond their bounds are held there.
    """
    matrix, (low, high) = space.metric.matrix(), space.limits()
    # What the data do not constrain has unit curvature. Along what is held the
    # likelihood may curve downwards; what is added there changes no step.
    rows = matmul(held.units, matrix)
    rows = _STIFF * rows / positive(jnp.linalg.norm(rows, axis=1))[:, None]
    add = jnp.diag(damping + jnp.where(space.metric.is_null, 1, 0))
    curvature = around.curvature + add + matmul(rows.T, rows)
    solved = _solve(curvature, jnp.column_stack([matrix.T, around.slope]))
    pulled, latent = solved[:, :-1], -solved[:, -1]
    free, spread = flat + matmul(matrix, latent), matmul(matrix, pulled)
    errors = jnp.sqrt(jnp.diag(spread))[:, None]

    def forces(fixed: Array, goal: Array) -> Array:
        """Returns the slopes that bring elements to their goals, and move held ones."""
        both = fixed[:, None] & fixed[None, :]
        inner = jnp.where(
            both, spread / errors / errors.T, jnp.eye(flat.size, dtype=flat.dtype)
        )
        missing = jnp.where(fixed, goal - free, 0)
        given = jnp.column_stack([missing, held.units.T]) / errors
        return jnp.where(fixed[:, None], _solve(inner, given) / errors, 0)

    def again(carry: Any) -> Any:
        count, fixed, goal, force, _ = carry
        to = free + matmul(spread, force[:, 0])
        is_under, is_over = ~fixed & (to < low), ~fixed & (to > high)
        is_inward = jnp.where(goal == low, force[:, 0] < 0, force[:, 0] > 0)
        new = (fixed & (held.flags | ~is_inward)) | is_under | is_over
        goal = jnp.where(is_under, low, jnp.where(is_over, high, goal))
        return count + 1, new, goal, forces(new, goal), jnp.all(new == fixed)

    fixed, goal, is_known = held.flags, held.goal, jnp.array(True)
    force = forces(fixed, goal)
    if bounds_of(space.trainer) is not None:
        goes_on = lambda carry: ~carry[-1] & (carry[0] < _MOST_ROUNDS)
        start = (0, fixed, goal, force, ~is_known)
        end = jax.lax.while_loop(goes_on, again, start)
        _, fixed, goal, force, is_known = end
    latent = latent + matmul(pulled, force[:, 0])
    moves = matmul(spread, force)
    to = jnp.clip(jnp.where(fixed, goal, free + moves[:, 0]), low, high)
    edm = 0.5 * jnp.vdot(latent, matmul(around.curvature, latent))
    return _Step(to, edm, moves[:, 1:], is_known)


def _solve(matrix: Array, right: Array) -> Array:
    """Solves with a matrix that is positive; NaN if it is not."""
    lower = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    return cho_solve((lower, True), right)


@program
def read(space: Space) -> tuple[Array, Array, Array, Array]:
    """Returns the parameters, their bounds, and the covariance in the metric."""
    matrix = space.metric.matrix()
    return space.flat, *space.limits(), matmul(matrix, matrix.T)


@program
def run_models(space: Space, flat: Float[Array, "K D"]) -> Any:
    """Returns the models with these parameters, stacked."""
    return eqx.filter_vmap(lambda flat: space.at(flat).model)(flat)

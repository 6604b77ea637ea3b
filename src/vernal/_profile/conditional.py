"""Minima with some elements held, many in one compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
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
    traced,
)
from .._policy import all_finite
from .._program import program
from .._projection import DenseWhitening
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
    """Two elements, and the values at which they are held: NaN where it is free."""

    elements: Int[Array | np.ndarray, "*K 2"]
    values: Float[Array | np.ndarray, "*K 2"]

    def unit_vectors(self, size: int) -> Float[Array, "2 D"]:
        """Returns those of the elements; zeros for one that is free."""
        rows = jax.nn.one_hot(self.elements, size, dtype=self.values.dtype)
        return jnp.where(jnp.isnan(self.values)[:, None], 0, rows)

    def goal(self, size: int) -> Float[Array, " D"]:
        """Returns the values at their elements, and zeros elsewhere."""
        return matmul(jnp.nan_to_num(self.values), self.unit_vectors(size))


class Points(NamedTuple):
    """Minima, or where to begin.

    - `flat`: the parameters.
    - `response`: how they move with the elements that are held.
    - `nll`: the negative log-likelihood, with the priors.
    - `is_minimum`: whether it is the lowest where these are held.
    """

    flat: Float[Array | np.ndarray, "*K D"]
    response: Float[Array | np.ndarray, "*K D 2"]
    nll: Float[Array | np.ndarray, "*K"]
    is_minimum: Bool[Array | np.ndarray, "*K"]


@program
def run_points(
    space: Space,
    held: Held,
    parents: Int[Array, " K"],
    points: Points,
    blocks: Int[Array, ""],
    width: int,
) -> Points:
    """Finds minima, `width` at a time, in the order of the rows.

    The row of a point has where it begins; or it begins where its parent, which is in
    an earlier block, ended.
    """
    expand = _expansion(space)

    def one(held: Held, begin: Points) -> Points:
        return _minimum(space, expand, held, begin)

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


class _State(NamedTuple):
    """The lowest point so far, its surroundings, and the next one to try."""

    flat: Float[Array, " D"]
    around: _Expansion
    damping: Float[Array, ""]
    step: "_Step"
    count: Int[Array, ""]
    is_done: Bool[Array, ""]


class _Step(NamedTuple):
    """A step to the point `to`, after which `edm` is what the likelihood has risen."""

    to: Float[Array, " D"]
    edm: Float[Array, ""]
    response: Float[Array, "D 2"]


def _minimum(
    space: Space, expand: Callable[[Array], _Expansion], held: Held, begin: Points
) -> Points:
    """Finds the minimum by damped Newton steps in the whitened space.

    The first step goes along the response of the point where it begins.
    """
    flat, dtype, size = begin.flat, begin.flat.dtype, begin.flat.size
    own, goal = held.unit_vectors(size), held.goal(size)
    is_held = jnp.any(own > 0, axis=0)
    moved = matmul(own, goal - flat)
    first = flat + matmul(begin.response, moved)
    first = jnp.clip(jnp.where(is_held, goal, first), *space.limits())
    eps, scale = float(jnp.finfo(dtype).eps), space.metric.scale
    spacing = 0.5 * jnp.sum((16 * eps * flat / scale) ** 2)

    def goes_on(state: _State) -> Array:
        is_hopeless = state.damping > _MOST_DAMPING
        return ~state.is_done & ~is_hopeless & (state.count < space.most_steps)

    def iterate(state: _State) -> _State:
        found = expand(state.step.to)
        rounding = 4 * eps * jnp.abs(found.value)
        is_lower = found.value <= state.around.value + rounding
        is_lower &= all_finite(found)
        flat, around = jax.tree.map(
            lambda new, old: jnp.where(is_lower, new, old),
            (state.step.to, found),
            (state.flat, state.around),
        )
        less = jnp.where(state.damping > 0.01, state.damping / 8, 0)
        more = jnp.maximum(8 * state.damping, 0.125)
        damping = jnp.where(is_lower, less, more)
        step, is_known = _step(space, around, damping, flat, is_held, goal, own)
        limit = jnp.maximum(_TOLERANCE, rounding + spacing)
        is_done = is_lower & is_known & (damping == 0) & (step.edm <= limit)
        return _State(flat, around, damping, step, state.count + 1, is_done)

    zero = jnp.zeros_like(scale)
    unknown = _Expansion(jnp.full((), jnp.inf, dtype), zero, jnp.eye(size, dtype=dtype))
    step = _Step(first, zero[0], begin.response)
    count = jnp.zeros_like(space.most_steps)
    state = _State(flat, unknown, zero[0], step, count, jnp.array(False))
    end = jax.lax.while_loop(goes_on, iterate, state)
    done = end.is_done
    return Points(
        flat=jnp.where(done, end.step.to, end.flat),
        response=end.step.response,
        nll=end.around.value - jnp.where(done, end.step.edm, 0),
        is_minimum=done,
    )


def _step(
    space: Space,
    around: _Expansion,
    damping: Float[Array, ""],
    flat: Float[Array, " D"],
    is_held: Bool[Array, " D"],
    goal: Float[Array, " D"],
    own: Float[Array, "2 D"],
) -> tuple[_Step, Bool[Array, ""]]:
    """Finds the next step, and whether it is known which elements it holds.

    Those at their goals are held, as a normal distribution is conditioned; so are those
    that the step would move beyond their bounds.
    """
    matrix = space.metric.matrix()
    # What the data do not constrain has unit curvature.
    add = damping + jnp.where(space.metric.is_null, 1, 0)
    factor = jnp.linalg.cholesky(
        around.curvature + jnp.diag(add), symmetrize_input=False
    )
    solved = cho_solve((factor, True), jnp.column_stack([matrix.T, around.slope]))
    pulled, latent = solved[:, :-1], -solved[:, -1]
    free, spread = matmul(matrix, latent), matmul(matrix, pulled)
    errors = jnp.sqrt(jnp.diag(spread))
    correlations = spread / errors[:, None] / errors[None, :]

    def conditioned(fixed: Array, goal: Array) -> Array:
        """Returns the derivatives by what is fixed; and the same of each held one."""
        both = fixed[:, None] & fixed[None, :]
        inner = jnp.where(both, correlations, jnp.eye(flat.size, dtype=flat.dtype))
        missing = jnp.where(fixed, goal - flat - free, 0)
        given = jnp.column_stack([missing, own.T]) / errors[:, None]
        lower = jnp.linalg.cholesky(inner, symmetrize_input=False)
        forces = cho_solve((lower, True), given) / errors[:, None]
        return jnp.where(fixed[:, None], forces, 0)

    fixed, forces, is_known = is_held, conditioned(is_held, goal), jnp.array(True)
    if bounds_of(space.trainer) is not None:
        low, high = space.limits()

        def again(carry: Any) -> Any:
            count, fixed, goal, forces, _ = carry
            to = flat + free + matmul(spread, forces[:, 0])
            is_under, is_over = (~fixed & (to < low)), (~fixed & (to > high))
            force = forces[:, 0]
            pulls = jnp.where(goal == low, force < 0, force > 0)
            new = (fixed & (is_held | ~pulls)) | is_under | is_over
            goal = jnp.where(is_under, low, jnp.where(is_over, high, goal))
            same = jnp.all(new == fixed)
            return count + 1, new, goal, conditioned(new, goal), same

        start = (0, fixed, goal, forces, jnp.array(False))
        _, fixed, goal, forces, is_known = jax.lax.while_loop(
            lambda carry: ~carry[-1] & (carry[0] < _MOST_ROUNDS), again, start
        )
    latent = latent + matmul(pulled, forces[:, 0])
    moves = matmul(spread, forces)
    to = jnp.where(fixed, goal, flat + free + moves[:, 0])
    to = jnp.clip(to, *space.limits())
    edm = 0.5 * jnp.vdot(latent, matmul(around.curvature, latent))
    return _Step(to, edm, moves[:, 1:]), is_known


@program
def run_models(space: Space, flat: Float[Array, "K D"]) -> Any:
    """Returns the models with these parameters, stacked."""
    return eqx.filter_vmap(lambda flat: space.at(flat).model)(flat)

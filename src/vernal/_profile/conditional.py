"""Minima with some elements held, many in one compiled program."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._constraints import Bounds
from .._curvature import (
    Mode,
    Subject,
    choose_mode,
    gradient,
    hessian_matrix,
    jacobian_matrix,
    matmul,
    traced,
)
from .._program import program
from .._projection import DenseWhitening
from .._step import (
    AbstractTrainer,
    bounds_of,
    defined,
    live,
    negative_log_likelihood,
    priors_of,
    real_residuals,
    step_key,
)
from .._tree import ravel, unravel

# How far the likelihood may be above a minimum; a last step goes on from there.
_TOLERANCE = 1e-9

# However coarsely it is rounded: this is a fifth of an error bar.
_MOST_ROUNDED = 0.02

_MOST_DAMPING = 1e6

# In units of the rounding of one number, that of a sum of squares.
_ROUNDED = 64

# Squared lengths, in standard errors.
_SHORT = 0.1

# By so much the likelihood may fall from where it is not far from a minimum.
_FAR = 1.0

# How often other elements may be held at their bounds in a step.
_MOST_ROUNDS = 8


class Space(NamedTuple):
    """What is minimised, and in which space.

    - `trainer`: the trainer at the minimum, stripped.
    - `metric`: whitens all parameters there, without a bound.
    - `most_steps`: the most steps for each point.
    - `error_scale`: the error bar of the residuals; of any other likelihood it is 1.
    """

    trainer: AbstractTrainer
    batch: Any
    jac: Mode | None
    metric: DenseWhitening
    most_steps: Int[Array, ""]
    error_scale: Float[Array, ""]

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
        return live(self.trainer, unravel(flat, self.trainer.params))

    def nll(self, flat: Float[Array, " D"]) -> Float[Array, ""]:
        """Returns the negative logarithm of the likelihood, with the priors."""
        key = step_key(self.trainer)
        nll = negative_log_likelihood(self.at(flat), self.batch, key)
        return nll / self.error_scale**2


class Held(NamedTuple):
    """Which elements are held, two at most, and where: zero where there is none.

    - `units`: their unit vectors.
    - `along`: the shortest latent move by which each goes by its scale, the other not.
    - `goal`: their values, at their places.
    """

    units: Float[Any, "*K 2 D"]
    along: Float[Any, "*K 2 D"]
    goal: Float[Any, "*K D"]

    @property
    def flags(self) -> Bool[Any, "*K D"]:
        return self.units.any(axis=-2)


class Points(NamedTuple):
    """Minima, or where to begin.

    - `rows`: the parameters; then how they move with each of the elements held, all in
        units of the metric's scales, since a ratio of two units may overflow.
    - `nll`: the negative log-likelihood, with the priors.
    - `is_minimum`: whether it is the lowest where these are held.
    """

    rows: Float[Any, "*K 3 D"]
    nll: Float[Any, "*K"]
    is_minimum: Bool[Any, "*K"]

    @property
    def flat(self) -> Float[Any, "*K D"]:
        return self.rows[..., 0, :]


@program
def run_points(
    space: Space,
    held: Held,
    parents: Int[Any, " K"],
    points: Points,
    count: Int[Any, ""],
) -> Points:
    """Finds minima, in the order of the rows.

    Each begins at the row that is its parent: its own, or an earlier one.
    """
    # One after the other: side by side, all that is below would take longer to compile.
    expand, at = _expansion(space), jax.lax.dynamic_index_in_dim

    def next_one(index: Array, points: Points) -> Points:
        own = jax.tree.map(lambda x: at(x, index, keepdims=False), held)
        begin = at(points.rows, at(parents, index, keepdims=False), keepdims=False)
        found = _minimum(space, expand, own, begin)
        put = jax.lax.dynamic_update_index_in_dim
        return jax.tree.map(lambda x, new: put(x, new, index, 0), points, found)

    return jax.lax.fori_loop(0, count, next_one, points)


Form = Float[Array, "E E"]
r"""A quadratic form $M$, of one more row than there are parameters.

Near a point, with latent moves $u$, the negative log-likelihood is
$(u, 1)^\top M (u, 1) / 2$.
"""


def _expansion(space: Space) -> Callable[[Array], Form]:
    """Returns the function that expands to second order; of squares, Gauss-Newton."""
    trainer, flat, dtype = space.trainer, space.flat, space.metric.dtype
    key, batch, matrix = step_key(trainer), space.batch, space.metric.matrix()
    # The rows of other priors than normal ones have their slopes, not their values.
    priors = priors_of(trainer)
    is_normal = priors is None or not priors.others
    is_squares = "residuals" in defined(trainer) and is_normal
    name = "residuals" if "residuals" in defined(trainer) else "nll"
    subject = Subject(f"`{name}` of `{type(trainer).__name__}`", space.jac)
    of = real_residuals if is_squares else negative_log_likelihood
    own = lambda flat: of(space.at(flat), batch, key).astype(dtype)
    fn = traced(lambda flat: own(flat) / space.error_scale, flat)
    zero = jnp.zeros(matrix.shape[1], dtype)

    def of_squares(flat: Array) -> Form:
        if mode == "fwd":
            value, push = jax.linearize(fn, flat)
            rows = jax.vmap(push)(matrix.T)
        else:
            jacobian = jacobian_matrix(fn, flat, subject._replace(jac=mode))
            value, rows = fn(flat), matmul(jacobian, matrix).T
        # All products at once: those with a vector take long to compile.
        rows = jnp.vstack([rows, value])
        return matmul(rows, rows.T)

    def of_loss(flat: Array) -> Form:
        near = lambda latent: fn(flat + matmul(matrix, latent))
        hessian = hessian_matrix(near, zero, subject)
        slope, value = gradient(near, zero, subject), near(zero)
        last = jnp.append(slope, 2 * value)
        return jnp.column_stack([jnp.vstack([hessian, slope]), last])

    if not is_squares:
        return of_loss
    mode = choose_mode(fn, flat, subject)
    return of_squares


class _Step(NamedTuple):
    """A step from a point, above whose end the likelihood is by `edm`.

    - `to`: where it ends.
    - `response`: how that moves with each of the elements held.
    - `latent`: the latent moves.
    - `is_known`: whether it is known which elements are at their bounds.
    """

    to: Float[Array, " D"]
    response: Float[Array, "2 D"]
    latent: Float[Array, " D"]
    edm: Float[Array, ""]
    is_known: Bool[Array, ""]


class _State(NamedTuple):
    """The lowest point so far, the form there, and the step to the next one.

    `rest` is the curvature that the form leaves out, as that of Gauss-Newton does.
    """

    flat: Float[Array, " D"]
    form: Form
    rest: Float[Array, "D D"]
    damping: Float[Array, ""]
    step: _Step
    tried: Int[Array, ""]
    is_done: Bool[Array, ""]


def _minimum(
    space: Space, expand: Callable[[Array], Form], held: Held, begin: Array
) -> Points:
    """Finds the minimum by damped Newton steps in the whitened space.

    The first point is along the response of that where it begins.
    """
    flat, response, dtype, size = begin[0], begin[1:], begin.dtype, begin.shape[1]
    eps, scale = float(jnp.finfo(dtype).eps), space.metric.scale
    # What is held is where it is meant to be.
    apart = jnp.where(held.flags, 0, 16 * eps * flat / scale)
    spacing = 0.5 * jnp.sum(apart**2)
    newton, clip = _newton(space, held), lambda flat: flat
    if bounds_of(space.trainer) is not None:
        clip = lambda flat: jnp.clip(flat, *space.limits())
    onto = lambda flat: clip(jnp.where(held.flags, held.goal, flat))
    moved = jnp.sum(held.units * ((held.goal - flat) / scale)[None, :], axis=1)
    first = onto(flat + scale * jnp.sum(moved[:, None] * response, axis=0))

    def goes_on(state: _State) -> Array:
        is_hopeless = state.damping > _MOST_DAMPING
        return ~state.is_done & ~is_hopeless & (state.tried < space.most_steps)

    def iterate(state: _State) -> _State:
        found = expand(state.step.to)
        value, before = 0.5 * found[-1, -1], 0.5 * state.form[-1, -1]
        rounding = 4 * eps * jnp.abs(value)
        is_lower = (value <= before + rounding) & jnp.isfinite(jnp.sum(found))
        lowest = jnp.where(is_lower, state.step.to, state.flat)
        form = jnp.where(is_lower, found, state.form)
        rest = jnp.where(is_lower, _rest(state, found), 0)
        less = jnp.where(state.damping > 0.1, state.damping / 8, 0)
        more = jnp.maximum(8 * state.damping, 0.125)
        damping = jnp.where(is_lower, less, more)
        step = newton(form + jnp.pad(rest, (0, 1)), damping, lowest)
        # Far away the others may be better where they are.
        is_far = (state.tried == 0) & ~(is_lower & (step.edm < _FAR))
        to = jnp.where(is_far, onto(flat), step.to)
        latent = jnp.where(is_far, jnp.inf, step.latent)
        hidden = jnp.minimum(rounding + spacing, _MOST_ROUNDED)
        limit = jnp.maximum(_TOLERANCE, hidden)
        is_done = is_lower & step.is_known & (damping == 0) & (step.edm <= limit)
        step = step._replace(to=to, latent=latent)
        return _State(lowest, form, rest, damping, step, state.tried + 1, is_done)

    zero, no, infinite = jnp.zeros((), dtype), jnp.array(False), np.full(size, np.inf)
    step = _Step(first, response, jnp.asarray(infinite, dtype), zero, no)
    unknown = jnp.asarray(np.diag([*np.ones(size), np.inf]), dtype)
    nothing, count = jnp.zeros((size, size), dtype), jnp.zeros_like(space.most_steps)
    state = _State(first, unknown, nothing, zero, step, count, no)
    end = jax.lax.while_loop(goes_on, iterate, state)
    # A long step promises no more, and where it ends has not been seen.
    is_short = jnp.sum(end.step.latent**2) < _SHORT
    lowest = jnp.where(end.is_done & is_short, end.step.to, end.flat)
    nll = 0.5 * end.form[-1, -1] - jnp.where(end.is_done, end.step.edm, 0)
    return Points(jnp.vstack([lowest, end.step.response]), nll, end.is_done)


def _rest(state: _State, new: Form) -> Float[Array, "D D"]:
    """Learns from a step what the form leaves out.

    It is the least symmetric update that explains the change of the slope, Powell's.
    See Dennis and Schnabel, *Numerical Methods for Unconstrained Optimization* (1983).
    """
    step, curvature = state.step.latent, new[:-1, :-1] + state.rest
    # Sums, since products with a vector take long to compile.
    known = jnp.sum(curvature * step[None, :], axis=1)
    missing, square = (new - state.form)[-1, :-1] - known, jnp.sum(step**2)
    is_known = (square > 0) & (square < _SHORT) & jnp.isfinite(state.form[-1, -1])
    unit = step / jnp.where(is_known, square, 1)
    half = missing - 0.5 * jnp.sum(missing * unit) * step
    update = half[:, None] * unit[None, :]
    return state.rest + jnp.where(is_known, update + update.T, 0)


def _newton(space: Space, held: Held) -> Callable[[Form, Array, Array], _Step]:
    """Returns the function that finds the next step, given what is held."""
    # A matrix of squares, such as a covariance, may overflow in the parameters' units.
    scale, size = space.metric.scale, held.goal.size
    matrix = space.metric.matrix() / scale[:, None]
    # Latent moves along which what is held moves; all others are those inside.
    across = matmul(held.along.T, matmul(held.units, matrix))
    inside = jnp.asarray(np.eye(size, dtype=matrix.dtype)) - across
    moves = jnp.column_stack([inside, held.along.T, np.zeros(size, matrix.dtype)])
    last = np.eye(1, size + 3, size + 2, dtype=matrix.dtype)
    basis = jnp.vstack([moves, last])
    response = matmul(held.along, matrix.T)
    bounds = None if bounds_of(space.trainer) is None else space.limits()

    def newton(form: Form, damping: Array, flat: Array) -> _Step:
        # What the data do not constrain has a small curvature: it follows the others.
        least = float(jnp.finfo(matrix.dtype).eps) ** 0.5
        add = damping + jnp.where(space.metric.is_null, least, 0)
        form = form + jnp.diag(jnp.pad(add, (0, 1)))
        form = matmul(basis.T, matmul(form, basis))
        curvature, right = form[:size, :size] + across, form[:size, size:]
        if bounds is not None:
            right = jnp.column_stack([right, matmul(inside, matrix.T)])
        solved = _solve(curvature, right)
        moves, latent = -matmul(solved[:, :3].T, matrix.T), -solved[:, 2]
        to, now = flat + scale * moves[2], response + moves[:2]
        if bounds is None:
            edm = -0.5 * jnp.sum(latent * right[:, 2])
            to = jnp.where(held.flags, held.goal, to)
            return _Step(to, now, latent, edm, jnp.array(True))
        spread = matmul(matrix, solved[:, 3:])
        to, now, force, is_known = _within(bounds, held, (to, now), spread, scale)
        latent = latent + matmul(solved[:, 3:], force)
        edm = 0.5 * jnp.vdot(latent, matmul(curvature, latent))
        return _Step(to, now, latent, edm, is_known)

    return newton


def _within(
    bounds: tuple[Array, Array],
    held: Held,
    free: tuple[Array, Array],
    spread: Float[Array, "D D"],
    scale: Float[Array, " D"],
) -> tuple[Array, Array, Array, Array]:
    """Holds elements at the bounds that a step would cross.

    `spread` is how far they move for a slope, each in units of its `scale`. Returns
    where the step ends and the response there, the slopes that keep these elements at
    their bounds, and whether it is known which they are.
    """
    (low, high), (beyond, response) = bounds, free
    errors = jnp.where(held.flags, 1, jnp.sqrt(jnp.diag(spread)))[:, None]

    def forces(fixed: Array, goal: Array) -> Array:
        """Returns the slopes that bring elements to their goals, and that hold them."""
        both = fixed[:, None] & fixed[None, :]
        unit = jnp.eye(beyond.size, dtype=beyond.dtype)
        inner = jnp.where(both, spread / errors / errors.T, unit)
        given = jnp.column_stack([(goal - beyond) / scale, -response.T]) / errors
        return _solve(inner, jnp.where(fixed[:, None], given, 0)) / errors

    def again(carry: Any) -> Any:
        count, fixed, goal, force, _ = carry
        to = beyond + scale * matmul(spread, force[:, 0])
        is_other = ~fixed & ~held.flags
        is_under, is_over = is_other & (to < low), is_other & (to > high)
        is_inward = jnp.where(goal == low, force[:, 0] < 0, force[:, 0] > 0)
        new = (fixed & ~is_inward) | is_under | is_over
        goal = jnp.where(is_under, low, jnp.where(is_over, high, goal))
        return count + 1, new, goal, forces(new, goal), jnp.all(new == fixed)

    goes_on = lambda carry: ~carry[-1] & (carry[0] < _MOST_ROUNDS)
    force, none = jnp.zeros((beyond.size, 3), beyond.dtype), jnp.zeros(low.size, bool)
    start = 0, none, held.goal, force, jnp.array(False)
    _, fixed, goal, force, is_known = jax.lax.while_loop(goes_on, again, start)
    moves = matmul(spread, force)
    to = jnp.where(fixed | held.flags, goal, beyond + scale * moves[:, 0])
    return jnp.clip(to, low, high), response + moves[:, 1:].T, force[:, 0], is_known


def _solve(matrix: Array, right: Array) -> Array:
    """Solves with a matrix that is positive; NaN if it is not, beyond rounding."""
    lower = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    # What is left of a square, where the others are the best, may be rounding alone.
    left = jnp.diag(lower) ** 2 / jnp.diag(matrix)
    is_seen = jnp.min(left) > _ROUNDED * jnp.finfo(matrix.dtype).eps
    lower = jnp.where(is_seen, lower, jnp.nan)
    solve = partial(jax.lax.linalg.triangular_solve, lower, left_side=True, lower=True)
    return solve(solve(right), transpose_a=True)


@program
def run_limits(space: Space) -> tuple[Array, Array]:
    return space.limits()


@program
def run_models(trainer: AbstractTrainer, flat: Float[Any, "K D"]) -> Any:
    """Returns the models with these parameters, stacked."""
    model = lambda flat: live(trainer, unravel(flat, trainer.params)).model
    return eqx.filter_vmap(model)(flat)

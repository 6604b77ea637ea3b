"""How far a trainer is from the minimum of what it fits."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._boundary import Params
from .._constraints import flat_flags, held_at
from .._curvature import (
    Spectrum,
    Subject,
    gauss_newton_products,
    gradient,
    hessian_matrix,
    hessian_product,
    jacobian_matrix,
    traced,
)
from .._policy import StopReason
from .._projection import EigenProjector
from .._step import (
    AbstractTrainer,
    defined,
    live,
    negative_log_likelihood,
    overrides,
    prior_count,
    priors_of,
    pushed,
    score,
    scoring_residuals,
    step_key,
)
from .._tree import as_parameters, ravel, ravel_dtype, unravel, widest
from .edm import TOLERANCE, Distance, unknown
from .formulas import of_products
from .local import Curved, Local, Point, curved, rounding_of, spectral, triangle

LossAt = Callable[[Params], Float[Array, ""]]
"""A loss as a function of a tree of parameters."""

SUBJECT = Subject("what is minimised", is_quiet=True)

# No matrix with more parameters, or more elements, is formed.
MOST_PARAMETERS = 512
_MOST_ELEMENTS = 2**25

# A mean of squares over less than ten million data cannot resolve this fraction of it.
_UNSEEN = 1e-7


def what_falls(trainer: AbstractTrainer, is_least_squares: bool = False) -> str:
    """Returns what is minimised: `"residuals"`, `"nll"` or `"loss"`."""
    methods, priors = defined(trainer), priors_of(trainer)
    # A prior without curvature, as of an exponential, has no residual.
    is_squares = priors is None or not priors.others
    if is_least_squares or (methods == ("residuals",) and is_squares):
        return "residuals"
    return "loss" if "loss" in methods else "nll"


def minimised(trainer: AbstractTrainer, batch: Any, kind: str) -> LossAt:
    """Returns what falls, of the `kind` of `what_falls`, as a function of parameters.

    Squares of residuals fall as the negative log-likelihood does.
    """
    key = step_key(trainer)

    def value(params: Params) -> Array:
        at_params = live(trainer, params)
        if kind == "residuals":
            return negative_log_likelihood(at_params, batch, key)
        return score(at_params, batch, key).loss

    return value


def measure(
    trainer: AbstractTrainer,
    projector: EigenProjector | None,
    batch: Any,
    kind: str,
    fall: Any = None,
    held: Mapping[str, Bool[Array, "..."]] | None = None,
) -> Local:
    """Measures what `distance_of` needs, within a compiled program.

    The trainer is bare; directions that its `projector` dropped are not free. `kind` is
    what `what_falls` returns, and `fall` is how far the loss fell on the way here;
    without it, second derivatives are measured, also of squares, on a scale that is
    known. `held` are the elements that are pushed against their bounds, if known.
    """
    params, value = as_parameters(trainer.params), minimised(trainer, batch, kind)
    here = _Here(_wide(ravel(params)), params, projector)
    held = pushed(trainer, value) if held is None else held
    if kind == "residuals" and fall is not None:
        found = _by_jacobian(trainer, batch, here, value, held, fall)
    else:
        # The scale of an `nll` is known.
        found = _by_hessian(here, value, held, fall if kind == "loss" else None)
    return _with_held(found, flat_flags(held, params))


def _by_jacobian(
    trainer: AbstractTrainer,
    batch: Any,
    here: "_Here",
    value: LossAt,
    held: Mapping[str, Bool[Array, "..."]],
    fall: Any,
) -> Local:
    at = lambda flat: live(trainer, held_at(unravel(flat, here.params), held))
    key, met = step_key(trainer), set[type]()
    residuals = lambda flat: _wide(scoring_residuals(at(flat), batch, key, met))
    residuals, flat = traced(residuals, here.flat), here.flat
    vector = residuals(flat)
    # The residuals of scoring have no bound where that of counts is small.
    loss = _wide(value(here.params)) if met else 0.5 * jnp.sum(jnp.square(vector))
    if has_jacobian(vector.size, flat.size):
        try:
            jacobian = jacobian_matrix(residuals, flat, SUBJECT)
        except TypeError:
            return unknown(flat)
        priors = prior_count(trainer)
        return triangle(jacobian, vector, here.point(), fall, loss, priors)
    products = gauss_newton_products(residuals, flat)
    if products is None:
        return unknown(flat)
    push, pull = products
    data_count = jnp.count_nonzero(vector)
    degrees = jnp.maximum(data_count - flat.size, 1).astype(loss.dtype)
    tolerance = TOLERANCE * 2 * loss / degrees
    product = lambda v: pull(push(v))
    return of_products(loss, pull(vector), product, here.solve, tolerance)


def _by_hessian(
    here: "_Here", value: LossAt, held: Mapping[str, Bool[Array, "..."]], fall: Any
) -> Local:
    """Measures by second derivatives; `fall` is `None` where the scale is known."""
    flat, params = here.flat, here.params
    loss = traced(lambda x: _wide(value(held_at(unravel(x, params), held))), flat)
    now, tolerance = loss(flat), TOLERANCE
    if fall is not None:
        # The scale of a loss is not known: its fall, and its rounding, have one. A fit
        # that goes on at the minimum has no fall.
        least = jnp.fmax(rounding_of(now), _UNSEEN * abs(now))
        tolerance = jnp.fmax(TOLERANCE * fall, least)
    try:
        slope = gradient(loss, flat, SUBJECT)
        if flat.size > MOST_PARAMETERS:
            product = hessian_product(loss, flat, SUBJECT)
            return of_products(now, slope, product, here.solve, tolerance)
        hessian = hessian_matrix(loss, flat, SUBJECT)
    except TypeError:
        # No mode has second derivatives.
        return unknown(flat)
    return curved(now, slope, hessian, here.point(), tolerance)


def _with_held(local: Local, held: Any) -> Local:
    """Says of a point what is held: where that is all, it may be flat."""
    if isinstance(local, Distance):
        return local._replace(is_saddle=local.is_saddle & ~jnp.all(held))
    return local._replace(held=held)


def has_jacobian(data: int, size: int) -> bool:
    """Whether a Jacobian is small enough to be formed."""
    return size <= MOST_PARAMETERS and data * size <= _MOST_ELEMENTS


@eqx.filter_jit
def measure_jacobian(
    jacobian: Float[Array, "N D"],
    residuals: tuple[Float[Array, "..."], Float[Array, "..."]],
    held: Bool[Array, " D"],
    params: Params,
    projector: EigenProjector | None,
    fall: Any,
    priors: int,
) -> Local:
    """Measures what `measure` does from a Jacobian that is there already.

    `residuals` are those of scoring, and those whose squares are minimised; the last
    ones, so many as `priors`, are of priors.
    """
    here = _Here(_wide(ravel(params)), params, projector)
    vector, deviances = (_wide(part).ravel() for part in residuals)
    loss = 0.5 * jnp.sum(jnp.square(deviances))
    point = here.point()
    found = triangle(_wide(jacobian), vector, point, fall, loss, priors)
    return _with_held(found, held)


def measure_spectrum(
    spectrum: Spectrum,
    slope: Float[Array, " D"],
    squares: Float[np.ndarray, ""],
    size: int,
    held: Bool[Array, " D"],
    params: Params,
    projector: EigenProjector | None,
) -> Local:
    """Measures by a decomposed Jacobian of `size` residuals, on the host."""
    found = spectral(spectrum, slope, squares, size, _on_host(params, projector))
    return _with_held(found, np.asarray(held))


def surroundings(
    value: Float[Array, ""],
    slope: Float[Array, " D"],
    hessian: Float[Array, "D D"],
    held: Bool[Array, " D"],
    params: Params,
    projector: EigenProjector | None = None,
) -> Curved:
    """Makes a `Curved` of the derivatives of an `nll`, on the host."""
    loss, gradient, matrix = map(_wide, map(np.asarray, (value, slope, hessian)))
    found = curved(loss, gradient, matrix, _on_host(params, projector), TOLERANCE)
    return found._replace(held=np.asarray(held))


def _on_host(params: Params, projector: EigenProjector | None) -> Point:
    leaves = [np.asarray(leaf, float).ravel() for leaf in jax.tree.leaves(params)]
    flat: Any = np.concatenate(leaves)
    return jax.device_get(_Here(flat, params, projector).point())


def has_minimum(trainer: AbstractTrainer) -> bool:
    """Whether a fit ends where the gradient is zero.

    With random numbers, or hooks that change steps, it may end elsewhere.
    """
    has_hooks = overrides(trainer, "transform_grads") or overrides(trainer, "constrain")
    return trainer.key is None and not has_hooks


class _Here(NamedTuple):
    """The parameters, and the projector of the space in which they can move."""

    flat: Array
    params: Params
    projector: EigenProjector | None

    def point(self) -> Point:
        leaves = jax.tree.leaves(self.params)
        eps = [np.full(leaf.size, jnp.finfo(leaf.dtype).eps) for leaf in leaves]
        projector, basis = self.projector, None
        if projector is not None and projector.latent_size < self.flat.size:
            basis = projector.matrix
        return Point(self.flat, np.concatenate(eps).astype(self.flat.dtype), basis)

    def solve(self, vector: Array) -> Array:
        """Multiplies with a rough inverse of the curvature."""
        if self.projector is None:
            return vector
        natural = self.projector.precondition(unravel(vector, self.params))
        return ravel(natural, ravel_dtype(self.params))


def _wide(array: Any) -> Any:
    # No decomposition works in half precision.
    return array.astype(widest((array.dtype, jnp.dtype("float32"))))


def settled(reason: StopReason, distance: Distance) -> StopReason:
    """Returns why a solver ended, given its distance to the minimum."""
    if reason is StopReason.NON_FINITE:
        return reason
    if distance.is_endless:
        return StopReason.NO_MINIMUM
    if distance.is_minimum:
        return StopReason.CONVERGED
    if reason is StopReason.CONVERGED and distance.is_short:
        return StopReason.STALLED
    return reason

"""How far a trainer is from the minimum of what it fits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._curvature import (
    Flat,
    Subject,
    choose_mode,
    columns,
    gauss_newton_products,
    gradient,
    hessian_product,
    jacobian_matrix,
    traced,
)
from .._policy import StopReason
from .._step import AbstractTrainer, defined, live, real_residuals, score
from .._tree import as_parameters, ravel, ravel_dtype, unravel, widest
from .edm import TOLERANCE, Distance, Local, curved, of_products, triangle, unknown

_SUBJECT = Subject("what is minimised", is_quiet=True)

# A matrix is formed of no more parameters, and no more elements, than these.
MOST_PARAMETERS = 512
_MOST_ELEMENTS = 2**25


def what_falls(trainer: AbstractTrainer, is_least_squares: bool = False) -> str:
    """Tells what is minimised: `residuals`, `nll` or `loss`."""
    methods = defined(trainer)
    if is_least_squares or methods == ("residuals",):
        return "residuals"
    return "loss" if "loss" in methods else "nll"


def measure(
    trainer: AbstractTrainer,
    projector: Any,
    batch: Any,
    key: PRNGKeyArray | None,
    kind: str,
    fall: Any,
) -> Local:
    """Measures what `distance_of` needs, within a compiled program.

    **Arguments:**

    - `trainer`: bare, at the point.
    - `projector`: of the trainer that is not; what it has dropped is not free.
    - `batch`, `key`: what the methods are given.
    - `kind`: as `what_falls` tells.
    - `fall`: by how much the loss has fallen, on the way here.
    """
    params = as_parameters(trainer.params)
    flat = _wide(ravel(params))
    eps = np.concatenate(
        [np.full(x.size, jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)]
    ).astype(flat.dtype)
    at = lambda flat: live(trainer, unravel(flat, params))
    limit = TOLERANCE if kind == "nll" else TOLERANCE * jnp.fmax(fall, 0)
    if kind == "residuals":
        fn = traced(lambda flat: _wide(real_residuals(at(flat), batch, key)), flat)
        return _of_residuals(fn, flat, eps, projector, params, fall)
    fn = traced(lambda flat: _wide(score(at(flat), batch, key).loss), flat)
    return _of_loss(fn, flat, eps, projector, params, limit)


def _of_residuals(
    residuals: Flat,
    flat: Array,
    eps: np.ndarray,
    projector: Any,
    params: Any,
    fall: Any,
) -> Local:
    vector = residuals(flat)
    if flat.size <= MOST_PARAMETERS and vector.size * flat.size <= _MOST_ELEMENTS:
        try:
            mode = choose_mode(residuals, flat, _SUBJECT)
        except TypeError:
            return unknown(flat)
        jacobian = jacobian_matrix(residuals, flat, mode)
        return triangle(jacobian, vector, flat, eps, fall, _basis(projector))
    products = gauss_newton_products(residuals, flat)
    if products is None:
        return unknown(flat)
    push, pull = products
    loss = 0.5 * jnp.sum(jnp.square(vector))
    degrees = max(vector.size - flat.size, 1)
    limit = TOLERANCE * 2 * loss / degrees
    product = lambda v: pull(push(v))
    return of_products(loss, pull(vector), product, _solved(projector, params), limit)


def _of_loss(
    loss: Flat, flat: Array, eps: np.ndarray, projector: Any, params: Any, limit: Any
) -> Local:
    value = loss(flat)
    try:
        mode = choose_mode(loss, flat, _SUBJECT, ("bwd", "fwd"))
        product = hessian_product(loss, flat, _SUBJECT)
    except TypeError:
        # There are no second derivatives in any mode.
        return unknown(flat)
    slope = gradient(loss, flat, mode)
    if flat.size > MOST_PARAMETERS:
        return of_products(value, slope, product, _solved(projector, params), limit)
    hessian, basis = columns(product, flat), _basis(projector)
    return curved(value, slope, hessian, flat, eps, limit, basis)


def _wide(array: Array) -> Array:
    # No decomposition works in half precision.
    return array.astype(widest((array.dtype, jnp.dtype("float32"))))


def _basis(projector: Any) -> Array | None:
    """The directions in which a trainer can go, `None` for all."""
    if projector is None or projector.latent_size == projector.matrix.shape[0]:
        return None
    return projector.matrix


def _solved(projector: Any, params: Any) -> Flat:
    """Multiplies with a rough inverse of the curvature."""
    if projector is None:
        return lambda vector: vector
    dtype = ravel_dtype(params)
    return lambda v: ravel(projector.precondition(unravel(v, params)), dtype)


def settled(reason: StopReason, distance: Distance) -> StopReason:
    """Tells why a solver ended, once it is known how far from a minimum that was."""
    if reason is StopReason.NON_FINITE:
        return reason
    if distance.is_minimum:
        return StopReason.CONVERGED
    if reason is StopReason.CONVERGED and distance.is_short:
        return StopReason.STALLED
    return reason

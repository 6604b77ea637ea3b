"""How far a trainer is from the minimum of what it fits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ._edm import TOLERANCE, Distance, of_hessian, of_products, of_residuals
from ._objective import defined, live, real_residuals, score
from ._ravel import as_parameters, ravel, ravel_dtype, unravel
from ._ways import (
    HESSIANS,
    Function,
    first_that_works,
    forward_jacobian,
    hessian_products,
    jacobian_products,
    reverse_jacobian,
)

# A matrix is formed of no more parameters, and no more elements, than these.
_MOST_PARAMETERS = 512
_MOST_ELEMENTS = 2**25


def what_falls(trainer: Any, is_least_squares: bool = False) -> str:
    """Tells what is minimised: `residuals`, `nll` or `loss`."""
    methods = defined(trainer)
    if is_least_squares or methods == ("residuals",):
        return "residuals"
    return "loss" if "loss" in methods else "nll"


def measure(
    trainer: Any,
    projector: Any,
    batch: Any,
    key: PRNGKeyArray | None,
    kind: str,
    fall: Any,
) -> Distance:
    """Measures the distance to the minimum, within a compiled program.

    **Arguments:**

    - `trainer`: bare, at the point.
    - `projector`: of the trainer that is not; what it has dropped is not free.
    - `batch`, `key`: what the methods are given.
    - `kind`: as `what_falls` tells.
    - `fall`: by how much the loss has fallen, for a `loss`.
    """
    params = as_parameters(trainer.params)
    flat = ravel(params)
    eps = np.concatenate(
        [np.full(x.size, jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)]
    ).astype(flat.dtype)
    at = lambda flat: live(trainer, unravel(flat, params))
    if kind == "residuals":
        residuals = lambda flat: real_residuals(at(flat), batch, key)
        return _of_residuals(residuals, flat, eps, projector, params)
    loss = lambda flat: score(at(flat), batch, key).loss
    limit = TOLERANCE if kind == "nll" else TOLERANCE * jnp.fmax(fall, 0)
    return _of_loss(loss, flat, eps, projector, params, limit)


def _of_residuals(
    residuals: Function, flat: Array, eps: np.ndarray, projector: Any, params: Any
) -> Distance:
    count = jax.eval_shape(residuals, flat).size
    if flat.size <= _MOST_PARAMETERS and count * flat.size <= _MOST_ELEMENTS:
        found = first_that_works(residuals, flat, (forward_jacobian, reverse_jacobian))
        if found is None:
            return unknown(flat)
        jacobian, vector = found
        return of_residuals(jacobian, vector, flat, eps, _basis(projector))
    found = first_that_works(residuals, flat, (jacobian_products,))
    if found is None:
        return unknown(flat)
    vector, push, pull = found
    loss = 0.5 * jnp.sum(jnp.square(vector))
    degrees = max(count - flat.size, 1)
    solved = _solved(projector, params)
    return of_products(
        loss,
        pull(vector),
        lambda v: pull(push(v)),
        solved,
        TOLERANCE * 2 * loss / degrees,
    )


def _of_loss(
    loss: Function,
    flat: Array,
    eps: np.ndarray,
    projector: Any,
    params: Any,
    limit: Any,
) -> Distance:
    if flat.size <= _MOST_PARAMETERS:
        found = first_that_works(loss, flat, HESSIANS)
        if found is None:
            return unknown(flat)
        value, gradient, hessian = found
        basis = _basis(projector)
        return of_hessian(value, gradient, hessian, flat, eps, limit, basis)
    found = first_that_works(loss, flat, (hessian_products,))
    if found is None:
        return unknown(flat)
    value, gradient, product = found
    return of_products(value, gradient, product, _solved(projector, params), limit)


def unknown(flat: Array) -> Distance:
    """The distance where it cannot be had."""
    nan, no = jnp.full((), jnp.nan, flat.dtype), jnp.array(False)
    return Distance(nan, nan, no, no, jnp.zeros_like(flat))


def _basis(projector: Any) -> Array | None:
    """The directions in which a trainer can go, `None` for all."""
    if projector is None or projector.latent_size == projector.matrix.shape[0]:
        return None
    return projector.matrix


def _solved(projector: Any, params: Any) -> Function:
    """Multiplies with a rough inverse of the curvature."""
    if projector is None:
        return lambda vector: vector
    dtype = ravel_dtype(params)
    return lambda v: ravel(projector.precondition(unravel(v, params)), dtype)

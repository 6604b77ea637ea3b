"""Derivatives with respect to the flat vector of a tree of parameters.

These functions are not compiled by themselves: programs call them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._boundary import Params, whole_number
from .._tree import ravel, unravel
from .linalg import matmul
from .modes import (
    Flat,
    Subject,
    columns,
    gauss_newton_products,
    gradient,
    hessian_matrix,
    jacobian_matrix,
    traced,
)
from .singular import Spectrum, of_jacobian, of_products

TreeFn = Callable[[Params], Any]
"""A function of a tree of parameters."""


def checked_batch_size(batch_size: int | None) -> int | None:
    """Checks the number of columns to compute at a time; `None` stands for all."""
    if batch_size is None:
        return None
    return whole_number(batch_size, "batch_size", least=1)


def flat_fn(fn: TreeFn, params: Params, is_scalar: bool) -> tuple[Flat, Array]:
    """Returns a function of a flat vector, traced, and the vector.

    It is a scalar function, or one that returns residuals.
    """
    name = "fn" if is_scalar else "residuals"

    def of_flat(flat: Array) -> Array:
        value = fn(unravel(flat, params))
        if not eqx.is_array(value) or not jnp.issubdtype(value.dtype, jnp.floating):
            kind = value.dtype if eqx.is_array(value) else type(value).__name__
            raise TypeError(
                f"`{name}` must return a real floating-point array, but it returned "
                f"{kind}."
            )
        if is_scalar and value.shape != ():
            raise ValueError(
                f"`fn` must return a scalar, but it returned an array of shape "
                f"{value.shape}. For a vector of residuals, use `gauss_newton`."
            )
        if not is_scalar and value.shape == ():
            raise ValueError(
                "`residuals` must return an array of residuals, one for each datum, "
                "but it returned a scalar. For a scalar loss, use `hessian`."
            )
        return value if is_scalar else value.ravel()

    flat = ravel(params)
    return traced(of_flat, flat), flat


def jacobian_of(
    residuals: TreeFn, params: Params, batch_size: int | None, subject: Subject
) -> Float[Array, "N D"]:
    fn, flat = flat_fn(residuals, params, is_scalar=False)
    return jacobian_matrix(fn, flat, subject, batch_size)


def spectrum_of(
    residuals: TreeFn, params: Params, batch_size: int | None, subject: Subject
) -> Spectrum:
    """Decomposes the Gauss-Newton matrix by the singular values of the Jacobian."""
    fn, flat = flat_fn(residuals, params, is_scalar=False)
    if batch_size is not None:
        return of_products(fn, flat, batch_size, subject)
    return of_jacobian(jacobian_matrix(fn, flat, subject))


def hessian_of(
    fn: TreeFn, params: Params, batch_size: int | None, subject: Subject
) -> Float[Array, "D D"]:
    return hessian_matrix(*flat_fn(fn, params, is_scalar=True), subject, batch_size)


class Expansion(NamedTuple):
    """The Hessian and the gradient of a function at a point."""

    hessian: Float[Array, "D D"]
    gradient: Float[Array, " D"]


def expansion_of(
    fn: TreeFn, params: Params, batch_size: int | None, subject: Subject
) -> Expansion:
    """Computes the Hessian, and the gradient that was needed for it."""
    at_flat = flat_fn(fn, params, is_scalar=True)
    hessian = hessian_matrix(*at_flat, subject, batch_size)
    return Expansion(hessian, gradient(*at_flat, subject._replace(is_quiet=True)))


def gauss_newton_matrix(
    residuals: TreeFn, params: Params, batch_size: int | None, subject: Subject
) -> Float[Array, "D D"]:
    fn, flat = flat_fn(residuals, params, is_scalar=False)
    products = None
    if batch_size is not None and subject.jac is None:
        products = gauss_newton_products(fn, flat)
    if products is not None:
        push, pull = products
        matrix = columns(lambda v: pull(push(v)), flat, batch_size)
    else:
        jac = jacobian_matrix(fn, flat, subject, batch_size)
        matrix = matmul(jac.T, jac)
    # Residuals of higher precision do not make the parameters more precise.
    return ((matrix + matrix.T) / 2).astype(flat.dtype)

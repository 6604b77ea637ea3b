"""Curvature matrices of functions of a tree of parameters."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._ravel import as_parameters, ravel, unravel
from ._typing import Params, checked


def _columns(
    matvec: Callable[[Array], Array], like: Array, batch_size: int | None
) -> Float[Array, "D D"]:
    """Forms a symmetric matrix from its products with the unit vectors."""
    size = like.size

    def column(index: Array) -> Array:
        # Made where it is used: the identity would be a second matrix in memory.
        return matvec(jax.nn.one_hot(index, size, dtype=like.dtype))

    batch = size if batch_size is None else min(batch_size, size)
    matrix = jax.lax.map(column, jnp.arange(size), batch_size=batch)
    return (matrix + matrix.T) / 2


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(
            f"`batch_size` is the number of columns computed at a time and must be at "
            f"least 1, not {batch_size}; leave it out for all columns at once."
        )


def _real(value: Any, name: str) -> Array:
    """Returns what the user's function returned, if it is a real array."""
    if not eqx.is_array(value) or not jnp.issubdtype(value.dtype, jnp.floating):
        kind = value.dtype if eqx.is_array(value) else type(value).__name__
        raise TypeError(
            f"`{name}` must return a real floating-point array, but it returned {kind}."
        )
    return value


def hessian_matrix(
    fn: Callable[[Params], Any], params: Params, batch_size: int | None
) -> Array:
    """Computes what `hessian` returns; to be compiled with what is around it."""
    def flat_fn(flat: Array) -> Array:
        value = _real(fn(unravel(flat, params)), "fn")
        if value.shape != ():
            raise ValueError(
                f"`fn` must return a scalar, but it returned an array of shape "
                f"{value.shape}. For a vector of residuals, use `gauss_newton`."
            )
        return value

    flat = ravel(params)
    _, matvec = jax.linearize(jax.grad(flat_fn), flat)
    return _columns(matvec, flat, batch_size)


def gauss_newton_matrix(
    residuals: Callable[[Params], Any], params: Params, batch_size: int | None
) -> Array:
    """Computes what `gauss_newton` returns; to be compiled with what is around it."""
    def flat_residuals(flat: Array) -> Array:
        value = _real(residuals(unravel(flat, params)), "residuals")
        if value.ndim == 0:
            raise ValueError(
                "`residuals` must return an array of residuals, one for each datum, "
                "but it returned a scalar. For a scalar loss, use `hessian`."
            )
        return value

    flat = ravel(params)
    _, push = jax.linearize(flat_residuals, flat)
    pull = jax.linear_transpose(push, flat)
    return _columns(lambda tangent: pull(push(tangent))[0], flat, batch_size)


_hessian = eqx.filter_jit(hessian_matrix)
_gauss_newton = eqx.filter_jit(gauss_newton_matrix)


@checked
def hessian(
    fn: Callable[[Params], Any], params: Params, *, batch_size: int | None = None
) -> Float[Array, "D D"]:
    r"""The Hessian of a scalar function of a tree of parameters.

    $$H_{ij} = \frac{\partial^2 f}{\partial x_i \, \partial x_j}$$

    Rows and columns are in the order of `jax.flatten_util.ravel_pytree(params)`. Each
    column is a forward derivative of the gradient; the matrix is then made exactly
    symmetric. It compiles once for each `fn` and each set of shapes.

    **Arguments:**

    - `fn`: a function from a tree like `params` to a real scalar.
    - `params`: the point, a pytree of real floating-point arrays, with `None` for
        whatever is not a parameter. $D$ is the number of all their elements.
    - `batch_size`: the number of columns to compute at a time, to bound memory; all
        of them at once by default.

    **Returns:**

    A symmetric matrix of shape `(D, D)`, in the dtype of the ravelled parameters.

    **Raises:**

    A `ValueError` if `fn` returns anything but a scalar, if `params` has no leaf, or
    if `batch_size` is less than 1. A `TypeError` if a parameter is complex or not an
    array of floats.
    """
    _check_batch_size(batch_size)
    return _hessian(fn, as_parameters(params), batch_size)


@checked
def gauss_newton(
    residuals: Callable[[Params], Any],
    params: Params,
    *,
    batch_size: int | None = None,
) -> Float[Array, "D D"]:
    r"""The Gauss–Newton matrix of a vector of residuals.

    $$F = J^\top J, \qquad J_{ni} = \frac{\partial r_n}{\partial x_i}$$

    It is the Fisher matrix where each residual is divided by its standard deviation,
    and the Hessian of $\frac12 \sum_n r_n^2$ without the curvature of the residuals
    themselves. Unlike the Hessian it has no negative eigenvalue, at a minimum or not.

    Rows and columns are in the order of `jax.flatten_util.ravel_pytree(params)`.
    Each column is a forward derivative of `residuals` followed by its transpose, so
    that $J$ as a whole is not kept. It compiles once for each `residuals` and each
    set of shapes.

    **Arguments:**

    - `residuals`: a function from a tree like `params` to a real array of any shape
        but that of a scalar.
    - `params`: the point, a pytree of real floating-point arrays, with `None` for
        whatever is not a parameter. $D$ is the number of all their elements.
    - `batch_size`: the number of columns to compute at a time, to bound memory; all
        of them at once by default.

    **Returns:**

    A symmetric matrix of shape `(D, D)`, in the dtype of the ravelled parameters.

    **Raises:**

    A `ValueError` if `residuals` returns a scalar, if `params` has no leaf, or if
    `batch_size` is less than 1. A `TypeError` if `residuals` returns no real array, or
    if a parameter is complex or not an array of floats.
    """
    _check_batch_size(batch_size)
    return _gauss_newton(residuals, as_parameters(params), batch_size)

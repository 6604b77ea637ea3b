"""Curvature matrices of functions of a tree of parameters."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial, all_leaves
from jaxtyping import Array, Float

from ._alike import require_alike
from ._precision import matmul
from ._programs import program
from ._ravel import as_parameters, ravel, ravel_dtype, unravel
from ._typing import Params, checked, whole_number

Product = Callable[[Array], Array]
"""A linear map of flat vectors."""


def checked_batch_size(batch_size: int | None) -> int | None:
    """Checks a number of columns to compute at a time: `None` stands for all."""
    if batch_size is None:
        return None
    return whole_number(batch_size, "batch_size", least=1)


def _real(value: Any, name: str) -> Array:
    """Returns what the user's function returned, if it is a real array."""
    if not eqx.is_array(value) or not jnp.issubdtype(value.dtype, jnp.floating):
        kind = value.dtype if eqx.is_array(value) else type(value).__name__
        raise TypeError(
            f"`{name}` must return a real floating-point array, but it returned {kind}."
        )
    return value


def _flat_fn(fn: Callable[[Params], Any], params: Params) -> Callable[[Array], Array]:
    def flat_fn(flat: Array) -> Array:
        value = _real(fn(unravel(flat, params)), "fn")
        if value.shape != ():
            raise ValueError(
                f"`fn` must return a scalar, but it returned an array of shape "
                f"{value.shape}. For a vector of residuals, use `gauss_newton`."
            )
        return value

    return flat_fn


def _flat_residuals(
    residuals: Callable[[Params], Any], params: Params
) -> Callable[[Array], Array]:
    def flat_residuals(flat: Array) -> Array:
        value = _real(residuals(unravel(flat, params)), "residuals")
        if value.ndim == 0:
            raise ValueError(
                "`residuals` must return an array of residuals, one for each datum, "
                "but it returned a scalar. For a scalar loss, use `hessian`."
            )
        return value.ravel()

    return flat_residuals


def _along_axes(
    product: Callable[[Array], Array], like: Array, batch_size: int | None
) -> Float[Array, "D image"]:
    """Applies a linear map to the unit vectors, `batch_size` of them at a time."""
    size = like.size

    def image(index: Array) -> Array:
        # Made where it is used: the identity would be a second matrix in memory.
        return product(jax.nn.one_hot(index, size, dtype=like.dtype))

    if batch_size is None:
        return jax.vmap(image)(jnp.arange(size))
    return jax.lax.map(image, jnp.arange(size), batch_size=min(batch_size, size))


def _hessian_product(fn: Callable[[Params], Any], params: Params) -> Product:
    """Returns the product with flat vectors, all else computed beforehand."""
    return jax.linearize(jax.grad(_flat_fn(fn, params)), ravel(params))[1]


def _jacobian_products(
    residuals: Callable[[Params], Any], params: Params
) -> tuple[Product, Product]:
    """Returns the products with the Jacobian and with its transpose."""
    flat = ravel(params)
    _, push = jax.linearize(_flat_residuals(residuals, params), flat)
    transposed = jax.linear_transpose(push, flat)
    return push, lambda cotangent: transposed(cotangent)[0]


def hessian_matrix(
    fn: Callable[[Params], Any], params: Params, batch_size: int | None
) -> Float[Array, "D D"]:
    """Computes what `hessian` returns; to be compiled with what is around it."""
    product = _hessian_product(fn, params)
    matrix = _along_axes(product, ravel(params), batch_size)
    return (matrix + matrix.T) / 2


def gauss_newton_matrix(
    residuals: Callable[[Params], Any], params: Params, batch_size: int | None
) -> Float[Array, "D D"]:
    """Computes what `gauss_newton` returns; to be compiled with what is around it."""
    flat = ravel(params)
    push, pull = _jacobian_products(residuals, params)
    if batch_size is None:
        transposed = _along_axes(push, flat, None)
        matrix = matmul(transposed, transposed.T)
    else:
        matrix = _along_axes(lambda v: pull(push(v)), flat, batch_size)
    # Residuals of higher precision do not make the parameters any more precise.
    return ((matrix + matrix.T) / 2).astype(flat.dtype)


_hessian = program(hessian_matrix)
_gauss_newton = program(gauss_newton_matrix)


class MatrixFree(eqx.Module):
    """The product with a curvature matrix that is not formed.

    It maps a tree like the parameters to one, and compiles once for each function and
    each set of shapes.
    """

    function: Callable[[Params], Any]
    params: Params
    is_gauss_newton: bool = eqx.field(static=True)

    def __call__(self, tangent: Params) -> Params:
        """Multiplies the matrix with a tree like the parameters."""
        arrays = as_parameters(tangent, "tangent")
        require_alike(arrays, self.params, "`tangent`", "`params`")
        return _multiply(self, arrays)

    def flat(self) -> Product:
        """Returns the product with flat vectors, all else computed beforehand."""
        if not self.is_gauss_newton:
            return _hessian_product(self.function, self.params)
        push, pull = _jacobian_products(self.function, self.params)
        return lambda vector: pull(push(vector))


def _as_pytree(function: Callable[[Params], Any]) -> Callable[[Params], Any]:
    """Hides a plain function from `jax.jit`, which takes no leaf of such a kind."""
    return Partial(function) if all_leaves([function]) else function


@program
def _multiply(matrix: MatrixFree, tangent: Params) -> Params:
    flat = ravel(tangent, ravel_dtype(matrix.params))
    return unravel(matrix.flat()(flat), matrix.params)


@checked
def hessian(
    fn: Callable[[Params], Any], params: Params, *, batch_size: int | None = None
) -> Float[Array, "D D"]:
    r"""The Hessian of a scalar function of a tree of parameters.

    $$H_{ij} = \frac{\partial^2 f}{\partial x_i \, \partial x_j}$$

    Rows and columns are in the order of `jax.flatten_util.ravel_pytree(params)`. Each
    column is a forward derivative of the gradient; the matrix is then made exactly
    symmetric. It compiles once for each `fn`, which is known by its identity, and each
    set of shapes; and anew where the code of `fn`, or what it reads, has changed.

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
    return _hessian(fn, as_parameters(params), checked_batch_size(batch_size))


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
    $J$ is formed by forward derivatives; or, with `batch_size`, each column of $F$ is a
    forward derivative followed by its transpose, and $J$ as a whole is never kept. It
    compiles once for each `residuals`, which is known by its identity, and each set of
    shapes; and anew where its code, or what it reads, has changed.

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
    batch_size = checked_batch_size(batch_size)
    return _gauss_newton(residuals, as_parameters(params), batch_size)


@checked
def hessian_matvec(
    fn: Callable[[Params], Any], params: Params
) -> Callable[[Params], Params]:
    r"""The product of a Hessian with a vector, without the matrix.

    $$v \mapsto H v, \qquad H_{ij} = \frac{\partial^2 f}{\partial x_i \, \partial x_j}$$

    at the cost of some evaluations of `fn`, for
    [`vernal.EigenProjector.from_matvec`][]. See Pearlmutter, *Fast exact
    multiplication by the Hessian*, Neural Computation 6 (1994).

    **Arguments:**

    - `fn`, `params`: as for [`vernal.hessian`][].

    **Returns:**

    A function from a tree like `params` to one. It is a pytree, and goes through
    `jax.jit` as an argument.

    **Raises:**

    A `TypeError` if a parameter is complex or not an array of floats. When it is
    called: a `ValueError` if `fn` returns anything but a scalar, or the tree is not
    like `params`.
    """
    return MatrixFree(_as_pytree(fn), as_parameters(params), False)


@checked
def gauss_newton_matvec(
    residuals: Callable[[Params], Any], params: Params
) -> Callable[[Params], Params]:
    r"""The product of a Gauss-Newton matrix with a vector, without the matrix.

    $$v \mapsto J^\top (J v), \qquad J_{ni} = \frac{\partial r_n}{\partial x_i}$$

    at the cost of some evaluations of `residuals`, for
    [`vernal.EigenProjector.from_matvec`][].

    **Arguments:**

    - `residuals`, `params`: as for [`vernal.gauss_newton`][].

    **Returns:**

    A function from a tree like `params` to one. It is a pytree, and goes through
    `jax.jit` as an argument.

    **Raises:**

    A `TypeError` if a parameter is complex or not an array of floats. When it is
    called: a `ValueError` if `residuals` returns a scalar, or the tree is not like
    `params`.
    """
    return MatrixFree(_as_pytree(residuals), as_parameters(params), True)

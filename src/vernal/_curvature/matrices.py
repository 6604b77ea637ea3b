"""Curvature matrices of functions of a tree of parameters."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.tree_util import Partial, all_leaves
from jaxtyping import Array, Float

from .._boundary import Params, checked, takes, whole_number
from .._program import program
from .._tree import as_parameters, ravel, ravel_dtype, require_alike, unravel
from .linalg import matmul
from .modes import (
    Mode,
    Subject,
    checked_mode,
    choose_mode,
    columns,
    gauss_newton_products,
    hessian_product,
    jacobian_matrix,
    traced,
)
from .singular import Spectrum, of_jacobian, of_products

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


def _subject(function: Any, name: str, jac: Any) -> Subject:
    takes(function, 1, name, f"{name}(params)")
    return Subject(f"`{name}`", checked_mode(jac))


def jacobian_of(
    residuals: Callable[[Params], Any],
    params: Params,
    batch_size: int | None,
    subject: Subject,
) -> Float[Array, "N D"]:
    """Computes what `jacobian` returns; to be compiled with what is around it."""
    flat = ravel(params)
    fn = traced(_flat_residuals(residuals, params), flat)
    return jacobian_matrix(fn, flat, choose_mode(fn, flat, subject), batch_size)


def spectrum_of(
    residuals: Callable[[Params], Any],
    params: Params,
    batch_size: int | None,
    subject: Subject,
) -> Spectrum:
    """Decomposes the Gauss-Newton matrix by the singular values of the Jacobian."""
    flat = ravel(params)
    fn = traced(_flat_residuals(residuals, params), flat)
    if batch_size is not None:
        return of_products(fn, flat, batch_size, subject)
    return of_jacobian(jacobian_matrix(fn, flat, choose_mode(fn, flat, subject)))


def hessian_matrix(
    fn: Callable[[Params], Any],
    params: Params,
    batch_size: int | None,
    subject: Subject,
) -> Float[Array, "D D"]:
    """Computes what `hessian` returns; to be compiled with what is around it."""
    flat = ravel(params)
    product = hessian_product(traced(_flat_fn(fn, params), flat), flat, subject)
    matrix = columns(product, flat, batch_size)
    return (matrix + matrix.T) / 2


def gauss_newton_matrix(
    residuals: Callable[[Params], Any],
    params: Params,
    batch_size: int | None,
    subject: Subject,
) -> Float[Array, "D D"]:
    """Computes what `gauss_newton` returns; to be compiled with what is around it."""
    flat = ravel(params)
    fn = traced(_flat_residuals(residuals, params), flat)
    products = None
    if batch_size is not None and subject.jac is None:
        products = gauss_newton_products(fn, flat)
    if products is not None:
        push, pull = products
        matrix = columns(lambda v: pull(push(v)), flat, batch_size)
    else:
        mode = choose_mode(fn, flat, subject)
        jac = jacobian_matrix(fn, flat, mode, batch_size)
        matrix = matmul(jac.T, jac)
    # Residuals of higher precision do not make the parameters any more precise.
    return ((matrix + matrix.T) / 2).astype(flat.dtype)


_hessian = program(hessian_matrix)
_gauss_newton = program(gauss_newton_matrix)
_jacobian = program(jacobian_of)


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
        flat = ravel(self.params)
        if not self.is_gauss_newton:
            fn = traced(_flat_fn(self.function, self.params), flat)
            return hessian_product(fn, flat, Subject("`fn`"))
        fn = traced(_flat_residuals(self.function, self.params), flat)
        products = gauss_newton_products(fn, flat)
        if products is None:
            raise TypeError(
                "`residuals` can be differentiated in one mode alone, and "
                "`gauss_newton_matvec` needs both. Form the matrix, with "
                "`gauss_newton`, which does not."
            )
        push, pull = products
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
    fn: Callable[[Params], Any],
    params: Params,
    *,
    batch_size: int | None = None,
    jac: Mode | None = None,
) -> Float[Array, "D D"]:
    r"""The Hessian of a scalar function of a tree of parameters.

    $$H_{ij} = \frac{\partial^2 f}{\partial x_i \, \partial x_j}$$

    Rows and columns are in the order of `jax.flatten_util.ravel_pytree(params)`. Each
    column is a forward derivative of the gradient, if that is possible; the matrix is
    then made exactly symmetric. It compiles once for each `fn`, which is known by its
    identity, and each set of shapes; and anew where the code of `fn`, or what it reads,
    has changed.

    **Arguments:**

    - `fn`: a function from a tree like `params` to a real scalar.
    - `params`: the point, a pytree of real floating-point arrays, with `None` for
        whatever is not a parameter. $D$ is the number of all their elements.
    - `batch_size`: the number of columns to compute at a time, to bound memory; all
        of them at once by default.
    - `jac`: how to take the gradient: `"fwd"` in forward mode, `"bwd"` in reverse
        mode. By default in reverse mode, where that is possible.

    **Returns:**

    A symmetric matrix of shape `(D, D)`, in the dtype of the ravelled parameters.

    **Raises:**

    A `ValueError` if `fn` returns anything but a scalar, if `params` has no leaf, or
    if `batch_size` is less than 1. A `TypeError` if a parameter is complex or not an
    array of floats, or if `fn` cannot be differentiated twice.
    """
    batch_size, subject = checked_batch_size(batch_size), _subject(fn, "fn", jac)
    return _hessian(fn, as_parameters(params), batch_size, subject)


@checked
def gauss_newton(
    residuals: Callable[[Params], Any],
    params: Params,
    *,
    batch_size: int | None = None,
    jac: Mode | None = None,
) -> Float[Array, "D D"]:
    r"""The Gauss–Newton matrix of a vector of residuals.

    $$F = J^\top J, \qquad J_{ni} = \frac{\partial r_n}{\partial x_i}$$

    It is the Fisher matrix where each residual is divided by its standard deviation,
    and the Hessian of $\frac12 \sum_n r_n^2$ without the curvature of the residuals
    themselves. Unlike the Hessian it has no negative eigenvalue, at a minimum or not.

    Rows and columns are in the order of `jax.flatten_util.ravel_pytree(params)`.
    $J$ is formed by forward derivatives; or, with `batch_size`, each column of $F$ is a
    forward derivative followed by its transpose, and $J$ as a whole is never kept.
    Where one mode alone is possible, or asked for, $J$ is kept as a whole. It compiles
    once for each `residuals`, which is known by its identity, and each set of shapes;
    and anew where its code, or what it reads, has changed.

    **Arguments:**

    - `residuals`: a function from a tree like `params` to a real array of any shape
        but that of a scalar.
    - `params`: the point, a pytree of real floating-point arrays, with `None` for
        whatever is not a parameter. $D$ is the number of all their elements.
    - `batch_size`: the number of columns to compute at a time, to bound memory; all
        of them at once by default.
    - `jac`: how to differentiate: `"fwd"` in forward mode, a pass for each parameter;
        `"bwd"` in reverse mode, a pass for each residual. By default in forward mode,
        where that is possible.

    **Returns:**

    A symmetric matrix of shape `(D, D)`, in the dtype of the ravelled parameters.

    **Raises:**

    A `ValueError` if `residuals` returns a scalar, if `params` has no leaf, or if
    `batch_size` is less than 1. A `TypeError` if `residuals` returns no real array, if
    it cannot be differentiated, or if a parameter is complex or not an array of floats.
    """
    batch_size, subject = (
        checked_batch_size(batch_size),
        _subject(residuals, "residuals", jac),
    )
    return _gauss_newton(residuals, as_parameters(params), batch_size, subject)


@checked
def jacobian(
    residuals: Callable[[Params], Any],
    params: Params,
    *,
    batch_size: int | None = None,
    jac: Mode | None = None,
) -> Float[Array, "N D"]:
    r"""The Jacobian of a vector of residuals.

    $$J_{ni} = \frac{\partial r_n}{\partial x_i}$$

    Rows are in the order of the ravelled residuals, columns in that of
    `jax.flatten_util.ravel_pytree(params)`. A projector that is made from it, with
    [`vernal.EigenProjector.from_jacobian`][], has twice the digits of one made from
    $J^\top J$. It compiles once for each `residuals`, which is known by its identity,
    and each set of shapes: what `residuals` reads from outside of its arguments must
    not change.

    **Arguments:**

    - `residuals`, `params`, `jac`: as for [`vernal.gauss_newton`][].
    - `batch_size`: the number of columns, or in reverse mode of rows, to compute at a
        time, to bound the memory of the derivatives; all of them at once by default.

    **Returns:**

    A matrix of shape `(N, D)`, in the dtype of the residuals.

    **Raises:**

    As [`vernal.gauss_newton`][].
    """
    batch_size, subject = (
        checked_batch_size(batch_size),
        _subject(residuals, "residuals", jac),
    )
    return _jacobian(residuals, as_parameters(params), batch_size, subject)


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
    takes(fn, 1, "fn", "fn(params)")
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
    takes(residuals, 1, "residuals", "residuals(params)")
    return MatrixFree(_as_pytree(residuals), as_parameters(params), True)

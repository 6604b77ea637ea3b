"""Derivatives of functions of a tree of parameters: matrices, and products with them.

The functions named after what they return are not compiled by themselves: programs of
other folders call them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax.tree_util import Partial, all_leaves
from jaxtyping import Array, Float

from .._boundary import Params, checked, takes, whole_number
from .._program import program
from .._tree import as_parameters, ravel, ravel_dtype, require_alike, unravel
from .linalg import Spectrum, matmul, of_jacobian, of_products
from .modes import (
    Flat,
    Mode,
    Subject,
    columns,
    gauss_newton_products,
    gradient,
    hessian_matrix,
    hessian_product,
    jacobian_matrix,
    traced,
)

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


@program
def _hessian(
    fn: TreeFn, params: Params, batch_size: int | None, subject: Subject
) -> Float[Array, "D D"]:
    return hessian_matrix(*flat_fn(fn, params, is_scalar=True), subject, batch_size)


_gauss_newton = program(gauss_newton_matrix)
_jacobian = program(jacobian_of)


@checked
def hessian(
    fn: Callable[[Params], Any],
    params: Params,
    *,
    batch_size: int | None = None,
    jac: Mode | None = None,
) -> Float[Array, "D D"]:
    r"""Computes the Hessian of a scalar function of a tree of parameters.

    $$H_{ij} = \frac{\partial^2 f}{\partial x_i \, \partial x_j}$$

    Rows and columns are in the order of `jax.flatten_util.ravel_pytree(params)`. Each
    column is a forward derivative of the gradient, if that is possible. The matrix is
    exactly symmetric. It compiles once for each `fn`, compared by identity, and each
    set of shapes, and again if the code of `fn`, or what it reads, has changed.

    **Arguments:**

    - `fn`: a function from a tree like `params` to a real scalar.
    - `params`: the point, a pytree of real floating-point arrays, with `None` for all
        that is not a parameter. $D$ is the number of all their elements.
    - `batch_size`: the number of columns to compute at a time, to bound memory; all
        of them at once by default.
    - `jac`: the mode of the gradient, `"fwd"` (forward) or `"bwd"` (reverse). By
        default reverse mode, if that is possible.

    **Returns:**

    A symmetric matrix of shape `(D, D)`, in the dtype of the ravelled parameters.

    **Raises:**

    - `ValueError`: if `fn` does not return a scalar, if `params` has no leaf, or if
        `batch_size` is less than 1.
    - `TypeError`: if a parameter is complex or not an array of floats, or if `fn`
        cannot be differentiated twice.
    """
    return _compute(_hessian, fn, "fn", params, batch_size, jac)


@checked
def gauss_newton(
    residuals: Callable[[Params], Any],
    params: Params,
    *,
    batch_size: int | None = None,
    jac: Mode | None = None,
) -> Float[Array, "D D"]:
    r"""Computes the Gauss–Newton matrix of a vector of residuals.

    $$F = J^\top J, \qquad J_{ni} = \frac{\partial r_n}{\partial x_i}$$

    It is the Fisher matrix if each residual is divided by its standard deviation, and
    the Hessian of $\frac12 \sum_n r_n^2$ without the second derivatives of the
    residuals. Unlike the Hessian it has no negative eigenvalue, at a minimum or not.

    Rows and columns are in the order of `jax.flatten_util.ravel_pytree(params)`.
    Forward derivatives form $J$. With `batch_size`, each column of $F$ is a forward
    derivative followed by its transpose, and $J$ is not kept, unless only one mode is
    possible or `jac` is given. It compiles once for each `residuals`, compared by
    identity, and each set of shapes, and again if its code, or what it reads, has
    changed.

    **Arguments:**

    - `residuals`: a function from a tree like `params` to a real array of at least one
        dimension.
    - `params`, `batch_size`: as for [`vernal.hessian`][].
    - `jac`: the mode of differentiation, `"fwd"` (forward: a pass for each parameter)
        or `"bwd"` (reverse: a pass for each residual). By default forward mode, if that
        is possible.

    **Returns:** and **Raises:** as [`vernal.hessian`][]; a `ValueError` if `residuals`
    returns a scalar, a `TypeError` if it does not return a real array or cannot be
    differentiated.
    """
    return _compute(_gauss_newton, residuals, "residuals", params, batch_size, jac)


@checked
def jacobian(
    residuals: Callable[[Params], Any],
    params: Params,
    *,
    batch_size: int | None = None,
    jac: Mode | None = None,
) -> Float[Array, "N D"]:
    r"""Computes the Jacobian of a vector of residuals.

    $$J_{ni} = \frac{\partial r_n}{\partial x_i}$$

    Rows are in the order of the ravelled residuals, columns in that of
    `jax.flatten_util.ravel_pytree(params)`. A projector made from it by
    [`vernal.EigenProjector.from_jacobian`][] has twice the digits of one made from
    $J^\top J$. It compiles as [`vernal.gauss_newton`][] does.

    **Arguments:**

    - `residuals`, `params`, `jac`: as for [`vernal.gauss_newton`][].
    - `batch_size`: the number of columns (in reverse mode, of rows) to compute at a
        time, to bound the memory of the derivatives; all of them at once by default.

    **Returns:**

    A matrix of shape `(N, D)`, in the dtype of the residuals.

    **Raises:**

    As [`vernal.gauss_newton`][].
    """
    return _compute(_jacobian, residuals, "residuals", params, batch_size, jac)


def _compute(
    of: Callable[..., Array],
    function: TreeFn,
    name: str,
    params: Params,
    batch_size: int | None,
    jac: Mode | None,
) -> Array:
    """Checks the arguments, and runs the program `of`."""
    batch_size = checked_batch_size(batch_size)
    takes(function, 1, name, f"{name}(params)")
    subject = Subject(f"`{name}`", jac)
    return of(function, as_parameters(params), batch_size, subject)


class MatrixFree(eqx.Module):
    """The product with a curvature matrix that is not formed.

    It maps a tree like the parameters to another, and compiles once for each function
    and each set of shapes.
    """

    function: TreeFn
    params: Params
    is_gauss_newton: bool = eqx.field(static=True)

    def __call__(self, tangent: Params) -> Params:
        """Multiplies the matrix with a tree like the parameters."""
        arrays = as_parameters(tangent, "tangent")
        require_alike(arrays, self.params, "`tangent`", "`params`")
        return _multiply(self, arrays)

    def flat(self) -> Flat:
        """Returns the product with flat vectors; all else is computed first."""
        at_flat = flat_fn(self.function, self.params, not self.is_gauss_newton)
        if not self.is_gauss_newton:
            return hessian_product(*at_flat, Subject("`fn`"))
        products = gauss_newton_products(*at_flat)
        if products is None:
            raise TypeError(
                "`residuals` can be differentiated in one mode alone, and "
                "`gauss_newton_matvec` needs both. Form the matrix, with "
                "`gauss_newton`, which does not."
            )
        push, pull = products
        return lambda vector: pull(push(vector))


def _as_pytree(function: TreeFn) -> TreeFn:
    """Makes a pytree of a plain function, which `jax.jit` refuses as a leaf."""
    return Partial(function) if all_leaves([function]) else function


@program
def _multiply(matrix: MatrixFree, tangent: Params) -> Params:
    flat = ravel(tangent, ravel_dtype(matrix.params))
    return unravel(matrix.flat()(flat), matrix.params)


@checked
def hessian_matvec(
    fn: Callable[[Params], Any], params: Params
) -> Callable[[Params], Params]:
    r"""Returns the product of a Hessian with vectors, without forming the matrix.

    $$v \mapsto H v, \qquad H_{ij} = \frac{\partial^2 f}{\partial x_i \, \partial x_j}$$

    A product costs a few evaluations of `fn`. It is meant for
    [`vernal.EigenProjector.from_matvec`][]. See Pearlmutter, *Fast exact
    multiplication by the Hessian*, Neural Computation 6 (1994).

    **Arguments:**

    - `fn`, `params`: as for [`vernal.hessian`][].

    **Returns:**

    A function from a tree like `params` to another. It is a pytree, and can be an
    argument of a function under `jax.jit`.

    **Raises:**

    - `TypeError`: if a parameter is complex or not an array of floats.
    - `ValueError`: when the product is called, if `fn` does not return a scalar or the
        tree is not like `params`.
    """
    takes(fn, 1, "fn", "fn(params)")
    return MatrixFree(_as_pytree(fn), as_parameters(params), False)


@checked
def gauss_newton_matvec(
    residuals: Callable[[Params], Any], params: Params
) -> Callable[[Params], Params]:
    r"""Returns the product of a Gauss–Newton matrix with vectors, without forming it.

    $$v \mapsto J^\top (J v), \qquad J_{ni} = \frac{\partial r_n}{\partial x_i}$$

    A product costs a few evaluations of `residuals`. It is meant for
    [`vernal.EigenProjector.from_matvec`][].

    **Arguments:**

    - `residuals`, `params`: as for [`vernal.gauss_newton`][].

    **Returns:** and **Raises:** as [`vernal.hessian_matvec`][]; a `ValueError` if
    `residuals` returns a scalar.
    """
    takes(residuals, 1, "residuals", "residuals(params)")
    return MatrixFree(_as_pytree(residuals), as_parameters(params), True)

"""Curvature matrices of functions of a tree of parameters."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from .._boundary import Params, checked, takes
from .._program import program
from .._tree import as_parameters
from .flat import (
    TreeFn,
    checked_batch_size,
    gauss_newton_matrix,
    hessian_of,
    jacobian_of,
)
from .modes import Mode, Subject

_hessian = program(hessian_of)
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

    **Returns:**

    A symmetric matrix of shape `(D, D)`, in the dtype of the ravelled parameters.

    **Raises:**

    - `ValueError`: if `residuals` returns a scalar, if `params` has no leaf, or if
        `batch_size` is less than 1.
    - `TypeError`: if `residuals` does not return a real array or cannot be
        differentiated, or if a parameter is complex or not an array of floats.
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

"""Products with a curvature matrix that is not formed."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jax.tree_util import Partial, all_leaves
from jaxtyping import Array

from .._boundary import Params, checked, takes
from .._program import program
from .._tree import as_parameters, ravel, ravel_dtype, require_alike, unravel
from .flat import TreeFn, flat_fn
from .modes import Subject, gauss_newton_products, hessian_product

Product = Callable[[Array], Array]
"""A linear map of flat vectors."""


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

    def flat(self) -> Product:
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

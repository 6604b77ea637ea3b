"""Eigendecompositions as plain functions of a matrix."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from .._boundary import checked
from .linalg import (
    Matrix,
    as_real_square,
    as_square,
    descending,
    equilibrated_eigh,
    first_index,
    refuse,
    refuse_non_finite,
)


@jax.jit
def _eigh_rows(matrix: Array) -> tuple[Array, Array]:
    values, vectors = descending(matrix)
    return values, vectors.T


@jax.jit
def _eig_rows(matrix: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eig(matrix)
    order = jnp.argsort(values.real)[::-1]
    return values[order], vectors[:, order].T


@checked
def decompose(
    matrix: Matrix, hermitian: bool = True, normalise: bool = False
) -> tuple[Float[Array, " D"], Inexact[Array, "D D"]]:
    r"""Returns the eigenvalues of a matrix, descending, and its eigenvectors as rows.

    The function comes from `zodiax.optimisation.decompose`.

    **Arguments:**

    - `matrix`: a square matrix of shape `(D, D)`.
    - `hermitian`: whether `matrix` is symmetric (Hermitian if it is complex). If so,
        only its symmetric part counts. If not, it must be real, with real eigenvalues.
    - `normalise`: whether to divide the eigenvalues by the largest.

    **Returns:**

    The eigenvalues, of shape `(D,)`, and the eigenvectors, of shape `(D, D)`, such that
    `matrix @ vectors[i]` is `values[i] * vectors[i]`.

    **Raises:**

    - `ValueError`: if `matrix` is not square or not finite, if an eigenvalue is
        complex, or if `normalise` would divide by zero. Under `jax.jit`, an error when
        the program runs.
    - `TypeError`: if `matrix` is complex and not Hermitian.
    """
    array = refuse_non_finite(as_square(matrix, "matrix"), "matrix")
    if hermitian:
        values, vectors = _eigh_rows(array)
    else:
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(
                "`matrix` is complex and not Hermitian, so that its eigenvectors are "
                "complex too; `decompose` returns real ones. Use `jnp.linalg.eig`."
            )
        complex_values, complex_vectors = _eig_rows(array)
        is_complex = complex_values.imag != 0
        values = refuse(
            complex_values.real,
            is_complex,
            "`matrix` has complex eigenvalues, which have no descending order. Use "
            "`hermitian=True` for a symmetric matrix, else `jnp.linalg.eig`.",
            lambda: (
                f"The first of them is eigenvalue {first_index(is_complex)}: "
                f"{complex_values[is_complex][0]}."
            ),
        )
        vectors = complex_vectors.real
    if normalise:
        values = refuse(
            values,
            values[0] == 0,
            "`normalise` divides by the largest eigenvalue of `matrix`, eigenvalue "
            "[0], which is 0. Leave `normalise` out.",
        )
        values = values / values[0]
    return values, vectors


@eqx.filter_jit
def _project(
    matrix: Float[Array, "D D"], is_fisher: bool
) -> tuple[Float[Array, "D D"], Float[Array, " D"], Float[Array, ""]]:
    """Returns the projection, the eigenvalues, and how large rounding makes a zero."""
    scale, values, vectors = equilibrated_eigh(matrix)
    eps = float(jnp.finfo(values.dtype).eps)
    tolerance = max(10.0, values.size**0.5) * eps * values[0]
    # Errors name the direction of a null column, so none may be infinite.
    roots = jnp.sqrt(jnp.where(values <= tolerance, 1, values))
    if is_fisher:
        return vectors / roots[None, :] / scale[:, None], values, tolerance
    return vectors * roots[None, :] * scale[:, None], values, tolerance


@checked
def eigen_projection(fmat: Matrix | None = None, cov: Matrix | None = None) -> Array:
    r"""Returns the matrix that maps a whitened space to the parameters.

    Given a Fisher matrix $F$ (or a Hessian at a minimum), returns $P$ such that

    $$P^\top F P = I,$$

    so that a quadratic function whose Hessian in the parameters $x = x_0 + P u$ is $F$
    has the identity as its Hessian in $u$. Given a covariance $C$, it does so for
    $F = C^{-1}$.

    The matrix is first scaled to a unit diagonal, $N = S F S$ with
    $S = \mathrm{diag}(F)^{-1/2}$: units that differ by many orders of magnitude would
    make it ill-conditioned. With $N = V \Lambda V^\top$, the projection is
    $P = S V \Lambda^{-1/2}$; for a covariance it is $P = S^{-1} V \Lambda^{1/2}$.
    Either way $P P^\top = F^{-1} = C$.

    The function comes from `zodiax.optimisation.eigen_projection`. For a tree of
    parameters, or a singular matrix, see [`vernal.EigenProjector`][].

    **Arguments:**

    - `fmat`: the Fisher matrix, of shape `(D, D)`. Only its symmetric part counts.
    - `cov`: the covariance matrix, of shape `(D, D)`, instead of `fmat`.

    **Returns:**

    $P$, of shape `(D, D)`. Its columns are in descending order of the eigenvalues of
    the scaled matrix; the sign of each is arbitrary.

    **Raises:**

    - `ValueError`: unless exactly one matrix is given, and it is square, finite and
        positive definite to working precision. The error names the index. Under
        `jax.jit`, an error when the program runs.
    - `TypeError`: if the matrix is complex.
    """
    match fmat, cov:
        case None, None:
            raise ValueError("Must provide either `fmat` or `cov`; both are missing.")
        case _, None:
            name, given = "fmat", fmat
        case None, _:
            name, given = "cov", cov
        case _:
            raise ValueError(
                "`fmat` and `cov` are both given, and may disagree. Give one of them."
            )
    matrix = refuse_non_finite(as_real_square(given, name), name)
    diagonal = jnp.diag(matrix)

    def first() -> str:
        index = int(np.argmax(diagonal <= 0))
        return f"It is element [{index}, {index}]: {diagonal[index]}."

    matrix = refuse(
        matrix,
        diagonal <= 0,
        f"`{name}` has an element on its diagonal that is not positive, so that the "
        "parameter has no scale. Leave the parameter out, or use `EigenProjector`, "
        "which finds such directions.",
        first,
    )
    projection, values, tolerance = _project(matrix, fmat is not None)

    def direction() -> str:
        last = values.size - 1
        scale = jnp.sqrt(diagonal)
        vector = projection[:, last] * (scale if fmat is not None else 1 / scale)
        rows = np.flatnonzero(abs(vector) > 0.1 * jnp.max(abs(vector)))
        shown = ", ".join(map(str, rows[:10])) + (", ..." if rows.size > 10 else "")
        return (
            f"The lowest is eigenvalue [{last}]: {values[last]}; its direction "
            f"involves the parameters [{shown}]."
        )

    remedy = (
        "is not a minimum: use `gauss_newton` for a matrix without such eigenvalues"
        if fmat is not None
        else "belongs to no covariance"
    )
    projection = refuse(
        projection,
        values < -tolerance,
        f"`{name}` is indefinite: scaled to a unit diagonal it has a negative "
        f"eigenvalue. Such a point {remedy}.",
        direction,
    )
    return refuse(
        projection,
        values <= tolerance,
        f"`{name}` is singular: scaled to a unit diagonal it has an eigenvalue that "
        "is zero to working precision. Use `EigenProjector`, which can drop such "
        "directions or give them a prior.",
        direction,
    )

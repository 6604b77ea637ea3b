"""Eigendecompositions of symmetric matrices whose units differ."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Inexact, Num

from .._boundary import checked, refuse_foreign
from .._tree import widest

Matrix = Num[Array, "..."] | Num[np.ndarray, "..."]


def as_square(matrix: Matrix, name: str) -> Inexact[Array, "D D"]:
    """Returns `matrix` as an array of floats, once it is known to be square."""
    refuse_foreign(matrix, f"`{name}`")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"`{name}` must be a square matrix, with as many rows as columns, but it "
            f"has shape {matrix.shape}."
        )
    if matrix.size == 0:
        raise ValueError(f"`{name}` is empty; it needs at least one row.")
    array = jnp.asarray(matrix)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return array.astype(float)
    # No eigensolver works in half precision.
    return array.astype(widest((array.dtype, jnp.dtype("float32"))))


def as_real_square(matrix: Matrix, name: str) -> Float[Array, "D D"]:
    """Returns `matrix` as `as_square` does, if it is real."""
    array = as_square(matrix, name)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(
            f"`{name}` must be real, but it is {array.dtype}. Write a complex "
            "parameter as two real ones, its real and its imaginary part."
        )
    return array


def refuse(
    array: Array,
    bad: Bool[Array, "..."],
    message: str,
    detail: Callable[[], str] = str,
) -> Array:
    """Returns `array`, or raises an error where any of `bad` is true.

    Known values raise a `ValueError` that ends in `detail()`. Traced ones are checked
    when the program runs, by `eqx.error_if`, whose message is fixed beforehand.
    """
    if isinstance(bad, Tracer):
        return eqx.error_if(array, bad, message)
    if np.any(bad):
        raise ValueError(" ".join([message, detail()]).rstrip())
    return array


def first_index(bad: Bool[Array, "..."]) -> str:
    """Writes the index of the first true element, such as `[2, 3]`."""
    return str(np.argwhere(bad)[0].tolist())


@jax.jit
def _any_non_finite(matrix: Inexact[Array, "N D"]) -> Bool[Array, ""]:
    return ~jnp.all(jnp.isfinite(matrix))


def refuse_non_finite(matrix: Inexact[Array, "N D"], name: str) -> Array:
    """Returns `matrix`, or raises an error that names its first non-finite element."""
    return refuse(
        matrix,
        _any_non_finite(matrix),
        f"`{name}` has an element that is not finite.",
        lambda: f"The first of them is at {first_index(~jnp.isfinite(matrix))}.",
    )


def descending(
    matrix: Inexact[Array, "D D"], symmetrize: bool = True
) -> tuple[Float[Array, " D"], Inexact[Array, "D D"]]:
    vectors, values = jax.lax.linalg.eigh(matrix, symmetrize_input=symmetrize)
    return values[::-1], vectors[:, ::-1]


def equilibrated_eigh(
    matrix: Float[Array, "D D"], scale: Float[Array, " D"]
) -> tuple[Float[Array, " D"], Float[Array, "D D"]]:
    """Decomposes the symmetric part of `matrix` divided by `scale` from both sides.

    The sides are divided one after the other, since the product of two scales may
    overflow where no element of the result does.

    **Returns:**

    The eigenvalues, descending, and the eigenvectors as columns.
    """
    scaled = matrix / scale[:, None] / scale[None, :]
    return descending((scaled + scaled.T) / 2, symmetrize=False)


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
    r"""The eigenvalues of a matrix in descending order, and its eigenvectors as rows.

    The function has its origin in `zodiax.optimisation.decompose`.

    **Arguments:**

    - `matrix`: a square matrix of shape `(D, D)`.
    - `hermitian`: whether `matrix` is symmetric (Hermitian, if it is complex). If it
        is, only its symmetric part counts. If not, it must be a real matrix whose
        eigenvalues are real.
    - `normalise`: whether to divide the eigenvalues by the first, the largest.

    **Returns:**

    A pair of the eigenvalues, of shape `(D,)`, and the eigenvectors, of shape
    `(D, D)`, such that `matrix @ vectors[i]` is `values[i] * vectors[i]`.

    **Raises:**

    A `ValueError` if `matrix` is not square or not finite, if an eigenvalue is complex,
    or if `normalise` would divide by zero; under `jax.jit`, where values are not known,
    an error when the program runs. A `TypeError` for a complex matrix that is not
    Hermitian.
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


def null_tolerance(size: int, dtype: np.dtype) -> float:
    """Returns the relative size of an eigenvalue that rounding alone may produce."""
    return max(10.0, size**0.5) * float(jnp.finfo(dtype).eps)


@eqx.filter_jit
def _project(
    matrix: Float[Array, "D D"], is_fisher: bool
) -> tuple[Float[Array, "D D"], Float[Array, " D"], Bool[Array, " D"]]:
    scale = jnp.sqrt(jnp.diag(matrix))
    values, vectors = equilibrated_eigh(matrix, scale)
    null = values <= null_tolerance(values.size, values.dtype) * values[0]
    # The error path reads the direction of a null column, so none may be infinite.
    roots = jnp.sqrt(jnp.where(null, 1, values))
    if is_fisher:
        return vectors / roots[None, :] / scale[:, None], values, null
    return vectors * roots[None, :] * scale[:, None], values, null


@checked
def eigen_projection(fmat: Matrix | None = None, cov: Matrix | None = None) -> Array:
    r"""The matrix that maps a whitened space to that of the parameters.

    Given a Fisher matrix $F$ (or a Hessian at a minimum), returns $P$ such that

    $$P^\top F P = I,$$

    so that a quadratic with the Hessian $F$ in the parameters $x = x_0 + P u$ has the
    identity for its Hessian in $u$. A covariance $C$ stands for $F = C^{-1}$.

    The matrix is first scaled to a unit diagonal, $N = S F S$ with
    $S = \mathrm{diag}(F)^{-1/2}$, since parameters whose units differ by many orders
    of magnitude would otherwise ruin its condition. With $N = V \Lambda V^\top$, the
    projection is $P = S V \Lambda^{-1/2}$; for a covariance it is
    $P = S^{-1} V \Lambda^{1/2}$. Either way $P P^\top = F^{-1} = C$.

    The function has its origin in `zodiax.optimisation.eigen_projection`. For
    parameters that form a tree, or a matrix that is singular, see
    [`vernal.EigenProjector`][].

    **Arguments:**

    - `fmat`: the Fisher matrix, of shape `(D, D)`. Only its symmetric part counts.
    - `cov`: the covariance matrix, of shape `(D, D)`, instead of `fmat`.

    **Returns:**

    $P$, of shape `(D, D)`. Its columns are in descending order of the eigenvalues of
    the scaled matrix; the sign of each is arbitrary.

    **Raises:**

    A `ValueError` unless exactly one matrix is given, which must be square, finite and
    positive definite to working precision; the error names the offending index. Under
    `jax.jit`, where values are not known, an error when the program runs. A
    `TypeError` if the matrix is complex.
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
    matrix = refuse(
        matrix,
        diagonal <= 0,
        f"`{name}` has an element on its diagonal that is not positive, so that the "
        "parameter has no scale. Leave the parameter out, or use `EigenProjector`, "
        "which finds such directions.",
        lambda: f"It is {_where(diagonal <= 0, diagonal)}.",
    )
    projection, values, null = _project(matrix, fmat is not None)
    tolerance = null_tolerance(values.size, values.dtype) * values[0]
    negative = values < -tolerance

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
        negative,
        f"`{name}` is indefinite: scaled to a unit diagonal it has a negative "
        f"eigenvalue. Such a point {remedy}.",
        direction,
    )
    return refuse(
        projection,
        null,
        f"`{name}` is singular: scaled to a unit diagonal it has an eigenvalue that "
        "is zero to working precision. Use `EigenProjector`, which can drop such "
        "directions or give them a prior.",
        direction,
    )


def _where(bad: Bool[Array, " D"], values: Float[Array, " D"]) -> str:
    index = int(np.flatnonzero(bad)[0])
    return f"element [{index}, {index}]: {values[index]}"

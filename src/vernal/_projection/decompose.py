"""Whitening by a given matrix or Jacobian."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from .._boundary import Params, refuse_foreign
from .._curvature import (
    IndefiniteError,
    Matrix,
    Spectrum,
    as_real_square,
    equilibrated_eigh,
    of_jacobian,
    on_device,
    refuse,
    refuse_non_finite,
)
from .._tree import element_name, paths, ravel_dtype, ravel_size, widest
from .dense import DenseWhitening, whiten_spectrum
from .nulls import NullPolicy, list_parameters

# Rounding leaves a zero below this many machine epsilons.
ROUNDING = 64

# Of the roots of two diagonal elements. Rounding in products stays below it even in
# bfloat16, the default of a TPU. A missing triangle is as large as the correlations.
_MOST_LOPSIDED = 0.02

Kind = Literal["fmat", "cov", "hessian"]

_REMEDY = {
    "fmat": "Such a point is not a minimum. Go on with the fit, or use `gauss_newton`, "
    "whose matrix has no negative eigenvalue anywhere.",
    "cov": "Such a matrix belongs to no covariance. If it is the inverse of a Hessian, "
    "its point is not a minimum: use `gauss_newton`, whose matrix has no negative "
    "eigenvalue anywhere.",
    "hessian": "This point is not a minimum. Fit first; or, if a fit ended here, give "
    "it more steps (`max_steps=`) if it took them all, else start it elsewhere, and "
    "see `result.explain()`. Or define `residuals`, whose Fisher matrix has no "
    "negative eigenvalue anywhere. `table()`, without a batch, shows the values alone.",
}

# Of a Hessian whose diagonal is exactly zero.
_LINEAR = (
    "What is minimised is linear in that element here. Where it has absolute values, "
    "the minimum is a kink, and there are no errors of this kind: use a smooth loss, "
    "such as that of `vn.likelihoods.Robust`. Otherwise this is no minimum. Fit first; "
    "or, if a fit ended here, start it elsewhere, and see `result.explain()`. "
    "`table()`, without a batch, shows the values alone."
)


def whiten(
    given: Matrix, params: Params, nulls: NullPolicy, name: str, kind: Kind
) -> DenseWhitening:
    """Finds the map that whitens the parameters by their matrix `given`.

    Errors call the matrix `name`, with a remedy for its `kind`. If all directions are
    null, the latent vector is empty.
    """
    size = ravel_size(params)
    bare = name.strip("`")
    matrix = jax.lax.stop_gradient(as_real_square(given, bare))
    if matrix.shape[0] != size:
        raise ValueError(
            f"{name} has shape {matrix.shape}, but it is that of {size} elements, "
            f"those of {', '.join(map(repr, paths(params)[:5]))}, and must have shape "
            f"{(size, size)}, in the order of `jax.flatten_util.ravel_pytree`."
        )
    eps = _noise(given, matrix)
    nulls = nulls.or_rtol(size * eps)
    nulls.check(size)
    matrix = refuse_non_finite(matrix, bare)
    bad, lopsided = _faults(matrix, max(_MOST_LOPSIDED, eps**0.5))
    matrix = _refuse_bad_rows(matrix, bad, kind, name, params)
    if kind != "hessian":  # which vernal has made symmetric
        matrix = _refuse_lopsided(matrix, lopsided, name, params)

    dtype = widest((matrix.dtype, ravel_dtype(params)))
    is_inverse = kind != "cov"
    scale, values, vectors = _decompose(matrix.astype(dtype), is_inverse)
    known = values if isinstance(values, Tracer) else np.asarray(values)
    tolerance = (nulls.rtol or 0) * known[0]
    values = refuse(
        values,
        known[-1] < -tolerance,
        f"{name} is indefinite: scaled to a unit diagonal it has a negative "
        f"eigenvalue. {_REMEDY[kind]}",
        lambda: (
            f"The lowest is {known[-1]}, beyond the tolerance of {tolerance}; its "
            f"direction involves {list_parameters(params, np.asarray(vectors)[:, -1])}."
        ),
        IndefiniteError,
    )
    spectrum = Spectrum(scale, values, vectors)
    return whiten_spectrum(spectrum, params, nulls, eps, name, is_inverse=is_inverse)


def _noise(given: Matrix, matrix: Float[Array, "N D"]) -> float:
    """Returns the coarser machine epsilon of the given and the converted matrix."""
    dtypes = [matrix.dtype]
    if jnp.issubdtype(given.dtype, jnp.floating):
        dtypes.append(given.dtype)
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


@functools.partial(jax.jit, static_argnums=1)
def _decompose(
    matrix: Float[Array, "D D"], is_inverse: bool
) -> tuple[Float[Array, " D"], Float[Array, " D"], Float[Array, "D D"]]:
    scale, values, vectors = equilibrated_eigh(matrix)
    return 1 / scale if is_inverse else scale, values, vectors


def _refuse_bad_rows(
    matrix: Float[Array, "D D"],
    bad: Bool[Array, " D"],
    kind: Kind,
    name: str,
    params: Params,
) -> Float[Array, "D D"]:
    """Refuses rows that no scale can repair, before the costly decomposition."""
    remedy = _REMEDY[kind]
    if kind == "hessian" and not isinstance(bad, Tracer) and np.any(bad):
        elements = np.diagonal(matrix)[np.asarray(bad)]
        remedy = remedy if elements.any() else _LINEAR

    def first() -> str:
        index = int(np.flatnonzero(bad)[0])
        element = np.asarray(matrix)[index, index]
        return f"The first is that of {element_name(params, index)}: {element}."

    return refuse(
        matrix,
        bad,
        f"{name} is indefinite: it has an element on its diagonal that is negative, "
        f"or zero in a row that is not. {remedy}",
        first,
        IndefiniteError,
    )


def _refuse_lopsided(
    matrix: Float[Array, "D D"],
    lopsided: Bool[Array, "D D"],
    name: str,
    params: Params,
) -> Float[Array, "D D"]:
    def first() -> str:
        i, j = np.argwhere(lopsided)[0].tolist()
        names = element_name(params, i), element_name(params, j)
        pair = float(matrix[i, j]), float(matrix[j, i])
        return f"The first are those of {' and '.join(names)}: {pair[0]} and {pair[1]}."

    return refuse(
        matrix,
        lopsided,
        f"{name} is not symmetric. If it is a Cholesky factor, give `L @ L.T`; if it "
        "is one triangle, fill in the other; if it is rounding, give half of the sum "
        "with its transpose.",
        first,
    )


@functools.partial(jax.jit, static_argnums=1)
def _faults(
    matrix: Float[Array, "D D"], most: float
) -> tuple[Bool[Array, " D"], Bool[Array, "D D"]]:
    """Finds bad rows, and elements that differ from their mirror images."""
    diagonal = jnp.diag(matrix)
    largest = jnp.max(jnp.abs(matrix + matrix.T), axis=1)
    is_bad = (diagonal < 0) | ((diagonal == 0) & (largest > 0))
    roots = jnp.sqrt(diagonal)
    # One root after the other: a product may overflow, or underflow.
    limit = jnp.asarray(most, matrix.dtype) * roots[:, None] * roots[None, :]
    return is_bad, jnp.abs(matrix - matrix.T) > limit


def whiten_jacobian(
    given: Matrix, params: Params, nulls: NullPolicy, name: str
) -> DenseWhitening:
    """Finds the map that whitens the parameters by a Jacobian that was checked."""
    size = ravel_size(params)
    nulls.check(size)
    jac = jax.lax.stop_gradient(on_device(given))
    if not jnp.issubdtype(jac.dtype, jnp.floating):
        jac = jac.astype(float)
    jac = refuse_non_finite(jac, name.strip("`"))
    dtype = widest((jac.dtype, ravel_dtype(params), jnp.dtype("float32")))
    eps = _noise(given, jac)
    nulls = nulls.or_rtol(jacobian_rtol(size, eps))
    spectrum = _refuse_steep(_of_jacobian(jac.astype(dtype)), params, name)
    return whiten_spectrum(spectrum, params, nulls, eps, name)


def _refuse_steep(spectrum: Spectrum, params: Params, name: str) -> Spectrum:
    """Refuses a column of a Jacobian whose standard error is zero in its dtype.

    In units of zero it would count as a column of zeros.
    """
    scale = spectrum.scale
    # NumPy compiles nothing.
    known = scale if isinstance(scale, Tracer) else np.asarray(scale)
    tiny = jnp.finfo(scale.dtype).tiny
    bad = known < tiny
    scale = refuse(
        scale,
        bad,
        f"{name} has a column whose norm is beyond {1 / tiny:.1e}, so that the error "
        f"is zero in {scale.dtype}. Use a smaller unit, or float64.",
        lambda: f"The first is that of {element_name(params, int(np.argmax(bad)))}.",
    )
    return spectrum._replace(scale=scale)


_of_jacobian = jax.jit(of_jacobian)


def check_jacobian(given: Matrix, params: Params, name: str) -> None:
    """Refuses what is not a real matrix with a column for each element of `params`."""
    refuse_foreign(given, name)
    size, shape = ravel_size(params), np.shape(given)
    if len(shape) != 2 or shape[1] != size or shape[0] == 0:
        raise ValueError(
            f"{name} has shape {shape}, but it must have a column for each of {size} "
            f"elements, those of {', '.join(map(repr, paths(params)[:5]))}, in the "
            "order of `jax.flatten_util.ravel_pytree`, and a row for each datum."
        )
    if jnp.issubdtype(given.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} must be real, but it is {given.dtype}. Of complex residuals, "
            "stack the rows of the real and of the imaginary part."
        )


def jacobian_rtol(size: int, eps: float) -> float:
    """Returns the default `rtol` for the square of a singular value.

    The elements of a Jacobian are right to a few `eps`, except in awkward cases. In any
    dtype directions count that are a sixteenth as well constrained as the best.
    """
    return min(max(size, ROUNDING) * eps, 1 / 16) ** 2

"""Whitening by a matrix or a Jacobian."""

import functools
import math
from typing import Any, Literal

import equinox as eqx
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
    matmul,
    of_jacobian,
    on_device,
    refuse,
    refuse_non_finite,
)
from .._tree import element_name, paths, ravel_dtype, ravel_size, widest
from .nulls import NullPolicy, list_parameters, name_null_space, written_directions
from .whitening import AbstractWhitening


class DenseWhitening(AbstractWhitening):
    r"""The matrix $P = S V R$.

    $S$ is diagonal and holds the units; the columns of $V$ are orthonormal and $R$ is
    diagonal, both without units. Products multiply by one factor after the other: the
    square of a unit may overflow.

    With a prior, null directions are the last columns of $V$, and have -1 in $R$. No
    shape then depends on their number, and the sign, which is arbitrary, marks them.
    """

    scale: Float[Array, " D"]
    vectors: Float[Array, "D latent"]
    roots: Float[Array, " latent"]
    null_vectors: Float[Array, "D dropped"]
    """The directions that were dropped."""
    eigenvalues: Float[Array, " D"]
    has_prior: bool = eqx.field(static=True)
    resolution: float = eqx.field(static=True)
    """Smaller components of a null direction count as zero."""

    @property
    def is_null(self) -> Bool[Array, "*members D"]:
        if self.has_prior:
            return self.roots < 0
        is_null = jnp.arange(self.eigenvalues.shape[-1]) >= self.roots.shape[-1]
        return jnp.broadcast_to(is_null, self.eigenvalues.shape)

    @property
    def rank(self) -> Any:
        if self.has_prior:
            return jnp.sum(self.roots > 0, axis=-1)
        return self.roots.shape[-1]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.roots.shape[-1:]

    def apply(self, latent: Float[Array, " latent"]) -> Float[Array, " D"]:
        return self.scale * matmul(self.vectors, self.roots * latent)

    def transpose(self, vector: Float[Array, " D"]) -> Float[Array, " latent"]:
        return self.roots * matmul(self.scale * vector, self.vectors)

    def invert(self, vector: Float[Array, " D"]) -> Float[Array, " latent"]:
        """Returns $P^+ x$, with the pseudo-inverse in the metric of $S^{-2}$."""
        return matmul(vector / self.scale, self.vectors) / self.roots

    @property
    def _factor(self) -> Float[Array, "D latent"]:
        return self.vectors * self.roots[None, :]

    def matrix(self) -> Float[Array, "D latent"]:
        return self.scale[:, None] * self._factor

    def log_abs_det(self) -> Float[Array, ""]:
        r"""Returns $\frac12 \log\det(P^T P)$.

        For an orthogonal $[V, N]$ Jacobi's identity of complementary minors gives
        $\det(V^T S^2 V) = \det(S^2) \det(N^T S^{-2} N)$, whose last factor is as small
        as the null space.
        """
        value = jnp.sum(jnp.log(self.scale)) + jnp.sum(jnp.log(abs(self.roots)))
        if self.null_vectors.shape[-1] == 0:
            return value
        # Householder reflections are accurate for rows of very different sizes only if
        # the largest come first.
        descending = jnp.argsort(self.scale)
        rows = (self.null_vectors / self.scale[:, None])[descending]
        triangle = jnp.linalg.qr(rows, mode="r")
        return value + jnp.sum(jnp.log(jnp.abs(jnp.diag(triangle))))

    def null_space(self, params: Params) -> tuple[dict[str, float], ...]:
        """Names the null directions, combined so that each involves few parameters."""
        if isinstance(self.vectors, Tracer):
            raise ValueError(
                "`null_space` names parameters by the values of the projector, which "
                "are not known under `jax.jit`. Call it outside."
            )
        basis = np.concatenate([self.vectors, self.null_vectors], axis=1)
        null = basis[:, np.asarray(self.is_null)]
        return name_null_space(params, null, self.resolution)

    def _unbounded(self) -> Bool[Array, " D"]:
        """Which elements contribute to any of the directions that were dropped."""
        return jnp.linalg.norm(self.null_vectors, axis=1) > self.resolution

    def standard_errors(self) -> Float[Array, " D"]:
        errors = self.scale * jnp.linalg.norm(self._factor, axis=1)
        return jnp.where(self._unbounded(), jnp.inf, errors)

    def errors_of_the_data(self) -> Float[Array | np.ndarray, " D"]:
        """Returns the standard errors without a prior, on the host as a NumPy array."""
        # NumPy compiles nothing; here each operation would be compiled by itself.
        of = jnp if isinstance(self.roots, Tracer) else np
        parts = self.scale, self.vectors, self.roots, self.null_vectors
        scale, vectors, roots, dropped = map(of.asarray, parts)
        is_null = roots < 0
        factor = vectors * of.where(is_null, 0, roots)[None, :]
        own = of.where(is_null[None, :], vectors, 0)
        null = of.concatenate([own, dropped], axis=1)
        is_unbounded = of.linalg.norm(null, axis=1) > self.resolution
        errors = scale * of.linalg.norm(factor, axis=1)
        return of.where(is_unbounded, np.asarray(np.inf, scale.dtype), errors)

    def correlations_of_the_data(
        self, errors: Float[np.ndarray, " D"]
    ) -> Float[np.ndarray, "D D"]:
        """Returns the correlations without a prior, NaN where an error is not finite.

        `errors` are those of the data. It runs on the host.
        """
        roots, vectors = (np.asarray(x, float) for x in (self.roots, self.vectors))
        factor = vectors * np.where(roots < 0, 0, roots)
        norms = np.linalg.norm(factor, axis=1)
        is_known = np.isfinite(errors) & (norms > 0)
        unit = factor / np.where(is_known, norms, np.nan)[:, None]
        return np.clip(unit @ unit.T, -1, 1)

    def covariance(self) -> Float[Array, "D D"]:
        r"""Returns $P P^T$, with the limit $\pm\infty$ where directions were dropped.

        The limit is that of $S N N^T S / \lambda$ as $\lambda$ goes to zero from above.
        """
        scaled = matmul(self._factor, self._factor.T)
        covariance = self.scale[:, None] * scaled * self.scale[None, :]
        if self.null_vectors.shape[-1] == 0:
            return covariance
        unbounded = self._unbounded()
        null = matmul(self.null_vectors, self.null_vectors.T)
        size = jnp.sqrt(jnp.diag(null))
        infinite = (
            unbounded[:, None]
            & unbounded[None, :]
            & (jnp.abs(null) > self.resolution * size[:, None] * size[None, :])
        )
        return jnp.where(infinite, jnp.sign(null) * jnp.inf, covariance)


def whiten_spectrum(
    spectrum: Spectrum,
    params: Params,
    nulls: NullPolicy,
    eps: float,
    name: str,
    *,
    is_inverse: bool = True,
) -> DenseWhitening:
    """Makes the map from the decomposition of a matrix that errors call `name`.

    `eps` is the relative rounding error of the matrix, and `is_inverse` says whether it
    is the inverse of a covariance.
    """
    scale, values, vectors = spectrum
    size, on_null, resolution = values.size, nulls.on_null, math.sqrt(eps)
    # NumPy compiles nothing; here each operation would be compiled by itself.
    of = jnp if isinstance(values, Tracer) else np
    tolerance = (nulls.rtol or 0) * of.asarray(values)[0]
    rank, values = _choose_rank(values, tolerance, nulls, name)
    known = of.asarray(values)
    if on_null == "raise" and rank < size:
        null = name_null_space(params, np.asarray(vectors)[:, rank:], resolution)
        raise ValueError(
            f"{name} does not constrain {size - rank} of {size} directions: "
            f"{written_directions(null)}. "
            'Freeze a parameter of each, or use `on_null="drop"` or `"prior"`.'
        )
    is_null = of.arange(size) >= rank
    roots = of.sqrt(of.where(is_null, 1, known))
    roots = of.where(is_null, -1, 1 / roots if is_inverse else roots)
    kept = size if on_null == "prior" else rank
    dropped = np.zeros((size, 0), vectors.dtype)
    if kept < size:
        vectors, dropped = jax.lax.split(vectors, (kept, size - kept), axis=1)
    return DenseWhitening(
        scale=scale,
        vectors=vectors,
        roots=on_device(roots[:kept]),
        null_vectors=on_device(dropped),
        eigenvalues=values,
        has_prior=on_null == "prior",
        resolution=resolution,
    )


def _choose_rank(
    values: Float[Array, " D"], tolerance: Any, nulls: NullPolicy, name: str
) -> tuple[Any, Float[Array, " D"]]:
    """Returns the number of directions that are not null, and the checked values."""
    size, rank, is_traced = values.size, nulls.rank, isinstance(values, Tracer)
    known = values if is_traced else np.asarray(values)
    if rank is not None or (is_traced and nulls.on_null == "raise"):
        rank = size if rank is None else rank
        return rank, refuse(
            values,
            ~(known[rank - 1] > tolerance),
            f"`rank={rank}` keeps directions that {name} does not constrain. Lower "
            "`rank` or `rtol`."
            if nulls.rank is not None
            else f"{name} does not constrain every direction. Make the projector "
            'outside of `jax.jit` to see which, or use `on_null="prior"`.',
            lambda: (
                f"Only {np.count_nonzero(known > tolerance)} of {size} "
                f"eigenvalues are above the tolerance of {tolerance}."
            ),
        )
    if is_traced and nulls.on_null == "drop":
        raise ValueError(
            "`rank` must be given under `jax.jit` and `jax.vmap`, where the number of "
            "null directions, and with it the shape of the latent space, cannot depend "
            f"on values. For {name}, {size} keeps them all. Or use "
            '`on_null="prior"`, which leaves the latent space its shape.'
        )
    is_kept = known > tolerance
    return (jnp.sum(is_kept) if is_traced else np.count_nonzero(is_kept)), values


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

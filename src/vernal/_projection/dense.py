"""Whitening by the factors of a matrix."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from .._boundary import Params
from .._curvature import Spectrum, matmul, on_device, refuse
from .nulls import NullPolicy, name_null_space, written_directions
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

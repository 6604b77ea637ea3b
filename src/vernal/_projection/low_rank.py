"""A map that whitens the leading directions of a matrix that is never formed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._boundary import Params, prng_key, whole_number
from .._curvature import matmul, refuse
from .._tree import as_parameters, ravel, ravel_dtype, ravel_size, require_alike, widest
from .lanczos import Leading, find_leading
from .whitening import AbstractWhitening

# Beyond these, the directions that have not converged stay as they are.
_MOST_ITERATIONS_PER_DIRECTION = 8


class LowRankWhitening(AbstractWhitening):
    r"""The matrix $P = S (c^{-1/2} (I - V V^\top) + V \Lambda^{-1/2} V^\top)$.

    The columns of $V$ are orthonormal, so that its inverse and its determinant have a
    closed form and no product needs more than $V$.
    """

    scale: Float[Array, " D"]
    vectors: Float[Array, "D rank"]
    eigenvalues: Float[Array, " rank"]
    curvature: Float[Array, ""]
    """The mean curvature $c$ of the complement, if it has any."""
    is_flat: Bool[Array, ""]
    """Whether the complement has no curvature."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the vectors."""
        return self.scale.dtype

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The latent array is a vector as long as that of the parameters."""
        return self.scale.shape[-1:]

    @property
    def is_null(self) -> Bool[Array, " rank"]:
        """None of the directions that were kept is null."""
        return jnp.zeros(self.eigenvalues.shape, bool)

    @property
    def spectrum(self) -> Float[Array, " rank"]:
        """The leading eigenvalues of the scaled matrix: the others are not known."""
        return self.eigenvalues

    def _times(self, vector: Float[Array, " D"], power: float) -> Float[Array, " D"]:
        r"""Multiplies by $c^p (I - V V^\top) + V \Lambda^p V^\top$."""
        rest = self.curvature**power
        kept = (self.eigenvalues**power - rest) * matmul(vector, self.vectors)
        return rest * vector + matmul(self.vectors, kept)

    def apply(self, latent: Float[Array, " D"]) -> Float[Array, " D"]:
        """Returns $P u$."""
        return self.scale * self._times(latent, -0.5)

    def transpose(self, vector: Float[Array, " D"]) -> Float[Array, " D"]:
        """Returns $P^T g$."""
        return self._times(self.scale * vector, -0.5)

    def invert(self, vector: Float[Array, " D"]) -> Float[Array, " D"]:
        """Returns $P^{-1} x$."""
        return self._times(vector / self.scale, 0.5)

    def _dense(self, power: float) -> Float[Array, "D D"]:
        rest = self.curvature**power
        kept = self.vectors * (self.eigenvalues**power - rest)[None, :]
        identity = jnp.eye(self.latent_size, dtype=self.dtype)
        return rest * identity + matmul(kept, self.vectors.T)

    def matrix(self) -> Float[Array, "D D"]:
        """Returns $P$."""
        return self.scale[:, None] * self._dense(-0.5)

    def log_abs_det(self) -> Float[Array, ""]:
        r"""Returns $\log\det S - \frac12 (\log\det\Lambda + (D - r) \log c)$."""
        rest = (self.latent_size - self.eigenvalues.size) * jnp.log(self.curvature)
        spread = jnp.sum(jnp.log(self.eigenvalues)) + rest
        return jnp.sum(jnp.log(self.scale)) - 0.5 * spread

    def _in_complement(self) -> Float[Array, " D"]:
        """The share of each element in the complement: the diagonal of its projector.

        Rounding is cut off, so that where every direction was kept it is zero.
        """
        share = 1 - jnp.sum(jnp.square(self.vectors), axis=1)
        return jnp.where(share > jnp.sqrt(jnp.finfo(self.dtype).eps), share, 0)

    def _unbounded(self) -> Bool[Array, " D"]:
        return self.is_flat & (self._in_complement() > 0)

    def standard_errors(self) -> Float[Array, " D"]:
        """Returns the root of the diagonal of `covariance`."""
        kept = jnp.sum(jnp.square(self.vectors) / self.eigenvalues[None, :], axis=1)
        errors = self.scale * jnp.sqrt(kept + self._in_complement() / self.curvature)
        return jnp.where(self._unbounded(), jnp.inf, errors)

    def covariance(self) -> Float[Array, "D D"]:
        """Returns $P P^T$, infinite on the diagonal where the complement is flat."""
        covariance = self.scale[:, None] * self._dense(-1.0) * self.scale[None, :]
        diagonal = jnp.where(self._unbounded(), jnp.inf, jnp.diag(covariance))
        return jnp.fill_diagonal(covariance, diagonal, inplace=False)


def whiten_matvec(
    matvec: Callable[[Params], Params],
    params: Params,
    rank: int,
    *,
    key: PRNGKeyArray,
    scale: Params,
) -> LowRankWhitening:
    """Finds the map that whitens the leading directions of a symmetric matrix.

    **Arguments:**

    - `matvec`: the product with the matrix, from a tree like `params` to one.
    - `params`: the point, of which only shapes and dtypes count.
    - `rank`: how many directions.
    - `key`: for the first vector and the probes.
    - `scale`: the size of each parameter, or `None` for ones.
    """
    size, dtype = ravel_size(params), _computed_in(params)
    if not callable(matvec):
        raise TypeError(
            f"`matvec` is {matvec!r}, but must be a function, such as "
            "`vn.gauss_newton_matvec(residuals, params)` returns."
        )
    if whole_number(rank, "rank", least=1) > size:
        raise ValueError(
            f"`rank` is {rank}, but there are only {size} directions in the space of "
            "the parameters."
        )
    prng_key(key)
    scales = _flat_scale(scale, params, dtype)
    # More than are wanted: the last of them converge last.
    iterations = min(size, 2 * rank + 20)
    most = min(size, _MOST_ITERATIONS_PER_DIRECTION * (rank + 10))
    found = find_leading(matvec, params, scales, key, rank, iterations)
    is_traced = isinstance(found.values, Tracer)
    while not is_traced and not found.is_converged and iterations < most:
        iterations = min(2 * iterations, most)
        found = find_leading(matvec, params, scales, key, rank, iterations)
    if is_traced and iterations < most:
        found = find_leading(matvec, params, scales, key, rank, most)
    tolerance = size * float(jnp.finfo(dtype).eps) * found.values[0]
    values = _refuse_bad(found, tolerance, rank)

    is_flat = found.curvature <= tolerance
    held = jax.lax.stop_gradient
    return LowRankWhitening(
        scale=held(scales),
        vectors=held(found.vectors),
        eigenvalues=held(values),
        # No step into a flat complement is larger than in the softest direction kept.
        curvature=held(jnp.where(is_flat, values[-1], found.curvature)),
        is_flat=held(is_flat),
    )


def _computed_in(params: Params) -> np.dtype:
    # No eigensolver works in half precision.
    return widest((ravel_dtype(params), jnp.dtype("float32")))


def _flat_scale(scale: Params, params: Params, dtype: np.dtype) -> Float[Array, " D"]:
    if scale is None:
        return jnp.ones(ravel_size(params), dtype)
    arrays = as_parameters(scale, "scale")
    require_alike(arrays, params, "`scale`", "`params`")
    flat = ravel(arrays, dtype)
    return refuse(
        flat,
        ~(jnp.isfinite(flat) & (flat > 0)),
        "`scale` has an element that is not positive and finite. It is the size of "
        "each parameter in its own unit.",
    )


def _refuse_bad(
    found: Leading, tolerance: Float[Array, ""], rank: int
) -> Float[Array, " rank"]:
    """Returns the eigenvalues, if they are those of a Fisher matrix."""
    values = refuse(
        found.values,
        ~found.is_finite,
        "`matvec` returned a value that is not finite. Look at `params`, and at the "
        "data in the function that was differentiated.",
    )
    values = refuse(
        values,
        ~found.is_symmetric,
        "`matvec` is not the product with a symmetric matrix: for random vectors, "
        "y·Fx is not x·Fy. Make it with `vn.hessian_matvec` or "
        "`vn.gauss_newton_matvec`.",
    )
    values = refuse(
        values,
        found.is_indefinite,
        "`matvec` is the product with a matrix that has a negative eigenvalue. Such a "
        "point is not a minimum. Go on with the fit, or use `vn.gauss_newton_matvec`, "
        "whose matrix has no negative eigenvalue anywhere.",
        lambda: f"The lowest that was met is {found.lowest}.",
    )
    return refuse(
        values,
        ~(values[-1] > tolerance),
        f"`rank={rank}` keeps directions that `matvec` does not constrain. Lower it.",
        lambda: (
            f"Only {np.count_nonzero(values > tolerance)} of them have an eigenvalue "
            f"above {tolerance}."
        ),
    )

"""Whitening by the leading directions of a matrix that is never formed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._boundary import Params, whole_number
from .._curvature import matmul, refuse
from .._tree import as_parameters, ravel, ravel_dtype, ravel_size, require_alike, widest
from .lanczos import Leading, find_leading
from .whitening import AbstractWhitening

# After these, directions that have not converged are used as they are.
_MOST_ITERATIONS_PER_DIRECTION = 8


class LowRankWhitening(AbstractWhitening):
    r"""The matrix $P = S (c^{-1/2} (I - V V^\top) + V \Lambda^{-1/2} V^\top)$.

    The columns of $V$ are orthonormal, so that inverse and determinant have a closed
    form, and products need only $V$.
    """

    scale: Float[Array, " D"]
    vectors: Float[Array, "D rank"]
    eigenvalues: Float[Array, " rank"]
    """The leading ones: the others are not known."""
    curvature: Float[Array, ""]
    """The mean curvature $c$ of the complement, if it has any."""
    is_flat: Bool[Array, ""]
    """Whether the complement has no curvature."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.scale.shape[-1:]

    @property
    def rank(self) -> int:
        return self.eigenvalues.shape[-1]

    @property
    def is_null(self) -> Bool[Array, " rank"]:
        return jnp.zeros(self.eigenvalues.shape, bool)

    def _times(self, vector: Float[Array, " D"], power: float) -> Float[Array, " D"]:
        r"""Multiplies by $c^p (I - V V^\top) + V \Lambda^p V^\top$."""
        rest = self.curvature**power
        kept = (self.eigenvalues**power - rest) * matmul(vector, self.vectors)
        return rest * vector + matmul(self.vectors, kept)

    def apply(self, latent: Float[Array, " D"]) -> Float[Array, " D"]:
        return self.scale * self._times(latent, -0.5)

    def transpose(self, vector: Float[Array, " D"]) -> Float[Array, " D"]:
        return self._times(self.scale * vector, -0.5)

    def invert(self, vector: Float[Array, " D"]) -> Float[Array, " D"]:
        return self._times(vector / self.scale, 0.5)

    def _dense(self, power: float) -> Float[Array, "D D"]:
        rest = self.curvature**power
        kept = self.vectors * (self.eigenvalues**power - rest)[None, :]
        identity = jnp.eye(self.latent_size, dtype=self.dtype)
        return rest * identity + matmul(kept, self.vectors.T)

    def matrix(self) -> Float[Array, "D D"]:
        return self.scale[:, None] * self._dense(-0.5)

    def log_abs_det(self) -> Float[Array, ""]:
        r"""Returns $\log\det S - \frac12 (\log\det\Lambda + (D - r) \log c)$."""
        rest = (self.latent_size - self.eigenvalues.size) * jnp.log(self.curvature)
        spread = jnp.sum(jnp.log(self.eigenvalues)) + rest
        return jnp.sum(jnp.log(self.scale)) - 0.5 * spread

    def _in_complement(self) -> Float[Array, " D"]:
        """The share of each element in the complement; rounding counts as zero."""
        share = 1 - jnp.sum(jnp.square(self.vectors), axis=1)
        return jnp.where(share > jnp.sqrt(jnp.finfo(self.dtype).eps), share, 0)

    def _unbounded(self) -> Bool[Array, " D"]:
        return self.is_flat & (self._in_complement() > 0)

    def standard_errors(self) -> Float[Array, " D"]:
        kept = jnp.sum(jnp.square(self.vectors) / self.eigenvalues[None, :], axis=1)
        errors = self.scale * jnp.sqrt(kept + self._in_complement() / self.curvature)
        return jnp.where(self._unbounded(), jnp.inf, errors)

    def covariance(self) -> Float[Array, "D D"]:
        """Returns $P P^T$, infinite on the diagonal where the complement is flat."""
        covariance = self.scale[:, None] * self._dense(-1.0) * self.scale[None, :]
        diagonal = jnp.where(self._unbounded(), jnp.inf, jnp.diag(covariance))
        return jnp.fill_diagonal(covariance, diagonal, inplace=False)

    def null_space(self, params: Params) -> tuple[dict[str, float], ...]:
        """Raises an error: the directions of the complement are not known."""
        raise ValueError(
            "`from_matvec` finds the leading directions, and does not look at the "
            "others one by one. Form the matrix, of some of the parameters at a time "
            "if it is large, and use `from_fisher` or `from_blocks`."
        )


def whiten_matvec(
    matvec: Callable[[Params], Params],
    params: Params,
    rank: int,
    *,
    key: PRNGKeyArray,
    scale: Params,
) -> LowRankWhitening:
    """Finds the map that whitens the leading directions; see `from_matvec`."""
    # No eigensolver works in half precision.
    size, dtype = ravel_size(params), widest((ravel_dtype(params), np.dtype("float32")))
    whole_number(rank, "rank", least=1, most=size)
    scales = _flat_scale(scale, params, dtype)
    # More than `rank`: the last ones converge last.
    iterations = min(size, 2 * rank + 20)
    most = min(size, _MOST_ITERATIONS_PER_DIRECTION * (rank + 10))
    found = find_leading(matvec, params, scales, key, rank, iterations)
    is_traced = isinstance(found.values, Tracer)
    while not is_traced and not found.is_converged and iterations < most:
        iterations = min(2 * iterations, most)
        found = find_leading(matvec, params, scales, key, rank, iterations)
    if is_traced and iterations < most:
        found = find_leading(matvec, params, scales, key, rank, most)
    whitening = LowRankWhitening(
        scale=scales,
        vectors=found.vectors,
        eigenvalues=_checked(found, rank),
        curvature=found.curvature,
        is_flat=found.is_flat,
    )
    return jax.lax.stop_gradient(whitening)


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


def _checked(found: Leading, rank: int) -> Float[Array, " rank"]:
    """Returns the eigenvalues; refuses any that are not those of a Fisher matrix."""
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
        lambda: f"The lowest found is {found.lowest}.",
    )
    return refuse(
        values,
        ~found.is_constrained,
        f"`rank={rank}` keeps directions that `matvec` does not constrain. Lower it.",
        lambda: (
            f"Only {np.count_nonzero(values > found.tolerance)} of them have an "
            f"eigenvalue above {found.tolerance}."
        ),
    )

"""Whitening by the leading directions of a matrix that is never formed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from matfree.decomp import tridiag_sym

from .._boundary import Params, whole_number
from .._curvature import Flat, MatrixFree, descending, matmul, refuse
from .._program import program
from .._tree import (
    as_parameters,
    ravel,
    ravel_dtype,
    ravel_size,
    require_alike,
    unravel,
    widest,
)
from .whitening import AbstractWhitening

# A second search, in the complement of the first, and the most directions that it adds:
# from one vector, Lanczos iterations find one direction of a degenerate eigenvalue.
ITERATIONS_AFTER = 20
_MOST_ADDED = 10

_PROBES = 16

# With so many rows for each column a Householder QR, which reads all of them for each
# column, takes as long as the iterations.
_MANY_ROWS = 100


class Leading(NamedTuple):
    """The leading part of a matrix."""

    values: Float[Array, " rank"]
    vectors: Float[Array, "D rank"]
    tolerance: Float[Array, ""]
    """How large rounding makes an eigenvalue that is zero."""
    curvature: Float[Array, ""]
    """The mean eigenvalue of the complement; where that is flat, the lowest kept."""
    is_flat: Bool[Array, ""]
    """Whether the complement has no curvature."""
    lowest: Float[Array, ""]
    """The lowest eigenvalue found."""
    is_constrained: Bool[Array, ""]
    """Whether each direction has an eigenvalue above the tolerance."""
    is_indefinite: Bool[Array, ""]
    is_converged: Bool[Array, ""]
    is_symmetric: Bool[Array, ""]
    is_finite: Bool[Array, ""]


@program
def find_leading(
    matvec: Callable[[Params], Params],
    params: Params,
    scale: Float[Array, " D"],
    key: PRNGKeyArray,
    rank: int,
    iterations: int,
) -> Leading:
    """Finds the `rank` leading eigenvectors of $S F S$ by Lanczos iterations.

    The vectors are exactly orthonormal, and the matrix is exactly diagonal on their
    space (Rayleigh–Ritz), whether they have converged or not.
    """
    size, dtype = scale.size, scale.dtype
    product = _scaled(matvec, params, scale)
    keys = jax.random.split(key, 5)

    # Together, since each call would compile apart.
    draw = lambda key: jax.random.normal(key, (2, size), dtype)
    (x, y), (start, _), (after_start, _) = jax.vmap(draw)(keys[jnp.array([0, 2, 3])])
    fx, fy = jax.lax.map(product, jnp.stack([x, y]))
    difference = jnp.abs(matmul(y, fx) - matmul(x, fy))
    norms = jnp.linalg.norm(fx) + jnp.linalg.norm(fy)
    eps = jnp.finfo(dtype).eps
    is_symmetric = difference <= 10 * eps**0.5 * norms

    # If the space that the iterations span is complete (few distinct eigenvalues), they
    # would divide by zero. A little noise leads them out of it; Rayleigh–Ritz removes
    # its effect on the result.
    noise = eps ** (2 / 3) * jnp.maximum(jnp.linalg.norm(fx) / size**0.5, eps)
    order = jax.random.permutation(keys[1], size)

    def noisy(vector: Array) -> Array:
        return product(vector) + noise * vector[order]

    basis, values = _ritz(noisy, start, iterations, rank)
    lowest = values[-1]

    after = min(ITERATIONS_AFTER, size - rank)
    surprise = -jnp.inf
    if after:
        basis = _orthonormal(basis)

        def beyond(vector: Array) -> Array:
            return _without(basis, noisy(_without(basis, vector)))

        start = _without(basis, after_start)
        more, values = _ritz(beyond, start, after, min(after, _MOST_ADDED))
        surprise, lowest = values[0], jnp.minimum(lowest, values[-1])
        basis = jnp.concatenate([basis, more], axis=1)

    basis = _orthonormal(basis)
    images = _images(product, basis)
    values, rotation = descending(matmul(basis.T, images))
    rotation, values = rotation[:, :rank], values[:rank]
    leading = matmul(basis, rotation)
    left_over = matmul(images, rotation) - leading * values[None, :]
    residuals = jnp.linalg.norm(left_over, axis=0)
    tolerance = 1e-3 * values + eps**0.5 * values[0]
    is_converged = jnp.all(residuals <= tolerance)
    is_converged &= surprise <= values[-1] + tolerance[-1]

    curvature = values[-1]
    if rank < size:
        probes = jax.random.normal(keys[4], (size, min(_PROBES, size - rank)), dtype)
        across = _orthonormal(jnp.concatenate([leading, probes], axis=1))[:, rank:]
        curvature = jnp.mean(jnp.sum(across * _images(product, across), axis=0))
    lowest = jnp.minimum(lowest, curvature)
    zero = size * float(eps) * values[0]
    is_flat = curvature <= zero
    is_finite = jnp.all(jnp.isfinite(values)) & jnp.isfinite(norms + curvature)
    return Leading(
        values=values,
        vectors=leading,
        tolerance=zero,
        # Steps in a flat complement are no larger than in the softest direction kept.
        curvature=jnp.where(is_flat, values[-1], curvature),
        is_flat=is_flat,
        lowest=lowest,
        is_constrained=values[-1] > zero,
        is_indefinite=lowest < -(zero + 10 * noise),
        is_converged=is_converged,
        is_symmetric=is_symmetric,
        is_finite=is_finite,
    )


def _scaled(
    matvec: Callable[[Params], Params], params: Params, scale: Float[Array, " D"]
) -> Flat:
    """Returns the product of $S F S$ with flat vectors."""
    # Computed here, outside of any loop, where it does not depend on the vector.
    flat = matvec.flat() if isinstance(matvec, MatrixFree) else None

    def inner(vector: Array) -> Array:
        if flat is not None:
            return flat(vector)
        returned = as_parameters(matvec(unravel(vector, params)), "matvec")
        require_alike(returned, params, "what `matvec` returns", "`params`")
        return ravel(returned, scale.dtype)

    return lambda vector: scale * inner(scale * vector).astype(scale.dtype)


def _ritz(
    product: Flat, start: Float[Array, " D"], iterations: int, count: int
) -> tuple[Float[Array, "D count"], Float[Array, " iterations"]]:
    """Returns `count` leading Ritz vectors, and all Ritz values, descending."""
    lanczos = tridiag_sym(iterations, reortho="full", custom_vjp=False)
    decomposition: Any = lanczos(product, start)
    values, rotation = descending(decomposition.J_small)
    return matmul(decomposition.Q_tall.T, rotation[:, :count]), values


def _images(product: Flat, basis: Float[Array, "D n"]) -> Float[Array, "D n"]:
    """Applies a product to each column, one after the other to bound memory."""
    return jax.lax.map(product, basis.T).T


def _orthonormal(basis: Float[Array, "D n"]) -> Float[Array, "D n"]:
    """Makes columns orthonormal, one after the other.

    Of many rows it takes the Gram matrix, for which the columns must be far from
    dependent, as Ritz vectors are, and a few random ones. See Yamamoto, Nakatsukasa,
    Yanagisawa and Fukaya, *Roundoff error analysis of the CholeskyQR2 algorithm*
    (2015).
    """
    size, count = basis.shape
    if size < _MANY_ROWS * count:
        return jnp.linalg.qr(basis)[0]
    factor = jnp.linalg.cholesky(matmul(basis.T, basis))
    inverse = jax.lax.linalg.triangular_solve(
        factor, jnp.eye(count, dtype=basis.dtype), lower=True
    )
    return matmul(basis, inverse.T)


def _without(basis: Float[Array, "D n"], vector: Float[Array, " D"]) -> Array:
    """Projects a vector onto the complement of a space."""
    return vector - matmul(basis, matmul(vector, basis))


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

"""The leading eigenvectors of a symmetric matrix that is never formed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from matfree.decomp import tridiag_sym

from .._boundary import Params
from .._curvature import MatrixFree, Product, descending, matmul
from .._program import program
from .._tree import as_parameters, ravel, require_alike, unravel

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
) -> Product:
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
    product: Product, start: Float[Array, " D"], iterations: int, count: int
) -> tuple[Float[Array, "D count"], Float[Array, " iterations"]]:
    """Returns `count` leading Ritz vectors, and all Ritz values, descending."""
    lanczos = tridiag_sym(iterations, reortho="full", custom_vjp=False)
    decomposition: Any = lanczos(product, start)
    values, rotation = descending(decomposition.J_small)
    return matmul(decomposition.Q_tall.T, rotation[:, :count]), values


def _images(product: Product, basis: Float[Array, "D n"]) -> Float[Array, "D n"]:
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

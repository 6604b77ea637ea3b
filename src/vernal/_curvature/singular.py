"""Singular values of a Jacobian whose columns differ in units."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._tree import widest
from .linalg import equilibrated_eigh, matmul, positive
from .modes import (
    Subject,
    choose_mode,
    columns,
    gauss_newton_products,
    jacobian_matrix,
    transposed_product,
)

# If the smallest eigenvalue of the scaled J^T J is at least this fraction of the
# largest, its relative error, eps / fraction, is at most 32 times that of a singular
# value, eps / sqrt(fraction).
_WELL_CONDITIONED = 2.0**-10


class Spectrum(NamedTuple):
    """The eigenvalues (descending) and eigenvectors of a matrix in units of `scale`."""

    scale: Float[Array, " D"]
    values: Float[Array, " D"]
    vectors: Float[Array, "D D"]


def of_jacobian(jac: Float[Array, "N D"]) -> Spectrum:
    r"""Decomposes $J^\top J$ by the singular values of $J$.

    The columns are first divided by their largest elements, whose squares may overflow,
    and then by their norms. The eigenvalues of the scaled $J^\top J$ are cheap, and
    used if they are accurate enough. If not, the singular values come from $J = QR$.
    """
    # No eigensolver works in half precision.
    dtype = widest((jac.dtype, jnp.dtype("float32")))
    jac = jax.lax.stop_gradient(jac).astype(dtype)
    units = positive(jnp.max(jnp.abs(jac), axis=0, initial=0))
    scaled = jac / units[None, :]
    gram = matmul(scaled.T, scaled)
    return _of_gram(gram, units, lambda norms: square_factor(scaled / norms[None, :]))


def of_products(
    fn: Callable[[Array], Array],
    flat: Float[Array, " D"],
    batch_size: int,
    subject: Subject,
) -> Spectrum:
    r"""Decomposes $J^\top J$ with `batch_size` derivatives at a time.

    $J$ is kept only if `fn` has forward mode alone. In reverse mode the factor $R$ is
    updated by a few rows at a time.
    """
    products = gauss_newton_products(fn, flat) if subject.jac is None else None
    if products is None:
        if choose_mode(fn, flat, subject) == "fwd":
            forward = subject._replace(jac="fwd")
            return of_jacobian(jacobian_matrix(fn, flat, forward, batch_size))
        pull = transposed_product(fn, flat)
        return of_jacobian(_triangle_by_rows(pull, fn(flat), flat, batch_size))

    push, pull = products

    def image(tangent: Array) -> tuple[Array, Array]:
        column = push(tangent)
        unit = column_norms(column[:, None])[0]
        return unit, pull(column / unit)

    units, rows = jax.lax.stop_gradient(columns(image, flat, batch_size))

    def triangle(norms: Array) -> Array:
        scaled = lambda cotangent: pull(cotangent) / units / norms
        return _triangle_by_rows(scaled, fn(flat), flat, batch_size)

    return _of_gram(rows / units[None, :], units, triangle)


def column_norms(matrix: Float[Array, "N D"]) -> Float[Array, " D"]:
    """Computes the norms of columns; that of a column of zeros is 1.

    Each column is first divided by its largest element, whose square may overflow.
    """
    units = positive(jnp.max(jnp.abs(matrix), axis=0, initial=0))
    return units * positive(jnp.linalg.norm(matrix / units[None, :], axis=0))


def _of_gram(
    gram: Float[Array, "D D"],
    units: Float[Array, " D"],
    triangle: Callable[[Array], Array],
) -> Spectrum:
    """Decomposes the Gram matrix of columns in `units`.

    If its eigenvalues are not accurate, `triangle` computes the factor $R$ of the
    columns from their norms.
    """
    norms, values, vectors = equilibrated_eigh(gram)
    is_accurate = values[-1] > _WELL_CONDITIONED * values[0]

    def by_singular_values() -> tuple[Array, Array]:
        _, singular, rows = jnp.linalg.svd(triangle(norms))
        pick = lambda own, better: jnp.where(is_accurate, own, better)
        return pick(values, jnp.square(singular)), pick(vectors, rows.T)

    found = lambda: (values, vectors)
    values, vectors = jax.lax.cond(_of_all(is_accurate), found, by_singular_values)
    return Spectrum(1 / norms / units, values, vectors)


@jax.custom_batching.custom_vmap
def _of_all(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Returns a flag; under `jax.vmap`, whether that of all members is true.

    So a branch stays one. As a selection both ways would be taken, for all members, and
    at once: see `after`.
    """
    return flag


@_of_all.def_vmap
def _of_members(
    _: int, __: list[bool], flags: Bool[Array, " members"]
) -> tuple[Bool[Array, ""], bool]:
    return jnp.all(flags), False


def square_factor(rows: Float[Array, "N D"]) -> Float[Array, "D D"]:
    """Computes the factor $R$, of a matrix padded with zeros to enough rows."""
    missing = max(rows.shape[1] - rows.shape[0], 0)
    return jnp.linalg.qr(jnp.pad(rows, ((0, missing), (0, 0))), mode="r")


def _triangle_by_rows(
    pull: Callable[[Array], Array],
    like: Float[Array, " N"],
    flat: Float[Array, " D"],
    batch_size: int,
) -> Float[Array, "D D"]:
    """Computes the factor $R$ of a Jacobian from some of its rows at a time.

    There are at least as many as in $R$: an update with fewer costs the same.
    """
    size = flat.size
    chunk = max(size, min(batch_size, like.size))

    def row(index: Array) -> Array:
        # Zero beyond the last datum, and so is the row.
        unit = jax.nn.one_hot(index, like.size, dtype=like.dtype)
        return jax.lax.stop_gradient(pull(unit))

    def update(factor: Array, first: Array) -> tuple[Array, None]:
        index = first + jnp.arange(chunk)
        rows = jax.lax.map(row, index, batch_size=min(batch_size, chunk))
        return jnp.linalg.qr(jnp.concatenate([factor, rows]), mode="r"), None

    start = jnp.zeros((size, size), jnp.result_type(pull(jnp.zeros_like(like))))
    return jax.lax.scan(update, start, jnp.arange(0, like.size, chunk))[0]

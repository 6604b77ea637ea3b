"""Matrices: checks, products in full precision, decompositions, those of Jacobians."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Inexact, Num

from .._boundary import refuse_foreign
from .._tree import at_least_single, widest
from .modes import (
    Subject,
    choose_mode,
    columns,
    gauss_newton_products,
    jacobian_matrix,
    transposed_product,
)

Matrix = Num[Array, "..."] | Num[np.ndarray, "..."]
Flags = Bool[Array, "..."] | Bool[np.ndarray, "..."] | np.bool_


def as_square(matrix: Matrix, name: str) -> Inexact[Array, "D D"]:
    """Returns a square matrix as an array of floats; refuses any other."""
    refuse_foreign(matrix, f"`{name}`")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"`{name}` must be a square matrix, with as many rows as columns, but it "
            f"has shape {matrix.shape}."
        )
    if matrix.size == 0:
        raise ValueError(f"`{name}` is empty; it needs at least one row.")
    array = on_device(matrix)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return array.astype(float)
    # No eigensolver works in half precision.
    return at_least_single(array)


def on_device(array: Array | np.ndarray) -> Array:
    """Returns an array of JAX, for which `jnp.asarray` would compile a program."""
    # A copy, since what is put on a CPU may share its memory.
    return array if isinstance(array, jax.Array) else jax.device_put(np.array(array))


def as_real_square(matrix: Matrix, name: str) -> Float[Array, "D D"]:
    """Returns a real square matrix as an array of floats; refuses any other."""
    array = as_square(matrix, name)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(
            f"`{name}` must be real, but it is {array.dtype}. Write a complex "
            "parameter as two real ones, its real and its imaginary part."
        )
    return array


class IndefiniteError(ValueError):
    """A matrix has negative eigenvalues, and belongs to no minimum."""


def refuse(
    array: Array,
    bad: Flags,
    message: str,
    detail: Callable[[], str] = str,
    error: type[ValueError] = ValueError,
) -> Array:
    """Returns `array`, or raises an error if any element of `bad` is true.

    Known values raise an `error` that ends in `detail()`. Traced values are checked
    by `eqx.error_if` when the program runs, with the message alone.
    """
    if isinstance(bad, Tracer):
        return eqx.error_if(array, bad, message)
    if np.asarray(bad).any():
        raise error(" ".join([message, detail()]).rstrip())
    return array


def first_index(bad: Flags) -> str:
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
        lambda: (
            f"The first of them is at {first_index(~np.isfinite(np.asarray(matrix)))}."
        ),
    )


def descending(
    matrix: Inexact[Array, "D D"],
) -> tuple[Float[Array, " D"], Inexact[Array, "D D"]]:
    """Decomposes the symmetric part of a matrix.

    Returns the eigenvalues, descending, and the eigenvectors as columns.
    """
    vectors, values = jax.lax.linalg.eigh(matrix)
    return values[::-1], vectors[:, ::-1]


def positive(sizes: Array) -> Array:
    """Replaces zeros by ones."""
    return jnp.where(sizes > 0, sizes, 1)


def equilibrated_eigh(
    matrix: Float[Array, "D D"],
) -> tuple[Float[Array, " D"], Float[Array, " D"], Float[Array, "D D"]]:
    """Decomposes the symmetric part of a matrix, scaled to a unit diagonal.

    Returns the scale, which is the root of the diagonal, and what `descending` does.
    """
    scale = jnp.sqrt(positive(jnp.diag(matrix)))
    # One side after the other: the product of two scales may overflow.
    return scale, *descending(matrix / scale[:, None] / scale[None, :])


def after(array: Array, before: Array) -> Array:
    """Returns an array, for a compiled program to know only once it knows `before`.

    If XLA decomposes two stacks of matrices at once on a CPU, each holds a thread and
    waits for a free one: where there are two threads, for ever.
    """
    first = jnp.ravel(before)[0]
    zero = jnp.where(jnp.isnan(first), 0, jnp.minimum(jnp.abs(first), 0))
    return array + zero.astype(array.dtype)


def matmul(left: Array, right: Array) -> Array:
    """Multiplies in full precision, which is not the default on accelerators."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


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

"""Matrices: checks, products in full precision, eigendecompositions."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Inexact, Num

from .._boundary import refuse_foreign
from .._tree import at_least_single

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

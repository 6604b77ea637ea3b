"""Trees that must be like other trees: compared, checked and cast."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._boundary import PyTree
from .by_name import by_path
from .selectors import keep

T = TypeVar("T")

LIKE_STATE = "Let `init` return {}, such as `jnp.zeros((), jnp.{})`."
"""The remedy for a state of a policy or a criterion that changes its dtype."""


def shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Returns what a compiled program expects of a leaf."""
    try:
        # Of an array, at a tenth of the calls.
        return leaf.shape, leaf.dtype
    except AttributeError:
        return np.shape(leaf), getattr(leaf, "dtype", type(leaf))


def is_alike(
    tree: PyTree, like: PyTree, of: Callable[[Any], Any] = shape_and_dtype
) -> bool:
    """Whether two trees have the same structure, and leaves that are alike in `of`."""
    (leaves, structure), (others, other) = map(jax.tree.flatten, (tree, like))
    return structure == other and list(map(of, leaves)) == list(map(of, others))


def disagreements(
    found: Mapping[str, T], expected: Mapping[str, T]
) -> list[tuple[str, T | None, T | None]]:
    """Lists the paths at which two mappings differ, with both values.

    The value is `None` if a mapping lacks the path.
    """
    paths = dict.fromkeys((*found, *expected))
    pairs = [(path, found.get(path), expected.get(path)) for path in paths]
    return [(path, a, b) for path, a, b in pairs if a != b]


def require_alike(
    tree: PyTree, like: PyTree, what: str, whose: str, hint: str = ""
) -> None:
    """Checks that a tree has the structure and the shapes of another.

    An error calls the two `what` and `whose`, and ends with `hint`.
    """
    (leaves, found), (others, expected) = map(jax.tree.flatten, (tree, like))
    if found != expected:
        raise ValueError(
            f"{what} must have the structure of {whose}.\n"
            f"Found:    {found}\nExpected: {expected}"
        )
    for index, (shape, other) in enumerate(
        zip(map(np.shape, leaves), map(np.shape, others), strict=True)
    ):
        if shape != other:
            raise ValueError(
                f"{what} must have the shapes of {whose}: "
                f"{by_path(tree).names[index]!r} has shape {shape} instead of "
                f"{other}.{hint}"
            )


def cast_alike(
    tree: PyTree, like: PyTree, what: str, whose: str, remedy: str
) -> PyTree:
    """Casts a tree to the dtypes of another, after `require_alike`.

    If a leaf is of a kind that the other cannot hold, such as a float instead of an
    integer, a `TypeError` names the `remedy`, in which `{}` stands for the dtype.
    """
    require_alike(tree, like, what, whose)
    pairs = zip(by_path(tree).items(), jax.tree.leaves(like), strict=True)
    for (path, leaf), other in pairs:
        new, old = jnp.asarray(leaf), jnp.asarray(other)
        if not _can_hold(old, new):
            at = f" at {path!r}" if path else ""
            raise TypeError(
                f"{what} is {new.dtype}{at}, where {whose} is {old.dtype}, which "
                f"cannot hold it. {remedy.replace('{}', str(new.dtype))}"
            )
    return cast_like(tree, like)


def cast_like(new: PyTree, old: PyTree) -> PyTree:
    """Casts every leaf to the dtype of its like, as a compiled loop demands."""
    return jax.tree.map(_cast, new, old)


def choose(flags: Any, first: T, second: T) -> T:
    """Returns the first of two trees where a flag is set, or the second.

    Where there are several flags, each is for a row of every leaf.
    """
    is_one = jnp.ndim(flags) == 0
    of = lambda x: flags if is_one else flags.reshape(-1, *[1] * (x.ndim - 1))
    return jax.tree.map(lambda x, y: jnp.where(of(x), x, y), first, second)


def is_weak(array: Array) -> bool:
    """Whether the dtype of an array gives way to others; that of a key does not."""
    return getattr(array, "weak_type", False)


# Each kind holds those before it.
_KINDS = (
    jnp.bool_,
    jnp.unsignedinteger,
    jnp.signedinteger,
    jnp.floating,
    jnp.complexfloating,
)


def _can_hold(old: Array, new: Array) -> bool:
    """Whether an array's dtype can hold that of another, up to its precision."""
    if new.dtype == old.dtype:
        return True
    kinds = [
        [jnp.issubdtype(array.dtype, kind) for kind in _KINDS] for array in (new, old)
    ]
    if not all(map(any, kinds)):
        return False  # The keys of random numbers.
    is_count = is_weak(new) and jnp.issubdtype(old.dtype, jnp.unsignedinteger)
    rank, most = (kind.index(True) for kind in kinds)
    return rank <= most or (is_count and rank == most + 1)


def _cast(new: Any, old: Any) -> Array:
    new = jnp.asarray(new)
    if new.dtype == old.dtype and (is_weak(old) or not is_weak(new)):
        return new
    return lax.convert_element_type(new, old.dtype)


def owned(leaf: Any) -> jax.Array:
    """Returns an array of JAX, with memory of its own if `leaf` is one of NumPy.

    `jnp.array` may share that memory at first, and copy it once the device is free: by
    then a loader may have filled it with the next batch.
    """
    return jnp.asarray(np.array(leaf) if isinstance(leaf, np.ndarray) else leaf)


def strong(leaf: Any) -> jax.Array:
    """Returns `leaf` as an array that is not weakly typed.

    A weakly typed array, such as `jnp.array(1.0)`, turns strong in the first step, and
    the second step would then be compiled again.
    """
    array = owned(leaf)
    if not is_weak(array):
        return array
    if isinstance(array, jax.core.Tracer):
        return jax.lax.convert_element_type(array, array.dtype)
    # Through NumPy, which has no weak types: nothing is compiled for it.
    return jax.device_put(np.asarray(array))


def parameters(model: Any, owners: Sequence[int | None]) -> Any:
    """Picks the owned leaves of a model, as arrays, with `None` elsewhere."""
    return jax.tree.map(strong, keep(model, owners)[0])

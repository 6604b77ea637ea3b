"""Trees that must be like other trees: checked, and cast."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._boundary import PyTree, dotted

LIKE_STATE = "Let `init` return {}, such as `jnp.zeros((), jnp.{})`."
"""What to do about the state of a policy or a criterion that changes its dtype."""


def require_alike(
    tree: PyTree, like: PyTree, what: str, whose: str, hint: str = ""
) -> None:
    """Checks that one tree has the structure and the shapes of another.

    **Arguments:**

    - `tree`, `like`: the two.
    - `what`: what an error calls the one.
    - `whose`: what it calls the other.
    - `hint`: what it says at the end.
    """
    found, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if found != expected:
        raise ValueError(
            f"{what} must have the structure of {whose}.\n"
            f"Found:    {found}\nExpected: {expected}"
        )
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    for (keys, leaf), other in zip(flat, jax.tree.leaves(like), strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{what} must have the shapes of {whose}: {dotted(keys)!r} has shape "
                f"{jnp.shape(leaf)} instead of {jnp.shape(other)}.{hint}"
            )


def cast_alike(
    tree: PyTree, like: PyTree, what: str, whose: str, remedy: str, hint: str = ""
) -> PyTree:
    """Checks that one tree is like another, and casts it to the dtypes of that one.

    **Arguments:**

    - `tree`, `like`, `what`, `whose`, `hint`: as for `require_alike`.
    - `remedy`: what to do if a cast would lose something; `{}` stands for the dtype.

    **Raises:**

    - `ValueError`: as `require_alike`.
    - `TypeError`: if a leaf is of a kind that the other cannot hold, such as a float
        where the other is an integer.
    """
    require_alike(tree, like, what, whose, hint)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    for (keys, leaf), other in zip(flat, jax.tree.leaves(like), strict=True):
        new, old = jnp.asarray(leaf), jnp.asarray(other)
        if not _can_hold(old, new):
            at = f" at {dotted(keys)!r}" if keys else ""
            raise TypeError(
                f"{what} is {new.dtype}{at}, where {whose} is {old.dtype}, which "
                f"cannot hold it. {remedy.replace('{}', str(new.dtype))}"
            )
    return cast_like(tree, like)


def cast_like(new: PyTree, old: PyTree) -> PyTree:
    """Casts every leaf to the dtype of its like: a loop has no place for others."""
    return jax.tree.map(_cast, new, old)


def is_weak(array: Array) -> bool:
    """Whether the dtype of an array bends to what it meets; that of a key does not."""
    return getattr(array, "weak_type", False)


# Each holds those before it.
_KINDS = (
    jnp.bool_,
    jnp.unsignedinteger,
    jnp.signedinteger,
    jnp.floating,
    jnp.complexfloating,
)


def _can_hold(old: Array, new: Array) -> bool:
    """Whether a dtype can take in another, up to its precision."""
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


def strong(leaf: Any) -> jax.Array:
    """Makes an array of `leaf` whose dtype no longer bends to what it meets.

    A weakly typed array, such as `jnp.array(1.0)`, turns strong in the first step
    that is taken with it, and the second step would then be compiled anew.
    """
    # A copy of NumPy's: JAX may otherwise share the memory of what is changed later.
    array = jnp.array(leaf) if isinstance(leaf, np.ndarray) else jnp.asarray(leaf)
    if not is_weak(array):
        return array
    if isinstance(array, jax.core.Tracer):
        return jax.lax.convert_element_type(array, array.dtype)
    # Through NumPy, which knows no weak types: nothing is compiled for it.
    return jnp.asarray(np.asarray(array))


def parameters(model: Any, owners: Sequence[int | None]) -> Any:
    """Picks the owned leaves of a model, as arrays, with `None` elsewhere."""
    leaves, structure = jax.tree.flatten(model)
    return structure.unflatten(
        [
            None if owner is None else strong(leaf)
            for leaf, owner in zip(leaves, owners, strict=True)
        ]
    )

"""Trees that must be like other trees: checked, and cast."""

from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array

from ._paths import dotted
from ._typing import PyTree


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


def cast_like(new: PyTree, old: PyTree) -> PyTree:
    """Casts every leaf to the dtype of its like: a loop has no place for others."""
    return jax.tree.map(_cast, new, old)


def is_weak(array: Array) -> bool:
    """Whether the dtype of an array bends to what it meets; that of a key does not."""
    return getattr(array, "weak_type", False)


def _cast(new: Any, old: Any) -> Array:
    new = jnp.asarray(new)
    if new.dtype == old.dtype and (is_weak(old) or not is_weak(new)):
        return new
    return lax.convert_element_type(new, old.dtype)

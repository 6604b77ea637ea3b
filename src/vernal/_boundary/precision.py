"""Arrays in 64 bits, and what becomes of them while `jax_enable_x64` is off."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .names import spelled
from .rounding import is_rounded_as_float, warn_of_rounding, warn_of_single
from .type_checks import PyTree

T = TypeVar("T")

# A larger array is not copied from an accelerator to be looked at.
_MOST_BYTES = 2**22


def is_x64_on() -> bool:
    """Whether JAX computes in 64 bits, here and now."""
    return bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


def is_wide(dtype: Any) -> bool:
    """Whether JAX has a dtype only while `jax_enable_x64` is on."""
    if not isinstance(dtype, np.dtype):
        return False  # Of a key.
    kind, size = dtype.kind, dtype.itemsize
    return size > 8 if kind == "c" else size > 4 and kind in "fiu"


def is_cut(leaf: Any) -> bool:
    """Whether JAX would compute with less than what an array has."""
    # In this order for speed, since it is asked at every step.
    return (
        is_wide(getattr(leaf, "dtype", None))
        and not is_x64_on()
        and isinstance(leaf, jax.Array | np.ndarray | np.generic)
        and not isinstance(leaf, Tracer)
    )


def _is_swapped(leaf: Any) -> bool:
    """Whether an array has another byte order than the machine, as in FITS files."""
    return isinstance(leaf, np.ndarray) and not leaf.dtype.isnative


def narrowed(leaf: Any, where: str) -> Any:
    """Returns an array in the precision and the byte order that JAX computes with.

    Warns, and calls it `where`, if its digits matter: if the spacing of float32 at the
    data is more than a thousandth of their spread, or a hundredth of their steps.
    """
    if _is_swapped(leaf):
        leaf = leaf.astype(leaf.dtype.newbyteorder("="))
    if not is_cut(leaf):
        return leaf
    array: Any = np.asarray(leaf)
    if array.size > 1 or array.dtype.kind in "iu":
        warn_of_rounding(array, where)
    return _cut(leaf) if isinstance(leaf, jax.Array) else leaf


def narrowed_tree(tree: T) -> T:
    """Narrows JAX's own arrays in a tree, without a warning."""
    if is_x64_on():
        return tree
    is_one = lambda leaf: isinstance(leaf, jax.Array) and is_cut(leaf)
    return jax.tree.map(lambda leaf: _cut(leaf) if is_one(leaf) else leaf, tree)


def narrowed_leaves(tree: T, name: str) -> T:
    """Narrows the arrays of a tree; warnings name them by their paths in `name`."""
    if not any(is_cut(leaf) or _is_swapped(leaf) for leaf in jax.tree.leaves(tree)):
        return tree
    narrow = lambda keys, leaf: narrowed(leaf, spelled(name, keys))
    return jax.tree_util.tree_map_with_path(narrow, tree)


def warn_of_single_leaves(tree: PyTree, name: str) -> None:
    """Warns of arrays in order, such as times, that were given in float32.

    Their digits may be lost already, or are lost where the model computes with them.
    """
    if is_x64_on():
        return
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if getattr(leaf, "dtype", None) == np.float32 and _is_at_hand(leaf):
            warn_of_single(np.asarray(leaf), spelled(name, keys))


def rounded_integers(tree: PyTree) -> list[int]:
    """Returns which leaves are integers that tell less from each other in float32."""
    if is_x64_on():
        return []
    return [i for i, x in integers_at_hand(tree).items() if is_rounded_as_float(x)]


def integers_at_hand(tree: PyTree) -> dict[int, np.ndarray]:
    """Returns the leaves of integers that the host can look at, by their number."""
    is_one = lambda leaf: (
        getattr(getattr(leaf, "dtype", None), "kind", "") in ("i", "u")
        and _is_at_hand(leaf)
    )
    leaves = enumerate(jax.tree.leaves(tree))
    return {i: np.asarray(leaf) for i, leaf in leaves if is_one(leaf)}


def _is_at_hand(leaf: Any) -> bool:
    """Whether the host can look at an array, and soon."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return isinstance(leaf, np.ndarray)
    if leaf.is_deleted() or not leaf.is_fully_addressable:
        return False
    on_cpu = all(device.platform == "cpu" for device in leaf.devices())
    return on_cpu or leaf.nbytes <= _MOST_BYTES


def _cut(leaf: Any) -> Any:
    # JAX would leave the dtype of its own arrays as it is, and mix the two.
    array = np.asarray(leaf)
    return jnp.asarray(array.item() if leaf.weak_type and not leaf.ndim else array)

"""One leaf of a batch: turned into an array, or refused where that would lose sense."""

import contextlib
from collections.abc import Iterable
from typing import Any, final

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._boundary import (
    is_cut,
    is_deleted,
    narrowed,
    refuse_foreign,
    refuse_sparse,
    spelled,
)
from .._tree import LONG_DOUBLES


@final
class Flag:
    """A boolean in a batch, which a compiled program does not mistake for 0 or 1.

    To Python `True == 1`, and programs are found by what is static in their arguments.
    """

    def __init__(self, value: bool):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Flag) and self.value is other.value

    def __hash__(self) -> int:
        return hash((Flag, self.value))

    def __repr__(self) -> str:
        return repr(self.value)


def as_datum(leaf: Any, argument: str, keys: tuple[Any, ...], batch: Any) -> Any:
    """Turns arrays of other libraries, and floats, into JAX's arrays.

    **Arguments:**

    - `leaf`: a leaf of a batch.
    - `argument`, `keys`: what an error calls the batch, and where in it the leaf is.
    - `batch`: the whole batch.

    **Returns:**

    An array of its own memory; or the leaf itself, which is static then.

    **Raises:**

    - `TypeError`: if it is an array of something other than numbers, a loader, or an
        object that cannot be hashed; or if it is in a long list of numbers.
    - `ValueError`: if it is an array that has been deleted.
    """
    is_array = isinstance(leaf, jax.Array)
    # Asked of each leaf at every step: its name is spelled out only for an error.
    if is_array and not is_cut(leaf) and not is_deleted(leaf):
        return leaf
    where = spelled(argument, keys)
    if is_array:
        refuse_foreign(leaf, where)
        return narrowed(leaf, where)
    if isinstance(leaf, _NUMBERS):
        _refuse_lists(batch, argument, keys)
    if isinstance(leaf, bool):
        return Flag(leaf)
    if isinstance(leaf, np.str_ | np.bytes_):
        return leaf.item()
    if isinstance(leaf, np.ndarray | np.generic | float | complex):
        return _copied(leaf, where)
    if not isinstance(leaf, type) and hasattr(leaf, "__array__"):
        return _copied(_converted(leaf, where), where)
    if not isinstance(leaf, type) and hasattr(leaf, "__dlpack__"):
        return jnp.array(jnp.from_dlpack(leaf))
    refuse_sparse(leaf, where)
    if isinstance(leaf, range):
        raise _list_of_numbers(leaf, where)
    is_loader = isinstance(leaf, Iterable) and not hasattr(leaf, "shape")
    if is_loader and not isinstance(leaf, str | bytes):
        raise TypeError(
            f"{where} is a {type(leaf).__name__}, which is no array. To take one batch "
            "a step from it, wrap it: `fit(vn.Stream(data), steps)`."
        )
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"{where} is a {type(leaf).__name__}, which is no array and cannot be "
            "hashed, so that no compiled program could be found by it. Leave it out, "
            "or give what can be hashed, such as a tuple of numbers."
        ) from None
    return leaf


def _converted(leaf: Any, where: str) -> Any:
    try:
        return np.asarray(leaf)
    except Exception as error:
        # NumPy does not see arrays on another device.
        with contextlib.suppress(Exception):
            return np.asarray(jnp.from_dlpack(leaf))
        raise TypeError(
            f"{where} is a {type(leaf).__name__}, which cannot be turned into an "
            f"array. Turn it into one of NumPy's first. It says: {error}"
        ) from error


def _copied(leaf: Any, where: str) -> jax.Array:
    refuse_foreign(leaf, where)
    array = np.asarray(leaf)
    refuse_foreign(array, where)
    if array.dtype.type in LONG_DOUBLES:
        raise TypeError(
            f"{where} is an array of long doubles ({array.dtype}), which JAX does not "
            "have. Subtract a reference, and then turn it into float64: "
            "`(x - x[0]).astype(float)`."
        )
    # A copy: JAX may otherwise share the memory of an array that is changed later.
    return jnp.array(narrowed(leaf, where))


# A list of no more may be meant as a tree.
_LONG = 8
_NUMBERS = int | float | complex | np.number | np.bool_


def _refuse_lists(batch: Any, argument: str, keys: tuple[Any, ...]) -> None:
    """Refuses long lists of numbers, each of which JAX would take for an array."""
    # Each such list has this one leaf.
    if not (keys and isinstance(keys[-1], jtu.SequenceKey) and keys[-1].idx == _LONG):
        return
    for where, node in jtu.tree_flatten_with_path(batch, is_leaf=_is_long_list)[0]:
        if _is_long_list(node):
            raise _list_of_numbers(node, spelled(argument, where))


def _is_long_list(node: Any) -> bool:
    is_long = type(node) is list and len(node) > _LONG
    return is_long and all(isinstance(item, _NUMBERS) for item in node)


def _list_of_numbers(leaf: Any, where: str) -> TypeError:
    return TypeError(
        f"{where} is a {type(leaf).__name__} of {len(leaf)} numbers, which JAX cannot "
        "compute with as one. Give an array: `jnp.asarray(...)`."
    )

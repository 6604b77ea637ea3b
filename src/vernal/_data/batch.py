"""One batch: its leaves turned into arrays, or refused where that would lose sense."""

import array
import contextlib
import dataclasses
import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._boundary import (
    is_cut,
    is_deleted,
    is_explicit,
    narrowed,
    refuse_foreign,
    spelled,
    without_axes,
)
from .._tree import LONG_DOUBLES, owned

# A shorter list may be meant as a tree.
_LONG = 8
_INEXACT = float | complex | np.inexact
_NUMBERS = int | float | complex | np.number | np.bool_


class ManyBatches:
    """The base of what gives batches to a fit, and is not a batch itself."""


class Flag(enum.Enum):
    """A boolean in a batch, which a compiled program does not mistake for 0 or 1.

    To Python `True == 1`, and programs are found by what is static in their arguments.
    """

    OFF = False
    ON = True

    def __repr__(self) -> str:
        return repr(self.value)


def as_given(batch: Any) -> Any:
    """Returns a batch as the methods of a trainer see it."""
    return jax.tree.map(lambda x: x.value if isinstance(x, Flag) else x, batch)


def as_batch(batch: Any, argument: str = "batch") -> Any:
    """Turns the arrays and the floats of a batch into JAX's arrays.

    So new ones compile nothing. Arrays of other libraries are copied. Integers, strings
    and functions stay as they are and are static: they may decide a shape or a branch.
    Raises if a leaf is a source of batches, a loader, a long list of numbers or tuple
    of floats, a mapping that JAX does not look into, an array of anything but numbers
    or one that has been deleted, or an object that cannot be hashed.
    """
    if isinstance(batch, ManyBatches | Iterator):
        raise TypeError(
            f"`{argument}` must be one batch, not a {type(batch).__name__}. Give it to "
            "`fit`, or take a batch from it."
        )

    # Asked at every step, so where each leaf is must not be looked up in vain.
    leaves, structure = jax.tree.flatten(batch)
    if not all(map(_is_ready, leaves)):
        flat = jtu.tree_leaves_with_path(batch)
        leaves = [_as_datum(leaf, argument, keys, batch) for keys, leaf in flat]
    return structure.unflatten(leaves)


def _is_ready(leaf: Any) -> bool:
    is_one = isinstance(leaf, jax.Array) and not is_cut(leaf) and not is_deleted(leaf)
    return is_one and not is_explicit(leaf)


def _as_datum(leaf: Any, argument: str, keys: tuple[Any, ...], batch: Any) -> Any:
    """Returns an array with its own memory, or the leaf itself, which is static."""
    if _is_ready(leaf):
        return leaf
    where = spelled(argument, keys)
    if isinstance(leaf, _NUMBERS):
        _refuse_lists(batch, argument, keys)
    if isinstance(leaf, jax.Array):
        refuse_foreign(leaf, where)
        leaf = narrowed(leaf, where)
        return without_axes(leaf) if is_explicit(leaf) else leaf
    if isinstance(leaf, bool):
        return Flag(leaf)
    if isinstance(leaf, np.str_ | np.bytes_):
        return leaf.item()
    if isinstance(leaf, np.ndarray | np.generic | float | complex):
        return _copied(leaf, where)
    if not isinstance(leaf, type) and hasattr(leaf, "__array__"):
        return _copied(_converted(leaf, where), where)
    if not isinstance(leaf, type) and hasattr(leaf, "__dlpack__"):
        return owned(np.asarray(jnp.from_dlpack(leaf)))
    refuse_foreign(leaf, where)
    if isinstance(leaf, range):
        raise _list_of_numbers(leaf, where)
    if isinstance(leaf, Mapping):
        raise TypeError(
            f"{where} is a {type(leaf).__name__}, which JAX does not look into. Give a "
            f"dictionary: `dict({where.strip('`')})`."
        )
    if isinstance(leaf, memoryview | bytearray | array.array):
        raise TypeError(
            f"{where} is of type `{type(leaf).__name__}`, whose numbers JAX does not "
            "see. Give an array: `np.asarray(...)`."
        )
    is_loader = isinstance(leaf, Iterable) and not hasattr(leaf, "shape")
    if is_loader and not isinstance(leaf, str | bytes):
        raise TypeError(
            f"{where} is a {type(leaf).__name__}, which is not an array. To take one "
            "batch a step from it, wrap it: `fit(vn.Stream(data), steps)`."
        )
    try:
        hash(leaf)
    except TypeError:
        remedy = "Leave it out, or give what can be hashed, such as a tuple of numbers."
        if dataclasses.is_dataclass(leaf):
            remedy = (
                "Give a dictionary or an `eqx.Module`, or register its class: "
                "`jax.tree_util.register_dataclass`."
            )
        raise TypeError(
            f"{where} is a {type(leaf).__name__}, which is not an array and cannot be "
            f"hashed, so that no compiled program could be found by it. {remedy}"
        ) from None
    return leaf


def _converted(leaf: Any, where: str) -> Any:
    if hasattr(leaf, "columns"):
        raise TypeError(
            f"{where} is a {type(leaf).__name__}, whose columns would lose their "
            "names. Give a dictionary of arrays: "
            "`{str(name): df[name].to_numpy() for name in df.columns}`."
        )
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
    return owned(narrowed(leaf, where))


def _refuse_lists(batch: Any, argument: str, keys: tuple[Any, ...]) -> None:
    """Refuses long lists of numbers, each of which JAX would take for an array."""
    # Each such list has exactly one leaf with this index.
    if keys and isinstance(keys[-1], jtu.SequenceKey) and keys[-1].idx == _LONG:
        for where, node in jtu.tree_leaves_with_path(batch, is_leaf=_is_long_list):
            if _is_long_list(node):
                raise _list_of_numbers(node, spelled(argument, where))


def _is_long_list(node: Any) -> bool:
    if type(node) not in (list, tuple) or len(node) <= _LONG:
        return False
    # A tuple of integers is static: it may be a shape.
    is_data = type(node) is list or any(isinstance(x, _INEXACT) for x in node)
    return is_data and all(isinstance(item, _NUMBERS) for item in node)


def _list_of_numbers(leaf: Any, where: str) -> TypeError:
    return TypeError(
        f"{where} is a {type(leaf).__name__} of {len(leaf)} numbers, which JAX cannot "
        "compute with as one. Give an array: `jnp.asarray(...)`."
    )

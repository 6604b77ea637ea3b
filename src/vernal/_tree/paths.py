"""Parameters by their dotted paths."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from .._boundary import dotted, entrance


class UnknownPathError(KeyError):
    """A selector matches nothing in the tree; the message names the nearest paths."""

    def __str__(self) -> str:
        """Returns the message as it stands: a `KeyError` would quote it."""
        return str(self.args[0]) if self.args else ""


class Leaf(NamedTuple):
    """One leaf of a tree, and where it is."""

    path: str
    segments: tuple[str, ...]
    value: Any

    @property
    def is_parameter(self) -> bool:
        """Whether it is an array of floats or complex numbers, or a Python float."""
        return is_inexact(self.value) or is_float(self.value)

    @property
    def unfitted(self) -> str:
        """What a table says of the leaf if it is not fitted; empty for no row."""
        if is_inexact(self.value):
            return "frozen"
        if isinstance(self.value, float | complex):
            return f"frozen (a Python {type(self.value).__name__})"
        # An integer among parameters is often a float without its dot; a boolean, a
        # member of an enumeration, or one that no float could hold is not.
        if type(self.value) is int:
            return "not fitted (a Python int)" if abs(self.value) < 2**63 else ""
        return f"not fitted ({self.value.dtype})" if _is_few(self.value) else ""


# An array of more integers is taken for indices, or labels.
_MOST_INTEGERS = 16


def _is_few(leaf: Any) -> bool:
    """Whether a leaf is an array of few numbers, and not a raw PRNG key."""
    dtype, shape = getattr(leaf, "dtype", None), np.shape(leaf)
    is_number = dtype is not None and jnp.issubdtype(dtype, jnp.number)
    is_key = is_number and dtype == np.uint32 and shape[-1:] in [(2,), (4,)]
    return is_number and not is_key and 0 < math.prod(shape) <= _MOST_INTEGERS


# NumPy's alone. Known by type: their characters are those of small floats too.
LONG_DOUBLES = (np.longdouble, np.clongdouble)


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` is an array of floats or complex numbers.

    Abstract arrays and NumPy's scalars count, `np.float64` among them; long doubles,
    which JAX does not have, do not.
    """
    return (
        hasattr(leaf, "shape")
        and isinstance(getattr(leaf, "dtype", None), np.dtype)
        and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
        and leaf.dtype.type not in LONG_DOUBLES
    )


def is_float(leaf: Any) -> bool:
    """Whether `leaf` is a Python float; NumPy's `float64`, a subclass, is not."""
    return isinstance(leaf, float) and not isinstance(leaf, np.generic)


def named_leaves(tree: Any) -> list[Leaf]:
    """Lists every leaf of a tree, `None` included, beside its path and its keys.

    Raises a `ValueError` if two parameters have the same path.
    """
    leaves: list[Leaf] = []
    seen: dict[str, Any] = {}
    is_absent = lambda node: node is None or isinstance(node, optax.MaskedNode)
    for keys, value in tree_leaves_with_path(tree, is_leaf=is_absent):
        # `optax.masked` and `optax.partition` put it into a gap.
        value = None if isinstance(value, optax.MaskedNode) else value
        segments = tuple(dotted((key,)) for key in keys)
        leaf = Leaf(".".join(segments), segments, value)
        leaves.append(leaf)
        first = seen.setdefault(leaf.path, keys) if leaf.is_parameter else keys
        if first is not keys:
            raise ValueError(
                f"Two parameters have the same path {leaf.path!r}: "
                f"tree{keystr(first)} and tree{keystr(keys)}. Rename one of the keys: "
                "a dot in a dictionary's key reads like a step down the tree."
            )
    return leaves


@entrance
def paths(tree: Any) -> tuple[str, ...]:
    """Lists the dotted path of every parameter of a pytree.

    A parameter is an array of floats or complex numbers, NumPy's scalars included, or
    a Python float. A path joins the fields, keys and indices that lead to it:
    `optics.layers.wfe`, `layers.0.weight`.

    !!! example

        ```python
        >>> import vernal as vn
        >>> vn.paths({"star": {"flux": 1e6, "position": (0.0, 1.0)}})
        ('star.flux', 'star.position.0', 'star.position.1')

        ```

    **Arguments:**

    - `tree`: any pytree, such as an `equinox.Module`.

    **Returns:**

    A tuple of paths, in the order of the pytree's leaves.

    **Raises:**

    - `ValueError`: if two parameters have the same path, as in
      `{"a.b": x, "a": {"b": y}}`.
    """
    return tuple(leaf.path for leaf in named_leaves(tree) if leaf.is_parameter)

"""Objects that JAX takes for leaves, and the arrays in them."""

import functools
import gc
import itertools
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._tree import is_inexact

# A look into an object ends after this many others, about a millisecond.
_MOST_OBJECTS = 1_000

# In functions, arrays are constants: many close over one, or keep results.
_CLOSED = (
    *(str, bytes, int, float, complex, type(None), type, types.ModuleType),
    *(types.FunctionType, types.BuiltinFunctionType, types.GeneratorType),
    type(functools.cache(lambda: None)),
)


def holds_arrays(leaf: Any, kind: Any = jax.Array) -> bool:
    """Whether an object that JAX does not look into holds arrays of floats of a kind.

    It looks into all that the garbage collector does, and calls nothing of the user's.
    """
    if isinstance(leaf, jax.Array):
        return False
    # The nearest first. The list keeps them alive, so that no identity is met twice.
    met, seen = [leaf], {id(leaf)}
    for obj in met:
        if isinstance(obj, kind) and obj is not leaf and is_inexact(obj):
            return True
        if len(met) >= _MOST_OBJECTS:
            continue
        for part in itertools.islice(_parts(obj), _MOST_OBJECTS):
            if id(part) not in seen:
                seen.add(id(part))
                met.append(part)
    return False


def _parts(obj: Any) -> Iterable[Any]:
    """Returns what an object holds."""
    kind = type(obj)
    # Arrays and compiled functions among them.
    is_of_jax = str(kind.__module__).partition(".")[0] in ("jax", "jaxlib")
    if isinstance(obj, _CLOSED) or (is_of_jax and kind is not jax.tree_util.Partial):
        return ()
    if isinstance(obj, np.ndarray):
        return obj.flat if obj.dtype == object else ()
    return gc.get_referents(obj)


def in_words(leaf: Any) -> tuple[str, str]:
    """Returns what JAX does not look into, and what to do about it."""
    owner = leaf.__self__ if isinstance(leaf, types.MethodType) else leaf
    if isinstance(owner, eqx.Module):
        return "`method`", "give its module instead"
    if isinstance(owner, functools.partial):
        remedy = "make it a `jax.tree_util.Partial`"
    elif isinstance(owner, Mapping):
        remedy = "make it a `dict`"
    elif isinstance(owner, Sequence | np.ndarray):
        remedy = "make it a `list`"
    else:
        remedy = (
            "make it an `eqx.Module`, or register it by "
            "`jax.tree_util.register_dataclass`"
        )
    return f"`{type(owner).__name__}`", remedy

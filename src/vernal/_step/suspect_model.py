"""Warnings of constants in a model that are meant to be fitted, and of its layers."""

import contextlib
import functools
import gc
import itertools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._boundary import PyTree, spelled_leaves, warn_once_of
from .._constraints import Ties
from .._optimiser import ParamOptimiser
from .._tree import by_path, is_inexact
from .abstract_trainer import AbstractTrainer


def warn_of_constants(
    kind: type, model: PyTree, optimiser: Any, ties: Ties | None
) -> None:
    """Warns, once for a class and what it finds, of constants that nobody holds.

    These would be trained if they were arrays of floats: integers of no dimensions, and
    objects with such arrays that JAX does not look into. Python integers, unsigned
    ones, such as keys, and longer arrays are meant as they are.
    """
    integers = list(_unheld(model, optimiser, ties, _is_one_integer))
    if integers:
        known = ", ".join(map(repr, integers[:5])) + ", ..." * (len(integers) > 5)
        is_one = len(integers) == 1
        warn_once_of(
            kind,
            f"`model`: {known} {'is' if is_one else 'are'} not fitted: integers are "
            "constants. To fit one, make it a float, as `jnp.array(70.0)`. To keep "
            "one, make it a Python `int`, or name in `train=` what is fitted.",
            warn_of_constants,
            tuple(integers),
        )
    for path, leaf in _unheld(model, optimiser, ties, holds_arrays).items():
        kind_of_leaf, remedy = in_words(leaf)
        warn_once_of(
            kind,
            f"`model`: the arrays in {path!r} are not fitted: JAX does not look into a "
            f"{kind_of_leaf}. To fit them, {remedy}. To keep them, name in `train=` "
            "what is fitted.",
            warn_of_constants,
            path,
        )


def _unheld(
    model: PyTree, optimiser: Any, ties: Ties | None, is_meant: Callable[[Any], bool]
) -> dict[str, Any]:
    """Returns the leaves that would be trained if they were floats, by path."""
    leaves, structure = jax.tree.flatten(model)
    places = [i for i, leaf in enumerate(leaves) if is_meant(leaf)]
    if isinstance(optimiser, ParamOptimiser) and places:
        floats = [np.zeros(()) if i in places else x for i, x in enumerate(leaves)]
        owners: Any = [None] * len(leaves)
        # Rules may refuse these floats, but there are none.
        with contextlib.suppress(ValueError):
            owners = optimiser.owners(structure.unflatten(floats))
        places = [i for i in places if owners[i] is not None]
    tied = () if ties is None else ties.indices
    names = by_path(model).names
    return {names[i]: leaves[i] for i in places if i not in tied}


def _is_one_integer(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    # Not a difference of times, which NumPy takes for a signed integer; the dtype of
    # keys has no kind.
    return is_array and leaf.shape == () and getattr(leaf.dtype, "kind", "") == "i"


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


def warn_of_training_layers(trainer: AbstractTrainer) -> None:
    """Warns, once for a class, of dropout and the like in the score of a validation.

    A class that defines `evaluate` knows what it does.
    """
    kind = type(trainer)
    if kind.evaluate.__module__.split(".")[0] != __name__.split(".")[0]:
        return
    for where, layer in spelled_leaves("model", trainer.model, _is_in_training):
        if _is_in_training(layer):
            warn_once_of(
                kind,
                f"`validation`: the {type(layer).__name__} {where} is as in training "
                "(`inference=False`), since the score is the loss: it is not that of "
                "the model as you will use it, and `best` and `Patience` follow it. "
                "Define `evaluate(self, model, batch)` in your trainer, with "
                "`eqx.nn.inference_mode(model)`.",
                warn_of_training_layers,
            )
            return


def _is_in_training(node: Any) -> bool:
    if not isinstance(node, eqx.Module):
        return False
    # Dropout of nothing, as attention has it by default, does nothing. A model may have
    # a parameter `p`.
    share = getattr(node, "p", None)
    is_nothing = isinstance(share, int | float) and share == 0
    return getattr(node, "inference", None) is False and not is_nothing

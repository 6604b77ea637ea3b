"""Static fields of a model, which are compared to find compiled programs."""

import dataclasses
from collections.abc import Container, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np


def plain_statics(tree: Any) -> dict[str, Any]:
    """Returns the static fields of a tree of modules that have a plain value, by path.

    Functions and objects are left out: another process cannot know them again.
    """
    found = {".".join(path): value for path, value in _static_fields(tree, ())}
    return {path: value for path, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def refuse_static_arrays(
    tree: Any, what: str = "`model`", only: Container[str] | None = None
) -> None:
    """Refuses an array in a static field of a tree of modules, and names the field.

    An error calls the tree `what`. Of its own fields, only those in `only` are looked
    at, if that is given.
    """
    is_module = lambda node: isinstance(node, eqx.Module)
    for path, value in _static_fields(tree, (), only):
        leaves = jax.tree.leaves(value, is_leaf=is_module)
        if any(isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves):
            raise TypeError(
                f"{what}: the static field {'.'.join(path)!r} holds an array. What is "
                "static is compared to find compiled programs, and arrays do not "
                "compare as one value. Drop `static=True`, and freeze an array of a "
                "model by a rule `None` or by `train`; or make it a tuple."
            )


def _static_fields(
    node: Any, path: tuple[str, ...], only: Container[str] | None = None
) -> Iterator[tuple[Any, Any]]:
    """Yields the path and the value of each static field in a tree of modules."""
    if isinstance(node, dict):
        parts = [(str(key), value, False) for key, value in node.items()]
    # Before tuples: a module may be one too.
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        parts = [
            (field.name, getattr(node, field.name, None), field.metadata.get("static"))
            for field in dataclasses.fields(node)
            if only is None or field.name in only
        ]
    elif isinstance(node, tuple | list):
        parts = [(str(index), value, False) for index, value in enumerate(node)]
    else:
        parts = []
    for name, value, is_static in parts:
        if is_static:
            yield (*path, name), value
        else:
            yield from _static_fields(value, (*path, name))

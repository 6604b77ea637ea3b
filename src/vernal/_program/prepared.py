"""Arguments that stay the same from call to call, taken apart once."""

import weakref
from typing import Any, NamedTuple

import jax

from .._boundary import is_traced


class _Prepared:
    """The leaves and the structure of a tree. Within a program it is that tree."""

    def __init__(self, tree: Any):
        self.leaves, self.structure = jax.tree.flatten(tree)


jax.tree_util.register_pytree_node(
    _Prepared,
    lambda prepared: (prepared.leaves, prepared.structure),
    lambda structure, leaves: structure.unflatten(leaves),
)


class _Known(NamedTuple):
    owner: weakref.ref[Any]
    other: Any
    prepared: list[Any]


# Each as long as its owner lives.
_known: dict[int, _Known] = {}


def prepared(owner: Any, other: Any) -> list[Any]:
    """Prepares two arguments of a program, which are found again by their identity.

    A tree with a list or a dictionary, which may change, is returned as it is.
    """
    key = id(owner)
    known = _known.get(key)
    if known is not None and known.owner() is owner and known.other is other:
        return known.prepared
    trees = owner, other
    if is_traced(*trees):
        # It must not outlive its program.
        return list(trees)
    found = [
        tree if _may_change(jax.tree.structure(tree)) else _Prepared(tree)
        for tree in trees
    ]
    forget = lambda _: _known.pop(key, None)
    _known[key] = _Known(weakref.ref(owner, forget), other, found)
    return found


def _may_change(structure: Any) -> bool:
    node = structure.node_data()
    if node is not None and issubclass(node[0], list | dict):
        return True
    return any(map(_may_change, structure.children()))

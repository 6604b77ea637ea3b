"""Arguments that stay the same from call to call, taken apart once."""

from typing import Any

import jax

from .._boundary import OfObjects, is_traced


class _Prepared:
    """The leaves and the structure of a tree. Within a program it is that tree."""

    def __init__(self, tree: Any):
        self.leaves, self.structure = jax.tree.flatten(tree)


jax.tree_util.register_pytree_node(
    _Prepared,
    lambda prepared: (prepared.leaves, prepared.structure),
    lambda structure, leaves: structure.unflatten(leaves),
)


# By the first of two arguments: the other one, and both as they were prepared.
_known = OfObjects[tuple[Any, list[Any]]]()


def prepared(owner: Any, other: Any) -> list[Any]:
    """Prepares two arguments of a program, which are found again by their identity.

    A tree with a list or a dictionary, which may change, is returned as it is.
    """
    known = _known.get(owner)
    if known is not None and known[0] is other:
        return known[1]
    trees = owner, other
    if is_traced(*trees):
        # It must not outlive its program.
        return list(trees)
    found = [
        tree if _may_change(jax.tree.structure(tree)) else _Prepared(tree)
        for tree in trees
    ]
    return _known.put(owner, (other, found))[1]


def _may_change(structure: Any) -> bool:
    node = structure.node_data()
    if node is not None and issubclass(node[0], list | dict):
        return True
    return any(map(_may_change, structure.children()))

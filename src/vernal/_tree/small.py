"""Many small trees, joined so that a program has one operation for all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._boundary import PyTree

# An operation for each of a thousand small leaves takes longer to compile than all the
# rest of a step. A few are fused anyway, and a large one is not worth a copy.
_FEW, _SMALL = 16, 1024


def joinable(trees: Sequence[PyTree], kind: Callable[[Any], Any]) -> list[list[int]]:
    """Groups the indices of trees of one kind, if these are small and many.

    Any other tree is a group of its own, and so is one whose kind is `None`.
    """
    groups: dict[Any, list[int]] = {}
    for index, tree in enumerate(trees):
        is_small = sum(map(jnp.size, jax.tree.leaves(tree))) <= _SMALL
        own = kind(tree) if is_small and len(trees) > _FEW else None
        groups.setdefault(index if own is None else (own,), []).append(index)
    return list(groups.values())

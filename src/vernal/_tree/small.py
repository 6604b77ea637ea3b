"""Many small trees, joined so that a program has one operation for all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._boundary import PyTree

# An operation for each of a thousand small leaves takes longer to compile than all the
# rest of a step. A few are fused anyway, and a large one is not worth a copy.
_FEW, _SMALL = 16, 1024


def joinable(trees: Sequence[PyTree], kind: Callable[[Any], Any]) -> list[list[int]]:
    """Groups the indices of trees of one kind, if these are small and many.

    Any other tree is a group of its own, and so is one whose kind is `None`, or which
    is split among devices: JAX does not join explicitly sharded arrays.
    """
    groups: dict[Any, list[int]] = {}
    for index, tree in enumerate(trees):
        leaves, own = jax.tree.leaves(tree), None
        is_small = len(trees) > _FEW and sum(map(jnp.size, leaves)) <= _SMALL
        if is_small and not any(map(is_split, leaves)):
            own = kind(tree)
        groups.setdefault(index if own is None else (own,), []).append(index)
    return list(groups.values())


def by_element(fn: Callable[..., Array], rows: Sequence[Any]) -> list[Array]:
    """Calls a function of elements for each row, and once for all that are joinable.

    A row has its arguments: trees whose arrays are all of the same shape.
    """
    found: dict[int, Array] = {}
    kind = lambda row: (
        jax.tree.structure(row),
        tuple(map(jnp.result_type, jax.tree.leaves(row))),
    )
    for own in joinable(rows, kind):
        if len(own) == 1:
            found[own[0]] = fn(*rows[own[0]])
            continue
        join = lambda *leaves: jnp.concatenate([*map(jnp.ravel, leaves)])
        result = fn(*jax.tree.map(join, *(rows[i] for i in own)))
        like = [jax.tree.leaves(rows[i])[0] for i in own]
        parts = jnp.split(result, np.cumsum([x.size for x in like])[:-1])
        pairs = zip(own, parts, like, strict=True)
        found |= {i: part.reshape(x.shape) for i, part, x in pairs}
    return [found[i] for i in range(len(rows))]


def is_split(leaf: Any) -> bool:
    # Of an array in a program only what is explicit is known.
    return any(getattr(jax.typeof(leaf).sharding, "spec", ()))

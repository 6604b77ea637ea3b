"""Groups of parameters, each with a matrix of its own."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from ._paths import named_leaves, paths
from ._ravel import ravel, unravel
from ._selectors import resolve
from ._typing import Params

Block = tuple[int, ...]
"""The indices of some leaves, in the order of `jax.tree.leaves`."""


def find_blocks(
    params: Params, selectors: Sequence[Any], argument: str
) -> tuple[Block, ...]:
    """Finds which leaves of `params` belong to which block.

    **Arguments:**

    - `params`: a tree of the trained leaves, with `None` for the others.
    - `selectors`: one selector for each block.
    - `argument`: what an error calls the selectors.

    **Returns:**

    For each block the indices of its leaves, in the order of `jax.tree.leaves`.

    **Raises:**

    - `UnknownPathError`: if a selector matches nothing.
    - `ValueError`: if two blocks share a parameter.
    """
    names = paths(params)
    owner: dict[int, Any] = {}
    blocks = []
    for selector in selectors:
        owners = resolve(params, [selector], argument=argument)
        block = tuple(i for i, found in enumerate(owners) if found is not None)
        for index in block:
            if index in owner:
                raise ValueError(
                    f"`{argument}`: the blocks {owner[index]!r} and {selector!r} share "
                    f"{names[index]!r}. A parameter belongs to one block."
                )
            owner[index] = selector
        blocks.append(block)
    return tuple(blocks)


def only(params: Params, block: Block) -> Params:
    """Leaves out all but the leaves of one block."""
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(
        [leaf if index in block else None for index, leaf in enumerate(leaves)]
    )


def ravel_blocks(
    params: Params, blocks: Sequence[Block], dtypes: Sequence[DTypeLike]
) -> list[Float[Array, " D"]]:
    """Joins the leaves of each block into one vector."""
    leaves = jax.tree.leaves(params)
    return [
        ravel([leaves[index] for index in block], dtype)
        for block, dtype in zip(blocks, dtypes, strict=True)
    ]


def unravel_blocks(
    flats: Sequence[Float[Array, " D"]], blocks: Sequence[Block], like: Params
) -> Params:
    """Undoes `ravel_blocks`: every leaf has the shape and dtype it has in `like`."""
    leaves, structure = jax.tree.flatten(like)
    for flat, block in zip(flats, blocks, strict=True):
        own = unravel(flat, [leaves[index] for index in block])
        for index, leaf in zip(block, own, strict=True):
            leaves[index] = leaf
    return structure.unflatten(leaves)


def places(params: Params, blocks: Sequence[Block]) -> list[np.ndarray]:
    """Finds where in `ravel(params)` the elements of each block are."""
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    ends = np.cumsum(sizes)
    return [
        np.concatenate([np.arange(ends[i] - sizes[i], ends[i]) for i in block])
        for block in blocks
    ]


def nest_blocks(params: Params, blocks: Sequence[Block]) -> dict[str, Any]:
    """Nests the indices of blocks in dictionaries with the paths of the parameters.

    A block of several leaves is at the path of the first; at the others is `None`.
    """
    nested: dict[str, Any] = {}
    named = [leaf for leaf in named_leaves(params) if leaf.value is not None]
    for index, block in enumerate(blocks):
        for member in block:
            *way, last = named[member].segments or ("",)
            node = nested
            for segment in way:
                node = node.setdefault(segment, {})
            node[last] = index if member == block[0] else None
    return nested

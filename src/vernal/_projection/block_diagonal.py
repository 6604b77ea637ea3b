"""Whitening of a block-diagonal matrix, block by block."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from .._boundary import Params
from .blocks import Block, find_blocks, leaves_by_path
from .whitening import AbstractWhitening, Unchanged

T = TypeVar("T")


def whiten_blocks(
    given: Mapping[Any, T],
    params: Params,
    ranks: Mapping[Any, int],
    whiten: Callable[[T, Params, int | None, str], AbstractWhitening],
) -> tuple[tuple[Block, ...], tuple[AbstractWhitening, ...]]:
    """Finds the maps that whiten several groups of `params`.

    **Arguments:**

    - `given`: from selectors to what `whiten` takes: a matrix, say.
    - `params`: a tree of the trained leaves.
    - `ranks`: from selectors to how many directions to keep.
    - `whiten`: a function of what is given for a group, its parameters, its rank, and
        what an error calls it.

    **Returns:**

    The blocks, in the order of their first leaves, and a map for each. A leaf without a
    matrix is a block of its own that stays as it is.
    """
    if not given:
        raise ValueError(
            '`blocks` is empty: it needs at least one matrix, such as `{"flux": fmat}`.'
        )
    if odd := [selector for selector in ranks if selector not in given]:
        raise ValueError(
            f"`rank` has {odd[0]!r}, which is no block. The blocks are "
            f"{', '.join(map(repr, given))}."
        )
    selectors = tuple(given)
    blocks = find_blocks(params, selectors, "blocks")
    found: dict[Block, AbstractWhitening] = {}
    for selector, block, own in zip(
        selectors, blocks, leaves_by_path(params, blocks), strict=True
    ):
        name, rank = f"blocks[{selector!r}]", ranks.get(selector)
        found[block] = whiten(given[selector], own, rank, name)
    owned = {index for block in blocks for index in block}
    for index, leaf in enumerate(jax.tree.leaves(params)):
        if index not in owned:
            found[index,] = Unchanged(leaf.shape, leaf.dtype)
    order = tuple(sorted(found))
    return order, tuple(found[block] for block in order)

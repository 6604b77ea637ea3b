"""Groups of parameters, each with a matrix of its own."""

from collections.abc import Sequence
from typing import Any

from ._paths import paths
from ._selectors import resolve
from ._typing import Params


def find_blocks(
    params: Params, selectors: Sequence[Any], argument: str
) -> tuple[tuple[int, ...], ...]:
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

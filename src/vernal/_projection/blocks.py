"""Blocks: groups of parameters, each whitened by its own matrix."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .._boundary import Params
from .._tree import (
    atoms,
    joinable,
    named_leaves,
    paths,
    resolve,
    shape_and_dtype,
    widest,
)
from .whitening import AbstractWhitening, Unchanged

Block = tuple[int, ...]
"""The indices of some leaves, in the order of `jax.tree.leaves`."""


def find_blocks(params: Params, selectors: Sequence[Any]) -> tuple[Block, ...]:
    """Finds the leaves of the block of each selector, of an argument `blocks`.

    Raises if a selector matches nothing, if two blocks share a parameter, or if one is
    empty.
    """
    names = paths(params)
    # With a block for each parameter, resolving each selector would be quadratic.
    indices = {name: index for index, name in enumerate(names)}
    owner: dict[int, Any] = {}
    blocks = []
    for selector in selectors:
        wanted = list(atoms(selector, "blocks"))
        if all(isinstance(atom, str) and atom in indices for atom in wanted):
            block = tuple(sorted({indices[atom] for atom in wanted}))
        else:
            owners = resolve(params, [selector], argument="blocks")
            block = tuple(i for i, found in enumerate(owners) if found is not None)
        if not block:
            raise ValueError(f"`blocks`: the block {selector!r} selects nothing.")
        for index in block:
            if index in owner:
                raise ValueError(
                    f"`blocks`: {owner[index]!r} and {selector!r} share "
                    f"{names[index]!r}. A parameter belongs to one block."
                )
            owner[index] = selector
        blocks.append(block)
    return tuple(blocks)


def leaves_by_path(
    params: Params, blocks: Sequence[Block]
) -> list[OrderedDict[str, Array]]:
    names, leaves = paths(params), jax.tree.leaves(params)
    return [OrderedDict((names[i], leaves[i]) for i in block) for block in blocks]


def on_each(
    fn: Callable[..., Array],
    whitenings: Sequence[AbstractWhitening],
    *arrays: Sequence[Array],
) -> list[Array]:
    """Applies a function to each whitening and its arrays.

    Many small ones of the same shapes are one batch in a compiled program.
    """
    calls = list(zip(whitenings, *arrays, strict=True))
    results: dict[int, Array] = {}
    for own in joinable(calls, _kind_of_call):
        if len(own) == 1:
            results[own[0]] = fn(*calls[own[0]])
        else:
            batch = jax.tree.map(lambda *x: jnp.stack(x), *(calls[i] for i in own))
            results |= zip(own, jax.vmap(fn)(*batch), strict=True)
    return [results[index] for index in range(len(calls))]


def _kind_of_call(call: tuple[Any, ...]) -> Any:
    leaves, structure = jax.tree.flatten(call)
    is_traced = any(isinstance(leaf, Tracer) for leaf in leaves)
    # Outside a trace there is nothing to compile, and `Unchanged` computes nothing.
    if isinstance(call[0], Unchanged) or not is_traced:
        return None
    return structure, *map(shape_and_dtype, leaves)


def places(params: Params, blocks: Sequence[Block]) -> list[np.ndarray]:
    """Finds the indices of the elements of each block in `ravel(params)`."""
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    ends = np.cumsum(sizes)
    return [
        np.concatenate([np.arange(ends[i] - sizes[i], ends[i]) for i in block])
        for block in blocks
    ]


def nest_blocks(params: Params, blocks: Sequence[Block]) -> OrderedDict[str, Any]:
    """Nests the indices of blocks in dictionaries, by the paths of the parameters.

    A block of several leaves is at the path of the first. The others have `None`, as do
    the leaves that are `None` in `params`.
    """
    firsts = {block[0]: index for index, block in enumerate(blocks)}
    nested: OrderedDict[str, Any] = OrderedDict()
    count = 0
    for leaf in named_leaves(params):
        *way, last = leaf.segments or ("",)
        node = nested
        for segment in way:
            node = node.setdefault(segment, OrderedDict())
        if leaf.value is None:
            node[last] = None
        else:
            node[last] = firsts.get(count)
            count += 1
    return nested


def scatter(
    matrices: Sequence[Float[Array, "..."]],
    rows: Sequence[np.ndarray],
    columns: Sequence[np.ndarray],
    shape: tuple[int, int],
) -> Float[Array, "rows columns"]:
    """Puts the matrices of blocks into one, at their rows and columns."""
    if len(matrices) == 1:
        return matrices[0]
    dtype = widest(matrix.dtype for matrix in matrices)
    whole = jnp.zeros(shape, dtype)
    for down, across, matrix in zip(rows, columns, matrices, strict=True):
        whole = whole.at[np.ix_(down, across)].set(matrix.astype(dtype))
    return whole

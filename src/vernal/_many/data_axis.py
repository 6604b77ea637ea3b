"""The part of the data that belongs to each member: `data_axis` of `fit_many`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path

from .._boundary import spelled, spelled_leaves, whole_number
from .mapped_chunk import Flags


def members_first(
    batch: Any, data_axis: Any, size: int, argument: str
) -> tuple[Any, Flags]:
    """Moves the axis of `size` members to the front of each leaf that has one.

    Returns the batch, and which leaves have a row for each member. Errors call it
    `argument`.
    """
    axes, leaves = axes_of(batch, data_axis, argument), []
    named = spelled_leaves(argument, batch)
    for (where, leaf), axis in zip(named, axes, strict=True):
        if axis is None:
            leaves.append(leaf)
            continue
        length = leaf.shape[axis] if -leaf.ndim <= axis < leaf.ndim else None
        if length != size:
            raise ValueError(
                f"`data_axis`: {where} has the shape {leaf.shape}, whose axis "
                f"{axis} must be as long as there are trainers, {size}."
                f"{_to_stack(batch, argument, where)}"
            )
        leaves.append(jnp.moveaxis(leaf, axis, 0))
    batch = jax.tree.structure(batch).unflatten(leaves)
    return batch, tuple(axis is not None for axis in axes)


def _to_stack(batch: Any, argument: str, where: str) -> str:
    """Says how to make an array of the list that a leaf is in, if it is in one."""
    is_list = lambda node: isinstance(node, list)
    for keys, node in tree_leaves_with_path(batch, is_leaf=is_list):
        name = spelled(argument, keys).strip("`")
        if is_list(node) and where.startswith(f"`{name}["):
            is_ragged = len({jnp.shape(leaf) for leaf in jax.tree.leaves(node)}) > 1
            first = "Pad what is shorter, mask that (`where=` of `vn.likelihoods`), and"
            stack = f"{first} stack" if is_ragged else "Stack"
            return f" `{name}` is a list. {stack} it to one array: `np.stack({name})`."
    return ""


def axes_of(batch: Any, data_axis: Any, argument: str) -> list[int | None]:
    """Finds the axis of each leaf of a batch, `None` for what is shared."""
    is_none = lambda node: node is None
    for axis in jax.tree.leaves(data_axis):
        whole_number(axis, "data_axis")
    spread = lambda axis, part: jax.tree.map(lambda _: axis, part)
    try:
        axes = jax.tree.map(spread, data_axis, batch, is_leaf=is_none)
    except ValueError as error:
        like = jax.tree.map(lambda _: 0, batch)
        raise ValueError(
            f"`data_axis` is {data_axis!r}, but must be one axis, or a tree "
            f"of axes like `{argument}`, such as {like!r}, with `None` for what "
            "all share."
        ) from error
    found = jax.tree.leaves(axes, is_leaf=is_none)
    leaves = jax.tree.leaves(batch, is_leaf=is_none)
    return [
        axis if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
        for axis, leaf in zip(found, leaves, strict=True)
        if leaf is not None
    ]

"""The part of the data that belongs to each member: `data_axis` of `fit_many`."""

from typing import Any

import jax
import jax.numpy as jnp

from .._boundary import spelled_leaves, whole_number
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
            )
        leaves.append(jnp.moveaxis(leaf, axis, 0))
    batch = jax.tree.structure(batch).unflatten(leaves)
    return batch, tuple(axis is not None for axis in axes)


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

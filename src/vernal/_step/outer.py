"""A warning of broadcasting that compares each datum with each model value."""

import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from .._boundary import spelled_leaves, warn_once_of
from .._program import jaxpr_of, sums_over_pairs
from .abstract_trainer import AbstractTrainer


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _suspects(
    shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]
) -> tuple[str, str | None] | None:
    """Finds leaves of a batch that make residuals of shape `(n, n)` from `n` data.

    Returns a leaf of `n` elements, and one of another shape or `None` if the first is a
    column; `None` if nothing is odd. `shapes` are those of the leaves, by name.
    """
    square = _squeezed(shape)
    if len(square) != 2 or square[0] != square[1]:
        return None
    size = square[0]
    # A leaf with `n * n` elements is the data, unless it has `n` of each datum.
    is_data = lambda s: (
        math.prod(s) >= size**2 and (s[0] != size or _squeezed(s) == square)
    )
    if any(map(is_data, shapes.values())):
        return None
    lines = [name for name, s in shapes.items() if math.prod(s) == size]
    columns = [name for name in lines if len(shapes[name]) > 1]
    others = [name for name, s in shapes.items() if name in lines or s[:1] == (size,)]
    for one in (*columns, *lines):
        for other in others:
            if shapes[other] != shapes[one]:
                return one, other
    return (columns[0], None) if columns else None


def _shapes(batch: Any) -> dict[str, tuple[int, ...]]:
    leaves = spelled_leaves("batch", batch)
    return {where: getattr(leaf, "shape", ()) for where, leaf in leaves}


def warn_of_outer(trainer: AbstractTrainer, residuals: Array, batch: Any) -> None:
    """Warns, once for a class, of more residuals than there are data."""
    shape = residuals.shape
    if len(shape) < 2:
        return
    shapes = _shapes(batch)
    if (found := _suspects(shape, shapes)) is None:
        return
    one, other = found
    beside = f" and {other} {shapes[other]}" if other else ""
    warn_once_of(
        type(trainer),
        f"`{type(trainer).__name__}.residuals` returned an array of shape {shape}, "
        f"and no datum has it: {one} has the shape {shapes[one]}{beside}. Arrays of "
        f"such shapes broadcast against each other, so that each datum is compared "
        "with each value of the model, and the fit and its errors are wrong. Give "
        "them one shape, such as by `y[:, 0]`. If it is on purpose, make the column "
        "of a vector, by `y[:, 0][:, None]`, and return `residuals.ravel()`.",
        warn_of_outer,
    )


def warn_of_flat_pairs(
    trainer: AbstractTrainer, count: int, batch: Any, sums: Callable[[Any], Any]
) -> None:
    """Warns, once for a class, of pairs that are joined to other residuals, or flat.

    `count` is the number of residuals, and `sums` computes their sums from a batch.
    That is traced again only if there are more residuals than numbers in the batch, and
    as many as pairs along one of its axes.
    """
    shapes = _shapes(batch).values()
    has_pairs = any(n > 1 and n * n <= count for shape in shapes for n in shape)
    if not has_pairs or count <= sum(map(math.prod, shapes)):
        return
    jaxpr = jaxpr_of(sums, batch)
    if jaxpr is not None and (size := sums_over_pairs(jaxpr)) is not None:
        kind = type(trainer)
        text = f"`{kind.__name__}.residuals` has all {pairs_text(size)}"
        warn_once_of(kind, text, warn_of_outer)


def pairs_text(size: int) -> str:
    """Says what all pairs of data come from, and what helps."""
    return (
        f"{size} x {size} pairs: an array of shape ({size}, 1) broadcasts against one "
        f"of shape ({size},), so that each datum is compared with each value of the "
        "model, and the fit and its errors are wrong. Give them one shape, such as by "
        "`y[:, 0]`. If it is on purpose, make the column of a vector, by "
        "`y[:, 0][:, None]`."
    )

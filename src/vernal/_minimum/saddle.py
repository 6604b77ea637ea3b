"""Lower points beside a saddle, to which no slope of the data leads.

Where a model is symmetric, as in the separation of two stars that is zero, its squares
may be largest. The curvature of Gauss and Newton is never negative, and does not show
it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._curvature import hessian_product, matmul, traced
from .._program import program
from .._step import AbstractTrainer
from .._tree import ravel, unravel
from .distance import SUBJECT, minimised
from .idle import Around, first_noticed, idle_directions
from .local import Curved, Triangle


def beside(around: Around, local: Triangle | Curved) -> Float[np.ndarray, " D"] | None:
    """Finds a lower point along the direction in which the loss curves downwards most.

    From each point that is looked at on the way to the next the loss falls.
    """
    if (steepest := _steepest(around, local)) is None:
        return None
    curvature, direction = steepest
    length = np.sqrt(2 * around.noise / -curvature)
    if (seen := around.look_along(length * direction)) is None:
        return None
    lowest = 0
    for way in seen.ways:
        end = way[_end_of_fall(seen.losses[way], around.noise)]
        lowest = end if seen.losses[end] < seen.losses[lowest] else lowest
    return seen.points[lowest] if lowest else None


def _end_of_fall(losses: np.ndarray, noise: float) -> int:
    """Returns the last of the points up to which the loss falls, 0 if it does not."""
    first = first_noticed(losses, noise)
    if not losses[first] < losses[0]:
        return 0
    falls = losses[first + 1 :] < losses[first:-1]
    return first + int(np.argmin(np.append(falls, False)))


def _steepest(
    around: Around, local: Triangle | Curved
) -> tuple[float, Float[np.ndarray, " D"]] | None:
    """Finds where the loss curves downwards most: how much, and the direction.

    `None` if it does so nowhere, beyond rounding.
    """
    if isinstance(local, Curved):
        directions, curvature = np.diag(1 / local.scale), local.hessian
    else:
        directions = idle_directions(local)
        if not len(directions):
            return None
        placed = jnp.asarray(directions.astype(local.flat.dtype))
        found = _curvature(around.trainer, placed, around.batch, around.kind)
        if found is None:
            return None
        # An element without any slope has no unit but that of its own curvature.
        curvature = jax.device_get(found)
        is_alone = np.count_nonzero(directions, axis=1) == 1
        units = np.sqrt(np.where(is_alone, abs(np.diagonal(curvature)), 1))
        units = np.where(units > 0, units, 1)[:, None]
        directions, curvature = directions / units, curvature / units / units.T
    if not (curvature.size and np.isfinite(curvature).all()):
        return None
    values, vectors = np.linalg.eigh(curvature.astype(float))
    rounding = float(jnp.finfo(around.point.dtype).eps) ** 0.5
    if not values[0] < -rounding * max(abs(values).max(), 1):
        return None
    lowest = vectors[:, 0] * np.sign(vectors[abs(vectors[:, 0]).argmax(), 0])
    return values[0], lowest @ directions


@program
def _curvature(
    trainer: AbstractTrainer, directions: Float[Array, "K D"], batch: Any, kind: str
) -> Float[Array, "K K"] | None:
    """Returns the second derivatives of what falls along, and between, directions."""
    params, value = trainer.params, minimised(trainer, batch, kind)
    flat = ravel(params).astype(directions.dtype)
    loss = traced(lambda flat: value(unravel(flat, params)), flat)
    try:
        product = hessian_product(loss, flat, SUBJECT)
    except TypeError:
        # No mode has second derivatives.
        return None
    return matmul(jax.lax.map(product, directions), directions.T)

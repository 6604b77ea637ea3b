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

from .._curvature import Subject, hessian_product, matmul, traced
from .._program import program
from .._step import AbstractTrainer
from .._tree import ravel, unravel
from .distance import minimised
from .idle import Around, idle_directions
from .local import Curved, Triangle


def beside(around: Around, local: Triangle | Curved) -> Float[np.ndarray, " D"] | None:
    """Finds a lower point along the direction in which the loss curves downwards most.

    From here to there it falls all the way.
    """
    if (found := _steepest(around, local)) is None:
        return None
    curvature, direction = found
    # At this length the fall is noticed, if it is that of a parabola.
    length = np.sqrt(2 * around.noise / -curvature)
    if (seen := around.look_along(length * direction)) is None:
        return None
    here, lowest, found = seen.losses[0], seen.losses[0], None
    for side in np.split(np.arange(1, len(seen.losses)), 2):
        losses = np.append(here, seen.losses[side])
        first = int(np.argmax(~(abs(losses - here) <= around.noise)))
        if not losses[first] < here:
            continue
        last = first + int(np.argmin(np.append(np.diff(losses[first:]) < 0, False)))
        if losses[last] < lowest:
            lowest, found = losses[last], seen.points[side[last - 1]]
    return found


def _steepest(around: Around, local: Triangle | Curved) -> Any:
    """Finds where the loss curves downwards most: how much, and the direction.

    `None` if it does so nowhere.
    """
    if isinstance(local, Curved):
        directions, curvature = np.diag(1 / local.scale), local.hessian
    else:
        is_free = ~np.broadcast_to(local.held, around.point.shape)
        if not (idle := idle_directions(local, around.point, is_free)):
            return None
        directions = np.asarray(idle, around.point.dtype)
        inputs = around.trainer, jnp.asarray(directions), around.batch, around.kind
        curvature = jax.device_get(_curvature(*inputs))
    if curvature is None or not np.isfinite(curvature).all():
        return None
    values, vectors = np.linalg.eigh(curvature.astype(float))
    lowest = vectors[:, 0] * np.sign(vectors[abs(vectors[:, 0]).argmax(), 0])
    return (values[0], lowest @ directions) if values[0] < 0 else None


@program
def _curvature(
    trainer: AbstractTrainer, directions: Float[Array, "K D"], batch: Any, kind: str
) -> Float[Array, "K K"] | None:
    """Returns the second derivatives of what falls along, and between, directions."""
    params, value = trainer.params, minimised(trainer, batch, kind)
    flat = ravel(params).astype(directions.dtype)
    loss = traced(lambda flat: value(unravel(flat, params)), flat)
    subject = Subject("what is minimised", is_quiet=True)
    try:
        product = hessian_product(loss, flat, subject)
    except TypeError:
        # No mode has second derivatives.
        return None
    return matmul(jax.lax.map(product, directions), directions.T)

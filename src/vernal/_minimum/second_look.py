"""Minima that the curvature of Gauss and Newton does not show.

Where a model is symmetric, as in the width of a line that is zero, its residuals have
no slope. Close by, their slope and their curvature are small alike, and the distance
that is made of the two is not.
"""

from typing import Any

import jax
import numpy as np

from .._program import program
from .._step import AbstractTrainer
from .distance import by_hessian
from .edm import Distance
from .formulas import distance_of
from .idle import Around
from .local import Curved

_by_hessian = program(by_hessian)


def second_look(
    trainer: AbstractTrainer, batch: Any, kind: str, local: Any, distance: Distance
) -> Distance:
    """Looks by the second derivatives at where squares only seem to fall further.

    If these say that it is a minimum, and the loss rises to both sides of it, that is
    the answer. The trainer is stripped; `kind` is that of `what_falls`, `local` and
    `distance` are what `measure` and `distance_of` found.
    """
    if not distance.is_leap or local.turn is not None:
        return distance
    curved = jax.device_get(_by_hessian(trainer, None, batch, kind, None))
    found = distance_of(curved)._replace(tolerance=distance.tolerance, is_leap=True)
    if not (isinstance(curved, Curved) and found.is_minimum):
        return distance
    around = Around(trainer, batch, kind, float(distance.noise))
    if distance.direction.any():
        ways = distance.direction[None, :].astype(float) / np.asarray(local.scale)
    else:
        size = len(curved.scale)
        ways = np.eye(size)[~np.broadcast_to(curved.held, size)]
    if not all(_rises(around, way, curved) for way in ways):
        return distance
    direction = np.sum(ways * curved.scale, axis=0)
    direction = (direction / np.linalg.norm(direction)).astype(found.direction.dtype)
    return found._replace(direction=direction)


def _rises(around: Around, way: np.ndarray, curved: Curved) -> bool:
    """Whether the loss rises to both sides, as far as it is seen to change."""
    scaled = way * curved.scale
    curvature = scaled @ curved.hessian.astype(float) @ scaled
    if not curvature > 0:
        return False
    seen = around.look_along(way / np.sqrt(curvature))
    if seen is None:
        return False
    sides = np.split(seen.losses[1:] - seen.losses[0], 2)
    noticed = [side[np.argmax(~(abs(side) <= around.noise))] for side in sides]
    return bool(np.all(np.asarray(noticed) > around.noise))

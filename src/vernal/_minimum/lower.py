"""Lower points that a minimiser does not see, since the data have no slope there."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from .._constraints import Bounds
from .._step import AbstractTrainer, bounds_of
from .._tree import by_path
from .edm import Distance
from .idle import Around
from .local import Curved, Triangle
from .plateau import across
from .saddle import beside
from .second_look import clear


class Lower(NamedTuple):
    """A lower point, which no slope leads to, and the distance that knows of it."""

    point: Float[np.ndarray, " D"]
    distance: Distance


def lower_point(
    trainer: AbstractTrainer, batch: Any, kind: str, local: Any, distance: Distance
) -> Lower | None:
    """Finds a lower point beside a saddle, or across a plateau.

    `None` if there is none, or no direction in which the data have no slope. The
    trainer is stripped; `kind` is that of `what_falls`, `local` and `distance` are what
    `measure` and `distance_of` found.
    """
    if not isinstance(local, Triangle | Curved):
        return None
    local = jax.device_get(local)
    if local.turn is not None or not np.isfinite(local.loss):
        return None
    around = Around(trainer, batch, kind, float(distance.noise))
    point, is_plateau = beside(around, local), False
    if point is not None and isinstance(local, Curved):
        here = clear(trainer, batch, kind, local)
        point = point if here is local else beside(around, here)
    bounds = bounds_of(trainer)
    if point is None and bounds is not None and np.any(local.held):
        inward = _inward(bounds, trainer.params)
        point, is_plateau = across(around, local, inward), True
    if point is None:
        return None
    step = (point - around.point).astype(float)
    step = step if is_plateau else step * local.scale
    found = distance._replace(
        is_saddle=np.asarray(True),
        is_plateau=np.asarray(is_plateau),
        direction=(step / np.linalg.norm(step)).astype(distance.direction.dtype),
    )
    return Lower(point, found)


def _inward(bounds: Bounds, params: Any) -> Int[np.ndarray, " D"]:
    """Returns the sign of the way in for each element at a bound, 0 for others."""
    signs = []
    for path, leaf in by_path(params).items():
        x = np.asarray(leaf)
        low, high = bounds.low.get(path, -np.inf), bounds.high.get(path, np.inf)
        sign = (x <= np.asarray(low)).astype(int) - (x >= np.asarray(high))
        signs.append(sign.ravel())
    return np.concatenate(signs)

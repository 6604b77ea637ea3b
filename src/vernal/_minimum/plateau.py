"""Lower points across a plateau: where a parameter at its bound leaves others idle.

The phase of an oscillation does nothing where its amplitude is zero, and yet decides
whether the loss would fall with the amplitude.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._constraints import Bounds
from .._curvature import Subject, gradient, traced
from .._program import program
from .._step import AbstractTrainer, bounds_of
from .._tree import as_parameters, by_path, ravel, unravel
from .distance import minimised
from .edm import Distance
from .local import Curved, Triangle, noise_of_zero

# The steps to both sides, and how many idle directions are looked along. Within half a
# turn, in either direction, there is a power of two at which a cosine has changed sign.
_STEPS = 2.0 ** np.arange(-40, 24)
_BOTH = np.column_stack([_STEPS, -_STEPS]).ravel()
_MOST_DIRECTIONS = 16


class Lower(NamedTuple):
    """A lower point across a plateau, and the distance that knows of it."""

    point: Float[np.ndarray, " D"]
    distance: Distance


def beyond(
    trainer: AbstractTrainer, batch: Any, kind: str, local: Any, distance: Distance
) -> Lower | None:
    """Finds a lower point from which a parameter would not be pushed to its bound.

    It looks along directions in which the loss is flat, and from there away from the
    bound. `None` if there is no such point, or nothing is both held and flat. The
    trainer is stripped; `kind` is that of `what_falls`, `local` and `distance` are what
    `measure` and `distance_of` found.
    """
    bounds = bounds_of(trainer)
    if bounds is None or not isinstance(local, Triangle | Curved):
        return None
    if not (inward := _inward(bounds, trainer.params)).any():
        return None
    local = jax.device_get(local)
    if local.turn is not None or not np.isfinite(local.loss):
        return None
    if not (idle := _idle(local, inward == 0)):
        return None
    here = np.asarray(ravel(as_parameters(trainer.params)))
    noise = float(distance.noise)

    def look(start: np.ndarray, steps: np.ndarray, along: np.ndarray) -> Any:
        points = np.vstack([start, start + steps[:, None] * along]).astype(here.dtype)
        try:
            return jax.device_get(_look(trainer, jnp.asarray(points), batch, kind))
        except RuntimeError:
            # A model may have an `eqx.error_if` for parameters as far off.
            return None

    for direction in idle:
        direction /= np.max(abs(direction) / np.maximum(abs(here), 1))
        if (found := look(here, _BOTH, direction)) is None:
            return None
        points, losses, slopes = found
        pushes = inward * slopes
        is_held = (inward != 0) & (pushes[0] > 0)
        if not is_held.any():
            return None
        is_as_low = (losses <= losses[0] + noise)[:, None] & np.isfinite(pushes)
        for index in np.flatnonzero(is_held):
            push = np.where(is_as_low[:, index], pushes[:, index], np.inf)
            if not push.min() < 0:
                continue
            # The nearest of those from which the loss falls well.
            near = points[np.flatnonzero(push <= push.min() / 2)[0]]
            away = np.where(np.arange(here.size) == index, inward, 0)
            if (found := look(near, np.repeat(_STEPS, 2), away)) is None:
                return None
            ends, lower, _ = found
            lowest = np.argmin(np.where(np.isfinite(lower), lower, np.inf))
            if lower[lowest] < losses[0] - noise:
                step = (ends[lowest] - here).astype(float)
                return Lower(ends[lowest], _across(distance, step))
    return None


def _across(distance: Distance, step: np.ndarray) -> Distance:
    """Says of a distance that it is from a plateau, with a lower point a step away."""
    direction = step.astype(distance.direction.dtype) / np.linalg.norm(step)
    yes = np.asarray(True)
    return distance._replace(is_saddle=yes, is_plateau=yes, direction=direction)


def _inward(bounds: Bounds, params: Any) -> np.ndarray:
    """Returns the sign of the way in for each element at a bound, 0 for others."""
    signs = []
    for path, leaf in by_path(params).items():
        x = np.asarray(leaf)
        low, high = bounds.low.get(path, -np.inf), bounds.high.get(path, np.inf)
        sign = (x <= np.asarray(low)).astype(int) - (x >= np.asarray(high))
        signs.append(sign.ravel())
    return np.concatenate(signs)


def _idle(local: Triangle | Curved, is_free: np.ndarray) -> list[np.ndarray]:
    """Returns directions of free elements along which the loss is flat."""
    is_triangle = isinstance(local, Triangle)
    matrix = local.factor[:-1, :-1] if is_triangle else local.hessian
    _, values, right = np.linalg.svd(matrix[:, is_free].astype(float))
    noise = noise_of_zero(is_free.size, matrix.dtype)
    is_idle = values <= noise * values.max(initial=0)
    directions = np.zeros((int(np.sum(is_idle)), is_free.size))
    directions[:, is_free] = right[is_idle] / local.scale[is_free]
    return list(directions[:_MOST_DIRECTIONS])


@program
def _look(
    trainer: AbstractTrainer, points: Float[Array, "P D"], batch: Any, kind: str
) -> tuple[Float[Array, "P D"], Float[Array, " P"], Float[Array, "P D"]] | None:
    """Returns points within the bounds, and the loss and its gradient at each.

    `None` if there is no gradient.
    """
    params, bounds = trainer.params, bounds_of(trainer)
    assert bounds is not None
    value = minimised(trainer, batch, kind)
    loss = traced(lambda flat: value(unravel(flat, params)), points[0])
    subject = Subject("what is minimised", is_quiet=True)

    def within(point: Array) -> tuple[Array, Array, Array]:
        flat = ravel(bounds.clip(unravel(point, params)))
        return flat, loss(flat), gradient(loss, flat, subject)

    try:
        return jax.lax.map(within, points)
    except TypeError:
        return None

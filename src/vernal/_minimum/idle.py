"""Directions along which the data have no slope, and the loss at points along them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._curvature import Subject, gradient, traced
from .._program import program
from .._step import AbstractTrainer, bounds_of
from .._tree import as_parameters, ravel, unravel
from .distance import minimised
from .edm import Distance
from .local import Curved, Triangle, noise_of_zero

# The steps to one side. Within half a turn, in either direction, there is a power of
# two at which a cosine has changed sign.
STEPS = 2.0 ** np.arange(-40, 24)
_MOST_DIRECTIONS = 16


class Lower(NamedTuple):
    """A lower point, which no slope leads to, and the distance that knows of it."""

    point: Float[np.ndarray, " D"]
    distance: Distance


class Seen(NamedTuple):
    """Points within the bounds, and the loss and its gradient at each."""

    points: Float[Array | np.ndarray, "P D"]
    losses: Float[Array | np.ndarray, " P"]
    slopes: Float[Array | np.ndarray, "P D"]


class Around(NamedTuple):
    """A stripped trainer at a point, and what it minimises: see `what_falls`.

    - `noise`: the largest change of the loss that means nothing.
    """

    trainer: AbstractTrainer
    batch: Any
    kind: str
    noise: float

    @property
    def point(self) -> Float[np.ndarray, " D"]:
        return np.asarray(ravel(as_parameters(self.trainer.params)))

    def look(self, start: np.ndarray, steps: np.ndarray, along: np.ndarray) -> Any:
        """Returns what is `Seen` at a point and at steps from it.

        No step is longer than 4 if the model has an error farther off. `None` if it has
        one then, or no gradient.
        """
        for most in (np.inf, 4):
            nearer = np.clip(steps, -most, most)
            points = np.vstack([start, start + nearer[:, None] * along])
            points = jnp.asarray(points.astype(start.dtype))
            try:
                seen = _look(self.trainer, points, self.batch, self.kind)
                return jax.device_get(seen)
            except RuntimeError:
                pass
        return None

    def look_along(self, direction: np.ndarray) -> Any:
        """Looks along a direction, first to one side and then to the other.

        A step of 1 is the whole of it.
        """
        return self.look(self.point, np.concatenate([STEPS, -STEPS]), direction)


@program
def _look(
    trainer: AbstractTrainer, points: Float[Array, "P D"], batch: Any, kind: str
) -> Any:
    params, bounds = trainer.params, bounds_of(trainer)
    value = minimised(trainer, batch, kind)
    loss = traced(lambda flat: value(unravel(flat, params)), points[0])
    subject = Subject("what is minimised", is_quiet=True)

    def within(point: Array) -> Seen:
        if bounds is not None:
            point = ravel(bounds.clip(unravel(point, params)))
        return Seen(point, loss(point), gradient(loss, point, subject))

    try:
        return jax.lax.map(within, points)
    except TypeError:
        return None


def idle_directions(
    local: Triangle | Curved, point: Float[np.ndarray, " D"], is_free: np.ndarray
) -> list[Float[np.ndarray, " D"]]:
    """Returns directions of free elements along which the loss is flat.

    Of residuals, they are those along which the data have no slope, whatever the
    priors say.
    """
    is_triangle = isinstance(local, Triangle)
    matrix = local.factor[:-1, :-1] if is_triangle else local.hessian
    noise = noise_of_zero(is_free.size, matrix.dtype)
    matrix = matrix.astype(float)
    if is_triangle:
        # What changes no residual beyond its rounding has a slope of rounding errors.
        reach = local.scale.astype(float) * np.maximum(abs(point), 1)
        matrix = np.where(reach > noise * np.sqrt(2 * local.loss), matrix, 0)
        if local.priors.size:
            rows = local.priors.astype(float) / local.scale
            matrix = matrix.T @ matrix - rows.T @ rows
    _, values, right = np.linalg.svd(matrix[:, is_free])
    is_idle = values <= noise * values.max(initial=0)
    directions = np.zeros((int(np.sum(is_idle)), is_free.size))
    directions[:, is_free] = right[is_idle] / local.scale[is_free]
    return list(directions[:_MOST_DIRECTIONS])

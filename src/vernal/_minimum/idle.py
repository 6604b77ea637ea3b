"""Directions along which the data have no slope, and the loss at points along them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._curvature import gradient, traced
from .._program import program
from .._step import AbstractTrainer, bounds_of
from .._tree import as_parameters, ravel, unravel
from .distance import SUBJECT, measure_hessian, minimised
from .local import Curved, Local, Triangle, noise_of_zero

# The steps to one side. Within half a turn, in either direction, there is a power of
# two at which a cosine has changed sign.
STEPS = 2.0 ** np.arange(-40, 24)
MOST_DIRECTIONS = 16

# A change is noticed within so many times the distance at which that of a parabola is.
NEAR = 8


class Seen(NamedTuple):
    """Points within the bounds, and the loss and its gradient at each."""

    points: Any
    losses: Any
    slopes: Any

    @property
    def ways(self) -> list[Int[np.ndarray, " K"]]:
        """The indices of the start, and of the steps to one side or to the other."""
        sides = np.split(np.arange(1, len(self.losses)), 2)
        return [np.append(0, side) for side in sides]


_measure = program(measure_hessian)


class Site(NamedTuple):
    """A stripped trainer at a point, and what it minimises: see `what_falls`."""

    trainer: AbstractTrainer
    batch: Any
    kind: str

    @property
    def point(self) -> Float[np.ndarray, " D"]:
        return np.asarray(ravel(as_parameters(self.trainer.params)))

    def measure(self, trainer: AbstractTrainer) -> Local:
        """Measures the surroundings of a trainer by second derivatives."""
        return _measure(trainer, self.batch, self.kind)

    def look(
        self, start: np.ndarray, steps: np.ndarray, along: np.ndarray
    ) -> Seen | None:
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

    def look_along(self, direction: np.ndarray) -> Seen | None:
        """Looks along a direction, first to one side and then to the other.

        A step of 1 is the whole of it.
        """
        return self.look(self.point, np.concatenate([STEPS, -STEPS]), direction)


@program
def _look(
    trainer: AbstractTrainer, points: Float[Array, "P D"], batch: Any, kind: str
) -> Seen | None:
    params, bounds = trainer.params, bounds_of(trainer)
    value = minimised(trainer, batch, kind)
    loss = traced(lambda flat: value(unravel(flat, params)), points[0])

    def within(point: Array) -> Seen:
        if bounds is not None:
            point = ravel(bounds.clip(unravel(point, params)))
        return Seen(point, loss(point), gradient(loss, point, SUBJECT))

    try:
        return jax.lax.map(within, points)
    except TypeError:
        return None


def idle_directions(
    local: Triangle | Curved, is_free: Bool[np.ndarray, " D"] | None = None
) -> Float[np.ndarray, "K D"]:
    """Returns directions of free elements along which the loss is flat.

    Of residuals, they are those along which the data have no slope, whatever the
    priors say. All that are not held are free by default.
    """
    matrix = local.factor[:, :-1] if isinstance(local, Triangle) else local.hessian
    size = len(local.scale)
    noise, matrix = noise_of_zero(size, matrix.dtype), matrix.astype(float)
    if isinstance(local, Triangle):
        # What changes no residual beyond its rounding has a slope of rounding errors.
        slopes = np.linalg.norm(matrix, axis=0) * local.scale
        reach = slopes * np.maximum(abs(local.flat), 1)
        matrix = np.where(reach > noise * np.sqrt(2 * local.loss), matrix, 0)
    if is_free is None:
        is_free = ~np.broadcast_to(local.held, size)
    has_slope = matrix.any(axis=0)
    _, values, right = np.linalg.svd(matrix[:, is_free & has_slope])
    together = right[values <= noise * values.max(initial=0)]
    directions = np.zeros((len(together), size))
    directions[:, is_free & has_slope] = together
    alone = np.eye(size)[is_free & ~has_slope]
    return np.vstack([alone, directions])[:MOST_DIRECTIONS] / local.scale


def first_noticed(losses: Float[np.ndarray, " K"], noise: float) -> int:
    """Returns the index of the first loss that differs from the one at no step.

    It is 0 if none does so nearby. The steps are `STEPS`, in units of the distance at
    which the change of a parabola is noticed.
    """
    near = losses[: 1 + int(np.sum(STEPS <= NEAR))]
    return int(np.argmax(~(abs(near - losses[0]) <= noise)))


def is_idle(local: Any) -> bool:
    """Whether there is a direction in which residuals have no slope."""
    is_whole = isinstance(local, Triangle) and local.turn is None
    return is_whole and len(idle_directions(local)) > 0


def leaves_idle(local: Any) -> bool:
    """Whether what is at its bound may have left another element idle."""
    if not isinstance(local, Triangle | Curved) or local.turn is not None:
        return False
    return len(idle_directions(jax.device_get(local))) > 0

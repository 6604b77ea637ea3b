"""Directions along which the data have no slope, and lower points along them.

A minimiser does not see these. They are beside a saddle: where a model is symmetric, as
in the separation of two stars that is zero, its squares may be largest, and the
curvature of Gauss and Newton, which is never negative, does not show it. Or they are
across a plateau: the phase of an oscillation does nothing where its amplitude is held
at zero, and yet decides whether the loss would fall with the amplitude.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._constraints import Bounds
from .._curvature import gradient, hessian_product, matmul, traced
from .._program import program
from .._step import AbstractTrainer, bounds_of
from .._tree import as_parameters, by_path, ravel, unravel
from .distance import SUBJECT, measure, minimised
from .edm import Distance
from .leftover import unrounded
from .local import Curved, Local, Triangle, noise_of_zero

# The steps to one side. Within half a turn, in either direction, there is a power of
# two at which a cosine has changed sign.
STEPS = 2.0 ** np.arange(-40, 24)
MOST_DIRECTIONS = 16

# A change is noticed within so many times the distance at which that of a parabola is.
NEAR = 8.0


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

    def turns(self, noise: float, most: float = NEAR) -> list[float]:
        """Returns by how much the loss first changes to each side, beyond the noise."""
        found = [self.losses[way] for way in self.ways]
        return [float(x[first_noticed(x, noise, most)] - x[0]) for x in found]


_measure = program(measure)


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
        return _measure(trainer, None, self.batch, self.kind)

    def clear(self, local: Curved) -> Curved:
        """Returns the surroundings, on the host, without curvature of rounding."""
        return unrounded(self.trainer, local, self.measure)

    def in_full(self, direction: np.ndarray) -> np.ndarray:
        """Scales a direction to the size of what moves most along it, at least 1."""
        return direction / np.max(abs(direction) / np.maximum(abs(self.point), 1))

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


def first_noticed(
    losses: Float[np.ndarray, " K"], noise: float, most: float = NEAR
) -> int:
    """Returns the index of the first loss that differs from the one at no step.

    It is 0 if none does so up to the step `most`. The steps are `STEPS`, in units of
    the distance at which the change of a parabola is noticed.
    """
    near = losses[: 1 + int(np.sum(most >= STEPS))]
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


class Lower(NamedTuple):
    """A lower point, which no slope leads to, and the distance that knows of it."""

    point: Float[np.ndarray, " D"]
    distance: Distance


def lower_point(site: Site, local: Any, distance: Distance) -> Lower | None:
    """Finds a lower point beside a saddle, or across a plateau.

    `None` if there is none, or no direction in which the data have no slope. `local`
    and `distance` are those of a `second_look`.
    """
    if not isinstance(local, Triangle | Curved):
        return None
    local = jax.device_get(local)
    if local.turn is not None or not np.isfinite(local.loss):
        return None
    noise, bounds = float(distance.noise), bounds_of(site.trainer)
    point, is_plateau = _beside(site, local, noise), False
    if point is not None and isinstance(local, Curved):
        here = site.clear(local)
        point = point if here is local else _beside(site, here, noise)
    if point is None and bounds is not None and np.any(local.held):
        inward = _inward(bounds, site.trainer.params)
        point, is_plateau = _across(site, local, inward, noise), True
    if point is None:
        return None
    step = (point - site.point).astype(float)
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


def _beside(
    site: Site, local: Triangle | Curved, noise: float
) -> Float[np.ndarray, " D"] | None:
    """Finds a lower point along the direction in which the loss curves downwards most.

    From each point that is looked at on the way to the next the loss falls.
    """
    if (steepest := _steepest(site, local)) is None:
        return None
    curvature, direction = steepest
    length = np.sqrt(2 * noise / -curvature)
    if (seen := site.look_along(length * direction)) is None:
        return None
    lowest = 0
    for way in seen.ways:
        end = way[_end_of_fall(seen.losses[way], noise)]
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
    site: Site, local: Triangle | Curved
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
        found = _curvature(site.trainer, placed, site.batch, site.kind)
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
    rounding = float(jnp.finfo(site.point.dtype).eps) ** 0.5
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


def _across(
    site: Site, local: Triangle | Curved, inward: Int[np.ndarray, " D"], noise: float
) -> Float[np.ndarray, " D"] | None:
    """Finds a lower point from which a parameter would not be pushed to its bound.

    It looks along directions in which the loss is flat, and from there away from the
    bound: `inward` is the sign of the way in for each element at a bound.
    """
    for direction in idle_directions(local, inward == 0):
        if (seen := site.look_along(site.in_full(direction))) is None:
            return None
        pushes = inward * seen.slopes
        is_held = (inward != 0) & (pushes[0] > 0)
        if not is_held.any():
            return None
        is_as_low = (seen.losses <= seen.losses[0] + noise)[:, None]
        is_as_low = is_as_low & np.isfinite(pushes)
        for index in np.flatnonzero(is_held):
            push = np.where(is_as_low[:, index], pushes[:, index], np.inf)
            if not push.min() < 0:
                continue
            # The nearest of those from which the loss falls well.
            near = seen.points[np.flatnonzero(push <= push.min() / 2)[0]]
            away = np.where(np.arange(inward.size) == index, inward, 0)
            if (found := site.look(near, np.repeat(STEPS, 2), away)) is None:
                return None
            losses = np.where(np.isfinite(found.losses), found.losses, np.inf)
            if losses.min() < seen.losses[0] - noise:
                return found.points[np.argmin(losses)]
    return None

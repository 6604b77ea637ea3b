"""Slopes without curvature: at a kink, at the bottom of a power, or for ever.

The derivatives at a point do not tell these apart, and the loss along a line does. At a
kink it rises to both sides, and the gradient there is any between those beside it: the
shortest says how far the minimum is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from .edm import Distance
from .formulas import distance_of, steep_part
from .idle import (
    MOST_DIRECTIONS,
    STEPS,
    Seen,
    Site,
    first_noticed,
    idle_directions,
)
from .local import Curved, noise_of_zero

# What is left of a sum of slopes that cancel.
_CANCELLED = 1e-9

# A line falls by the noise in a step of 1, and does not in one below this.
_LEAST_STEP = 0.25


class _Bowl(NamedTuple):
    """What curves at a point, and what does not."""

    local: Curved
    noise: float
    values: Float[np.ndarray, " L"]
    vectors: Float[np.ndarray, "L L"]

    @property
    def hidden(self) -> float:
        """The curvature that rounding may hide."""
        noise = noise_of_zero(len(self.values), self.local.hessian.dtype)
        return noise * abs(self.values).max()

    @property
    def curvature(self) -> Float[np.ndarray, " L"]:
        return np.maximum(abs(self.values), self.hidden or 1)

    def steep(self, slope: Float[Array | np.ndarray, " L"]) -> Float[np.ndarray, " L"]:
        """Returns the part of a slope along which there is no curvature."""
        here = self.local._replace(slope=slope)
        return steep_part(here, self.noise, self.values, self.vectors)

    def between(
        self, slopes: Sequence[Float[np.ndarray, " L"]]
    ) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"]]:
        """Returns the shortest slope between some, and its steep part.

        What is left of slopes that cancel each other is zero.
        """
        slope = _shortest(np.array(slopes), self.vectors / np.sqrt(self.curvature))
        part = self.steep(slope)
        is_zero = abs(part) <= _CANCELLED * np.max(np.abs(slopes), axis=0)
        return np.where(is_zero, slope - part, slope), np.where(is_zero, 0, part)

    def step(self, slope: Float[np.ndarray, " L"]) -> Float[np.ndarray, " L"]:
        """Returns the step down by which the slope alone promises to fall by noise."""
        step = -self.vectors @ (self.vectors.T @ slope / self.curvature)
        return step * (self.noise / -(slope @ step))


def without_slopes(site: Site, local: Any, distance: Distance) -> Distance:
    """Looks where a slope without curvature leads: see `Distance.is_steep`."""
    if not isinstance(local, Curved):
        return _along_heading(site, distance)
    local = jax.device_get(local)
    hessian, noise = local.hessian.astype(float), float(distance.visible)
    bowl = _Bowl(local, noise, *np.linalg.eigh((hessian + hessian.T) / 2))
    slopes = [local.slope.astype(float)]
    for _ in range(MOST_DIRECTIONS):
        slope, part = bowl.between(slopes)
        found = distance_of(local._replace(slope=slope))
        if not bowl.hidden and not slope.any():
            return distance._replace(is_steep=False)
        if not found.is_steep and found.edm <= distance.noise:
            return found
        # First without curvature, where the rest of the slope leads nowhere near.
        step = bowl.step(part if found.is_steep else slope)
        turned = step if local.turn is None else local.turn @ step
        way = turned / local.scale
        if (seen := site.look_along(way)) is None:
            return distance
        first, back = (int(x[first_noticed(seen.losses[x], noise)]) for x in seen.ways)
        falls = seen.losses[first] < seen.losses[0]
        if falls and not found.is_steep:
            return found
        if _goes_on(seen, first, way, noise):
            return _falling(distance, turned)
        if _goes_on(seen, back, -way, noise):
            return _falling(distance, -turned)
        if not np.isfinite(seen.slopes[first]).all():
            return distance
        if not first or falls or seen.slopes[first] @ way <= 0:
            # What the slope promises is not there: it is rounding.
            part = bowl.steep(local.slope)
            return distance_of(local._replace(slope=local.slope - part))
        # A kink: the slope beyond it is another that its gradient may be.
        beyond = np.where(local.held, 0, seen.slopes[first] / local.scale)
        slopes.append(beyond if local.turn is None else local.turn.T @ beyond)
    return distance


def _goes_on(
    seen: Seen, index: int, way: Float[np.ndarray, " D"], noise: float
) -> bool:
    """Whether the loss falls along a way to a point, and does so there, as a line.

    Where large numbers cancel, rounding changes it at once, or its slope differs there.
    """
    is_slope = seen.slopes[index] @ way < -noise / 2
    is_lower = seen.losses[index] < seen.losses[0]
    near = np.append(0, np.tile(STEPS, 2))[index]
    return bool(is_lower and is_slope and near >= _LEAST_STEP)


def is_bottom(site: Site, local: Curved, noise: float) -> bool:
    """Whether the loss rises around a point that is flat, as at a fourth power's."""
    local = jax.device_get(local)
    ways = [] if local.turn is not None else idle_directions(local)
    if not 0 < len(ways) < MOST_DIRECTIONS:
        return False
    return all(_rises_later(_seen_in_full(site, way), noise) for way in ways)


def _seen_in_full(site: Site, direction: Float[np.ndarray, " D"]) -> Seen | None:
    """Looks along a direction, in units of the parameters, at least 1."""
    unit = np.max(abs(direction) / np.maximum(abs(site.point), 1))
    return site.look_along(direction / unit)


def _turns(seen: Seen, noise: float) -> list[float]:
    """Returns by how much the loss first changes to each side, beyond the noise."""
    changes = [seen.losses[way] - seen.losses[0] for way in seen.ways]
    return [float(way[np.argmax(~(abs(way) <= noise))]) for way in changes]


def _rises_later(seen: Seen | None, noise: float) -> bool:
    return seen is not None and all(turn > 0 for turn in _turns(seen, noise))


def _along_heading(site: Site, distance: Distance) -> Distance:
    """Looks along the one direction that conjugate gradients have found."""
    direction = np.asarray(distance.direction, float)
    seen = _seen_in_full(site, direction)
    if seen is None:
        return distance
    turns = _turns(seen, float(distance.visible))
    if min(turns) < 0:
        return _falling(distance, direction if turns[0] < 0 else -direction)
    return distance._replace(is_steep=False, is_complete=np.asarray(False))


def _falling(distance: Distance, step: Float[np.ndarray, " D"]) -> Distance:
    """Returns the distance of a point from which the loss falls along a step."""
    direction = (step / np.linalg.norm(step)).astype(distance.direction.dtype)
    edm, yes = np.full_like(distance.edm, np.nan), np.asarray(True)
    return distance._replace(
        edm=edm, is_saddle=yes, is_steep=yes, direction=direction, is_leap=False
    )


def _shortest(
    slopes: Float[np.ndarray, "K L"], bars: Float[np.ndarray, "L L"]
) -> Float[np.ndarray, " L"]:
    """Returns the shortest of the slopes between those given, in units of `bars`."""
    # A dependency of JAX.
    from scipy.optimize import nnls

    rows = (slopes @ bars).T
    size = np.abs(rows).max() or 1
    shares = nnls(
        np.vstack([rows / size, np.ones(len(slopes))]), np.eye(len(rows) + 1)[-1]
    )[0]
    return shares / shares.sum() @ slopes

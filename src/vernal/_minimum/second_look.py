"""Minima that the derivatives at a point do not show.

Where a model is symmetric, as in the width of a line that is zero, its residuals have
no slope. Close by, their slope and their curvature are small alike, and the distance
that is made of the two is not. And where a model is degenerate, the loss may seem to
curve downwards beside the minimum: see `leftover`.

A slope without curvature is that of a kink, of the bottom of a power, or one for ever.
The loss along a line tells which: at a kink it rises to both sides, and the gradient
there is any between those beside it, of which the shortest says how far the minimum is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from .edm import Distance
from .formulas import by_svd, distance_of, steep_part
from .idle import (
    MOST_DIRECTIONS,
    NEAR,
    STEPS,
    Seen,
    Site,
    first_noticed,
    idle_directions,
)
from .leftover import closer
from .local import Curved, Local, Spectral, Triangle, noise_of_zero

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


def _without_slopes(site: Site, local: Any, distance: Distance) -> Distance:
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


def _is_bottom(site: Site, local: Curved, noise: float) -> bool:
    """Whether the loss rises around a point that is flat, as at a fourth power's."""
    local = jax.device_get(local)
    ways = [] if local.turn is not None else idle_directions(local)
    if not 0 < len(ways) < MOST_DIRECTIONS:
        return False
    return all(_rises(site, site.in_full(way), noise, np.inf) for way in ways)


def _along_heading(site: Site, distance: Distance) -> Distance:
    """Looks along the one direction that conjugate gradients have found."""
    direction = np.asarray(distance.direction, float)
    seen = site.look_along(site.in_full(direction))
    if seen is None:
        return distance
    turns = seen.turns(float(distance.visible), np.inf)
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


def second_look(site: Site, local: Any, distance: Distance) -> Distance:
    """Looks by the second derivatives at where squares only seem to fall further.

    If these say that it is a minimum, and the loss rises where the slopes of residuals
    do not show it, that is the answer. Where an `nll` only seems to curve downwards, it
    looks closer to the minimum. `local` and `distance` are what `measure` and
    `distance_of` found.
    """
    noise = float(distance.noise)
    if isinstance(local, Curved) and distance.is_saddle:
        local = jax.device_get(local)
        here = _without_kinks(site, site.clear(local), noise)
        if here is not local:
            local, distance = here, distance_of(here)
            if not distance.is_steep:
                return distance
        elif distance.is_flat and _is_bottom(site, local, noise):
            return distance._replace(is_saddle=np.array(False))
    if distance.is_steep and not distance.is_saddle:
        return _without_slopes(site, local, distance)
    if site.kind == "nll" and distance.is_unclear and distance.is_saddle:
        if local.turn is not None or _is_saddle_closer(site, local):
            return distance
        return distance._replace(is_saddle=np.array(False))
    if not distance.is_leap:
        return distance
    curved, found = by_hessian(site, distance)
    if not (isinstance(curved, Curved) and found.is_minimum):
        return distance
    hidden = _hidden(jax.device_get(local), curved)
    if not 0 < len(hidden) <= MOST_DIRECTIONS:
        return distance
    # So long that the rise of a parabola is noticed.
    ways = np.sqrt(2 * noise) * hidden / curved.scale
    if not all(_rises(site, way, noise) for way in ways):
        return distance
    direction = hidden[0] / np.linalg.norm(hidden[0])
    return found._replace(direction=direction.astype(found.direction.dtype))


def by_hessian(site: Site, distance: Distance) -> tuple[Local, Distance]:
    """Measures by second derivatives, on the scales of a distance that leaps."""
    local = jax.device_get(site.measure(site.trainer))
    tolerances = {"tolerance": distance.tolerance, "spacing": distance.spacing}
    return local, distance_of(local)._replace(**tolerances, is_leap=True)


def _without_kinks(site: Site, local: Curved, noise: float) -> Curved:
    """Returns the surroundings without elements in which the loss has its kink here.

    Absolute values are linear on either side of their minimum, and their curvature is
    exactly zero, beside the one that they share with a scale.
    """
    size = len(local.slope)
    is_linear = (np.diagonal(local.hessian) == 0) & np.any(local.hessian != 0, axis=1)
    kinks = np.flatnonzero(is_linear & (local.slope != 0))
    if local.turn is not None or not 0 < len(kinks) <= MOST_DIRECTIONS:
        return local
    # So long that the slope makes it noticed.
    lengths = noise / np.abs(local.slope[kinks].astype(float))
    ways = lengths[:, None] * np.eye(size)[kinks]
    if not all(_rises(site, way, noise) for way in ways):
        return local
    is_kept = ~np.isin(np.arange(size), kinks)
    rest = np.where(is_kept & is_kept[:, None], local.hessian, 0)
    return local._replace(hessian=rest, slope=np.where(is_kept, local.slope, 0))


def _is_saddle_closer(site: Site, local: Curved) -> bool:
    """Whether the loss curves downwards closer to the minimum, too."""
    seen = closer(site.trainer, jax.device_get(local), site.measure)
    return all(distance_of(here).is_saddle for _, here in seen)


def _hidden(local: Triangle | Spectral, curved: Curved) -> Float[np.ndarray, "K D"]:
    """Returns the directions in which residuals have hardly any slope.

    Each is an error bar long, in units of the Hessian; none if that is singular.
    """
    is_free = np.diagonal(curved.hessian) > 0
    hessian = curved.hessian[is_free][:, is_free].astype(float)
    values, vectors = np.linalg.eigh(hessian)
    noise = noise_of_zero(len(values), curved.hessian.dtype)
    if not values.min(initial=np.inf) > noise * values.max(initial=0):
        return np.zeros((0, len(is_free)))
    bars = vectors / np.sqrt(values)
    found = by_svd(local) if isinstance(local, Triangle) else local
    rows = found.values[:, None] * found.right * (found.scale / curved.scale)
    _, slopes, right = np.linalg.svd(rows[:, is_free] @ bars)
    # What slopes add to the rise is not noticed so close.
    is_hidden = np.pad(slopes, (0, len(right) - len(slopes))) < 1 / NEAR
    hidden = np.zeros((np.count_nonzero(is_hidden), len(is_free)))
    hidden[:, is_free] = right[is_hidden] @ bars.T
    return hidden[::-1]


def _rises(
    site: Site, way: Float[np.ndarray, " D"], noise: float, most: float = NEAR
) -> bool:
    """Whether the loss rises to both sides, at steps of a way up to the largest."""
    seen = site.look_along(way)
    return seen is not None and all(turn > 0 for turn in seen.turns(noise, most))

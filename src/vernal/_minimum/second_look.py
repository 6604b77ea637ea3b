"""Minima that the derivatives at a point do not show.

Where a model is symmetric, as in the width of a line that is zero, its residuals have
no slope. Close by, their slope and their curvature are small alike, and the distance
that is made of the two is not. And where a model is degenerate, the loss may seem to
curve downwards beside the minimum: see `leftover`.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from .edm import Distance
from .formulas import by_svd, distance_of
from .idle import MOST_DIRECTIONS, NEAR, Site, first_noticed
from .kinks import is_bottom, without_slopes
from .leftover import closer, unrounded
from .local import Curved, Local, Spectral, Triangle, noise_of_zero


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
        here = _without_kinks(site, clear(site, local), noise)
        if here is not local:
            local, distance = here, distance_of(here)
            if not distance.is_steep:
                return distance
        elif distance.is_flat and is_bottom(site, local, noise):
            return distance._replace(is_saddle=np.array(False))
    if distance.is_steep and not distance.is_saddle:
        return without_slopes(site, local, distance)
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
    if not all(_rises(site, bar / curved.scale, noise) for bar in hidden):
        return distance
    direction = hidden[0] / np.linalg.norm(hidden[0])
    return found._replace(direction=direction.astype(found.direction.dtype))


def clear(site: Site, local: Curved) -> Curved:
    """Returns the surroundings, on the host, without curvature of rounding alone."""
    return unrounded(site.trainer, local, site.measure)


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
    lengths = np.sqrt(noise / 2) / np.abs(local.slope[kinks])
    bars = lengths[:, None] * np.eye(size)[kinks]
    if not all(_rises(site, bar, noise) for bar in bars):
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


def _rises(site: Site, bar: Float[np.ndarray, " D"], noise: float) -> bool:
    """Whether the loss rises to both sides, about where a parabola would."""
    seen = site.look_along(np.sqrt(2 * noise) * bar)
    if seen is None:
        return False
    ways = [seen.losses[way] for way in seen.ways]
    return all(way[first_noticed(way, noise)] > way[0] for way in ways)

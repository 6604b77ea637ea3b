"""Losses without a minimum on the way, which only approach a limit.

The loss of classes that a line separates falls as the exponential of a slope, and so
does that of a rate whose best value is zero, as the parameter goes to infinity. Its
gradient and its curvature fall alike: the distance to the minimum becomes as small as
one likes, and the error bar as long. Where rounding hides the gradient, the error bar
alone is left to tell: along it the loss does not rise.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from .edm import TOLERANCE, Distance
from .formulas import by_svd
from .idle import Site
from .local import Curved, Spectral, Triangle, noise_of_zero, rounding_of
from .second_look import by_hessian

# A step to a minimum at infinity is not much shorter than the parameter: that of an
# exponential is one, and of a power a share of it. The error bar is longer.
_LEAST_STEP, _LEAST_BAR = 2.0**-13, 1

# An error bar so many times as long as its parameter is rare at a minimum. A parameter
# that is a smaller share of its bar is zero, with what rounding leaves of it.
_OPEN_BAR, _ZERO = 100, 1e-8

# How many parameters are looked at one by one, those with the longest steps or bars.
_MOST_ELEMENTS = 8

# Of how many parameters error bars are looked at without a step that is long.
_MOST_BARS = 64

# Where to look, in such steps. Those up to two tell a slope from rounding errors. Two
# steps ahead the slope at a minimum has changed its sign; that of an exponential, of a
# tail of Gauss, or of a power has fallen to the least share of itself, or to the most.
# Where second derivatives vanish, as at the minimum of a sixth power, it does so later.
_AHEAD = 0.25, 0.5, 1, 2, 8, 22
_LEAST_LEFT, _MOST_LEFT = 0.003, 0.9

# The share of what a parabola rises by, or its slope, below which a loss does not rise:
# a line leaves the floor of a bent valley.
_NO_RISE = 0.05

_ROUNDED = 16

# Where to look along an error bar.
_BARS = np.array([0.5, 1.0, 2.0, -0.5, -1.0, -2.0])


def endless(site: Site, local: Any, distance: Distance) -> Distance:
    """Looks whether there is a minimum where the loss can hardly fall any further.

    It looks ahead along the parameters whose step to the minimum is not much shorter
    than they are, and along error bars that are much longer than their parameter: only
    there does this cost anything. `local` and `distance` are those of a `second_look`.
    """
    if not _is_worth_it(site.kind, local, distance):
        return distance
    found = distance
    if distance.is_leap:
        # Towards infinity slopes of residuals vanish, and by these it leaps.
        local, found = by_hessian(site, distance)
        if not (isinstance(local, Curved) and _is_low(site.kind, found)):
            return distance
    bars = _bars_at(local, found)
    if bars is None or (way := _way_without_end(site, bars, found.tolerance)) is None:
        return distance
    ahead = way * bars.scale
    direction = (ahead / np.linalg.norm(ahead)).astype(found.direction.dtype)
    return found._replace(direction=direction, is_endless=True)


def may_run_away(fall: Any, bars: Any, sizes: Any) -> bool:
    """Whether an element may run away, by its error bar and how far chi-squared falls.

    Its step to the minimum is no longer than that many bars, the root of the fall.
    """
    # An infinite bar says itself that there is none.
    bars = np.where(np.isfinite(bars), bars, 0).astype(float)
    is_long = bars > _LEAST_BAR * sizes
    may_run = is_long & (np.sqrt(fall) * bars > _LEAST_STEP * sizes)
    return bool(np.any(may_run | _is_open(bars, sizes)))


def _is_open(
    bars: Float[np.ndarray, " D"], sizes: Float[np.ndarray, " D"]
) -> Bool[np.ndarray, " D"]:
    """Whether error bars are so long that the loss may not rise along them."""
    return (bars > _OPEN_BAR * sizes) & (sizes > _ZERO * bars)


def may_be_endless(kind: str, local: Any, distance: Distance) -> bool:
    """Whether a loss may have no minimum, and is worth a look."""
    if not _is_worth_it(kind, local, distance):
        return False
    if distance.is_leap:
        return True
    bars = _bars_at(local, distance)
    return bars is not None and bool(len(bars.runaways) or len(bars.open))


def _is_worth_it(kind: str, local: Any, distance: Distance) -> bool:
    """Whether a loss may have no minimum, as far as is known without its elements."""
    is_known = isinstance(local, Triangle | Spectral | Curved) and local.turn is None
    if not is_known or distance.is_saddle:
        return False
    if distance.is_leap and kind == "residuals":
        # A second look has seen that it rises around a minimum.
        return not distance.is_minimum
    return _is_low(kind, distance)


def _is_low(kind: str, distance: Distance) -> bool:
    """Whether the loss can hardly fall, as far as its derivatives tell."""
    # The scale of a likelihood is known, however little its data scatter.
    is_close = kind != "loss" and bool(distance.edm <= TOLERANCE)
    return not distance.is_saddle and (distance.is_minimum or is_close)


class _Bars(NamedTuple):
    """The error bars of elements, beside their sizes and their steps to the minimum.

    A bar is the length of a row of `whitener`. Steps of less than `least` bars are
    rounding errors.
    """

    whitener: Float[np.ndarray, "D K"]
    lengths: Float[np.ndarray, " D"]
    sizes: Float[np.ndarray, " D"]
    steps: Float[np.ndarray, " D"]
    scale: Float[np.ndarray, " D"]
    least: float

    @property
    def runaways(self) -> Int[np.ndarray, " F"]:
        """The elements whose step is not much shorter than they are, longest first."""
        steps, sizes = abs(self.steps), np.where(self.sizes > 0, self.sizes, 1)
        is_clear = steps > self.least * self.lengths
        is_clear &= self.lengths > _LEAST_BAR * self.sizes
        shares = np.where(is_clear, steps, 0) / sizes
        order = np.argsort(-shares, kind="stable")
        return order[: np.count_nonzero(shares > _LEAST_STEP)]

    @property
    def open(self) -> Int[np.ndarray, " F"]:
        """The elements whose bars are so long that the loss may not rise along them."""
        is_open = _is_open(self.lengths, self.sizes)
        return np.argsort(-np.where(is_open, self.lengths, 0))[: is_open.sum()]

    def lines(self) -> Iterator[tuple[float, Float[np.ndarray, " D"]]]:
        """Yields lines along which elements may run away.

        Each is the length of the step to the minimum, in error bars, and an error bar
        in its direction, in which the loss falls. Along the first all of them take
        their steps, and the others follow, so that the loss rises least. Then comes a
        line for each.
        """
        found = self.runaways
        for own in (found, *found[:_MOST_ELEMENTS, None]) if len(found) else ():
            latent = np.linalg.lstsq(self.whitener[own], self.steps[own], rcond=None)[0]
            length = float(np.linalg.norm(latent))
            yield length, self.whitener @ latent / length / self.scale

    def open_bars(self) -> Iterator[Float[np.ndarray, " D"]]:
        """Yields open bars, with what the others do so that the loss rises least."""
        for one in self.open[:_MOST_ELEMENTS]:
            latent = self.whitener[one] / self.lengths[one]
            yield self.whitener @ latent / self.scale


def _bars_at(local: Triangle | Spectral | Curved, distance: Distance) -> _Bars | None:
    """Returns the error bars at a point, unless there are many, and no long step."""
    # Slopes of rounding errors lead nowhere.
    eps = float(np.finfo(local.rounding.dtype).eps)
    least = _ROUNDED * eps * np.sqrt(2 * abs(float(local.loss)))
    # No step is longer, in error bars: most fits of many parameters end here.
    is_still = bool(np.sqrt(2 * distance.edm) <= least)
    if is_still and len(local.scale) > _MOST_BARS:
        return None
    if not isinstance(local.scale, np.ndarray):
        local = jax.device_get(local)
    values, right, inner = _decomposed(local)
    whitener, scale = right.T / values, np.asarray(local.scale, float)
    lengths = np.linalg.norm(whitener, axis=1)
    sizes = abs(np.asarray(local.flat, float) * scale)
    steps = np.zeros_like(lengths) if is_still else -whitener @ inner
    return _Bars(whitener, lengths, sizes, steps, scale, least)


def _decomposed(
    local: Triangle | Spectral | Curved,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the singular values that count, as of a Jacobian, and what they go with.

    These are the right vectors, as rows, and the products of the left with residuals.
    """
    noise = noise_of_zero(len(local.scale), local.rounding.dtype)
    if isinstance(local, Curved):
        hessian = local.hessian.astype(float)
        squares, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
        is_kept = squares > noise * abs(squares).max(initial=0)
        values, right = np.sqrt(squares[is_kept]), vectors.T[is_kept]
        return values, right, right @ local.slope.astype(float) / values
    local = by_svd(local) if isinstance(local, Triangle) else local
    is_kept = local.values > noise * local.values.max(initial=0)
    return local.values[is_kept], local.right[is_kept], local.inner[is_kept]


def _way_without_end(
    site: Site, bars: _Bars, tolerance: Any
) -> Float[np.ndarray, " D"] | None:
    """Returns a step along which the loss falls to a limit, or stays where it is."""
    for step, bar in bars.lines():
        if _falls_along(site, step, bar):
            return bar
    if site.kind == "loss":  # whose curvature makes no error bars
        return None
    # The scatter of residuals may be less than their error bars say.
    unit = np.sqrt(min(1.0, float(tolerance) / TOLERANCE))
    for bar in bars.open_bars():
        if _hardly_rises(site, unit * _BARS, bar):
            return bar
    return None


def _hardly_rises(
    site: Site, steps: Float[np.ndarray, " S"], bar: Float[np.ndarray, " D"]
) -> bool:
    """Whether the loss stays where it is along an error bar, to one side at least."""
    asked = np.vstack([site.point, site.point + steps[:, None] * bar])
    if (seen := site.look(site.point, steps, bar)) is None:
        return False
    is_there = (seen.points == asked.astype(seen.points.dtype)).all(axis=1)
    changes = seen.losses.astype(float) - float(seen.losses[0])
    most = _NO_RISE * steps**2 / 2
    is_seen = most > _ROUNDED * float(rounding_of(seen.losses[0]))
    stays = (is_there & (abs(changes) < np.append(0, most)))[1:] & is_seen
    ahead, back = np.split(stays, 2)
    return bool(ahead.all() or back.all())


def _falls_along(site: Site, step: float, bar: Float[np.ndarray, " D"]) -> bool:
    """Whether the loss falls along a line as if towards a limit, and does not rise.

    What a bound cuts off, or is not finite there, says nothing.
    """
    steps, point = step * np.array(_AHEAD), site.point
    asked = np.vstack([point, point + steps[:, None] * bar]).astype(point.dtype)
    seen = site.look(point, steps, bar)
    if seen is None or not np.array_equal(seen.points, asked):
        return False
    losses, slopes = seen.losses.astype(float), seen.slopes.astype(float) @ bar
    if not (np.isfinite(losses).all() and np.isfinite(slopes).all()):
        return False
    unseen = float(rounding_of(seen.losses[0]))
    rises = losses[-1] - losses[0] > _NO_RISE * steps[-1] ** 2 / 2 + unseen
    turns = slopes[1:] > _NO_RISE * steps
    two = _AHEAD.index(2) + 1
    falls = (np.diff(slopes[: two + 1]) > 0).all() and slopes[0] < 0
    is_left = _LEAST_LEFT < slopes[two] / slopes[0] < _MOST_LEFT if falls else False
    return bool(is_left and not (rises or turns.any()))

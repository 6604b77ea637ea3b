"""Where the likelihood has fallen by a given amount, on one side of a minimum."""

import math
from collections.abc import Generator

# In standard errors. Beyond, the likelihood must still fall.
_FARTHEST = 2.0**18
_LONGEST = 8.0

_TOLERANCE = 1e-6
_MOST_POINTS = 48
# An end is known as well as the likelihood is rounded, and at worst to this fraction.
_COARSEST = 1e-2
# Where interpolation is slow, halving is not.
_INTERPOLATIONS = 16


def search(
    root: float, farthest: float, noise: float
) -> Generator[float, float, float]:
    r"""Searches for the distance where $\sqrt{\Delta\chi^2}$ is `root`.

    Distances are in standard errors: where the likelihood is normal, the two are equal.
    It yields the distance to try next, and is sent the excess over `root` there, whose
    rounding error is `noise`.

    Returns the distance: `farthest` if the bound is there, infinite if the likelihood
    falls no farther, and NaN if it is not finite before it does, only seemed to have
    fallen, or the place is not found by as many points as are allowed.
    """
    before, low, high = (0.0, -root), (0.0, -root), (math.inf, math.inf)
    # Halved where one stays twice (the Illinois rule).
    weight, finest = {"low": 1.0, "high": 1.0}, min(noise, _COARSEST)
    last, t = "low", min(root, farthest)
    for tried in range(1, _MOST_POINTS + 1):
        excess = yield t
        if abs(excess) <= max(_TOLERANCE, noise):
            return t
        side, other = ("low", "high") if excess <= 0 else ("high", "low")
        weight[side] = 1.0
        if side == last:
            weight[other] /= 2
        last = side
        if side == "low":
            before, low = low, (t, excess)
            if t >= farthest:
                return farthest
        else:
            high = t, excess
        if math.isinf(high[0]):
            fall = (low[1] + root) ** 2 - (before[1] + root) ** 2
            if t >= _FARTHEST and fall <= max(_TOLERANCE, noise):
                return math.inf
            # On the line through the last two.
            rise = (low[1] - before[1]) / (low[0] - before[0])
            longest = _LONGEST * low[0]
            t = min(low[0] - low[1] / rise, longest) if rise > 0 else longest
            t = min(t, farthest)
            continue
        if high[0] - low[0] <= finest * high[0]:
            break
        below, above = weight["low"] * low[1], weight["high"] * high[1]
        t = math.nan
        if math.isfinite(above) and tried < _INTERPOLATIONS:
            t = (low[0] * above - high[0] * below) / (above - below)
        if not low[0] < t < high[0]:
            t = _halfway(low[0], high[0])
    is_found = high[0] - low[0] <= max(_TOLERANCE, finest) * high[0]
    if not (is_found and math.isfinite(high[1])):
        return math.nan
    # Beyond a jump others may have been lost, on the way from far away.
    is_jump = high[1] - low[1] > root / 2
    return math.nan if is_jump and (yield high[0]) <= 0 else t


def _halfway(low: float, high: float) -> float:
    """Returns a number between two, of which one may be far smaller."""
    if low == 0:
        return high / _LONGEST
    return (low + high) / 2 if high < _LONGEST * low else math.sqrt(low * high)

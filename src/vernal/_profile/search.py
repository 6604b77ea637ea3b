"""Where the likelihood has fallen by a given amount, on one side of a minimum."""

import math
from collections.abc import Generator

# In standard errors. Farther away a likelihood that has ceased to fall is not followed.
_FARTHEST = 2.0**18
_LONGEST = 8.0

# Where the likelihood falls less than a normal one by this factor, it may well have
# fallen on the way, and risen again.
_LESS = 0.7

# It falls no farther if twice the distance adds less than this part of what is left.
_FLAT = 0.05

# So many errors of the inverse away, a pole at zero is seen.
_BEFORE_ZERO = 8.0

_TOLERANCE = 1e-6
_MOST_POINTS = 48
# An end is known as well as the likelihood is rounded, and at worst to this fraction.
_COARSEST = 1e-2
# So often others may be lost on the way from far away.
_MORE = 3
# Where interpolation is slow, halving is not.
_INTERPOLATIONS = 16


def search(
    root: float,
    farthest: float,
    noise: float,
    eps: float,
    zero: float = math.inf,
    more: int = _MORE,
) -> Generator[float, tuple[float, bool], float]:
    r"""Searches for the distance where $\sqrt{\Delta\chi^2}$ is `root`.

    Distances are in standard errors: where the likelihood is normal, the two are equal.
    It yields the distance to try next, and is sent the excess over `root` there, whose
    rounding error is `noise`, and whether it is that of a minimum. `eps` is the
    precision of the parameters: far away it is not enough to tell a minimum. `zero` is
    the distance where the parameter is zero, where many models have a pole. As often as
    `more` it begins again if what was high is not, as seen from close by.

    Returns the distance: `farthest` if the bound is there, infinite if the likelihood
    falls no farther, as far as can be told, and NaN if it is not finite before it does,
    only seemed to have fallen, or the place is not found by as many points as are
    allowed.
    """
    before, low, high = (0.0, -root), (0.0, -root), (math.inf, math.inf)
    deltas, limit = {0.0: 0.0}, min(_FARTHEST, 0.5 * eps**-0.5)
    # Halved where one stays twice (the Illinois rule).
    weight, finest = {"low": 1.0, "high": 1.0}, min(noise, _COARSEST)
    last, t, is_crossed = "low", min(root, farthest), False
    for tried in range(1, _MOST_POINTS + 1):
        if max(low[0], eps) < zero < t:
            end = yield from _before_zero(root, low[0], zero, noise, eps)
            if not math.isinf(end):
                return end
            zero = math.inf
        excess, is_minimum = yield t
        if abs(excess) <= max(_TOLERANCE, noise):
            return t
        side, other = ("low", "high") if excess <= 0 else ("high", "low")
        weight[side] = 1.0
        if side == last:
            weight[other] /= 2
        last = side
        if side == "low":
            before, low = low, (t, excess)
            if math.isinf(high[0]):
                low, high = yield from _first_crossing(before, low, noise)
            if math.isinf(high[0]) and t >= farthest:
                return farthest
            deltas[low[0]] = (low[1] + root) ** 2
        else:
            high = t, excess
            is_crossed |= is_minimum and t < limit
        is_doubtful = not is_crossed and (side == "high" or t >= limit)
        if is_doubtful and _is_flat(deltas, root):
            return math.inf
        if math.isinf(high[0]):
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
    if not (is_jump and (yield high[0])[0] <= 0):
        return t
    # From now on they begin close by.
    again = search(root, farthest, noise, eps, zero, more - 1)
    return (yield from again) if more else math.nan


def _before_zero(
    root: float, low: float, zero: float, noise: float, eps: float
) -> Generator[float, tuple[float, bool], float]:
    """Looks for an end between a low place and zero, instead of leaping over it.

    A time of which the rate is known may have far less to go than its error: so this
    goes by the distance of the inverse, which is infinite at zero. Returns infinity if
    no end is found there.
    """
    to_inverse = lambda t: t / (1 - t / zero)
    to_place = lambda inverse: inverse / (1 + inverse / zero)
    far, rise, unit = _BEFORE_ZERO * max(root, to_inverse(low)), 0.0, 1.0
    while (excess := (yield to_place(far))[0]) <= max(_TOLERANCE, noise):
        before, rise = rise, excess + root
        # So a likelihood rises that knows nothing of zero, or nothing at all.
        if rise <= 2 * before or rise**2 <= noise:
            return math.inf
        # The error is not known where the likelihood is flat.
        unit = far / rise
        far *= min(_BEFORE_ZERO * root / rise, _FARTHEST)
    looking = search(root, far / unit, noise, eps)
    distance = next(looking)
    while True:
        sent = yield to_place(unit * distance)
        try:
            distance = looking.send(sent)
        except StopIteration as end:
            # It may have seemed high from where the others began.
            is_end = end.value < far / unit
            return to_place(unit * end.value) if is_end else math.inf


Place = tuple[float, float]
"""A distance, and the excess there."""


def _first_crossing(
    low: Place, end: Place, noise: float
) -> Generator[float, tuple[float, bool], tuple[Place, Place]]:
    """Looks for a crossing between two places where the likelihood is high.

    A decay time of 10 and one of -10 may both be, and none between them. Returns the
    last place before the first crossing, and one behind it, infinite if there is none.
    """
    (start, below), (stop, above) = low, end
    is_less = above - below < _LESS * (stop - start)
    shares = (0.25, 0.5, 0.75) if is_less else (0.5,) if stop > 2 * start else ()
    for share in shares:
        t = start + share * (stop - start)
        excess, _ = yield t
        if excess > max(_TOLERANCE, noise):
            return low, (t, excess)
        low = t, excess
    return end, (math.inf, math.inf)


def _is_flat(deltas: dict[float, float], root: float) -> bool:
    """Whether the likelihood has ceased to fall, where it is known how far it has."""
    last = max(deltas)
    if last < _LONGEST:
        return False
    before = max(t for t in deltas if t <= last / 2)
    first = max(t for t in deltas if t <= before / 2)
    fall, fell = deltas[last] - deltas[before], deltas[before] - deltas[first]
    return fall <= max(fell, 0) and fall <= _FLAT * (root**2 - deltas[last])


def _halfway(low: float, high: float) -> float:
    """Returns a number between two, of which one may be far smaller."""
    if low == 0:
        return high / _LONGEST
    return (low + high) / 2 if high < _LONGEST * low else math.sqrt(low * high)

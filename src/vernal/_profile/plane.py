"""The likelihood over a plane of two elements, for a picture."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .._boundary import warn
from .._step import AbstractTrainer
from .conditional import Points
from .elements import find_element, values_of
from .intervals import Interval, Line, crossings, searched, side
from .profile import chained
from .scan import Options, Scan, Start

# The values of each element, and how far they go beyond the outermost contour.
_COUNT = 33
_MARGIN = 1.1

# In standard errors, where the likelihood sets no end.
_WIDTH = 5

# A step between two rows, of the root of the rise; a sixteenth if it is a parabola.
_COARSE = 0.2

# The least rise that is left for the second element, of that for both.
_LEAST = 1e-4

# By how much of its interval an element may miss an end: between two rows it is not
# seen how far the region reaches.
_MISSED = 0.02


class Plane(NamedTuple):
    r"""The names, values and best values of two elements, and $\Delta\chi^2$."""

    names: tuple[str, str]
    x: Float[np.ndarray, "M N"]
    y: Float[np.ndarray, "M N"]
    best: tuple[float, float]
    delta: Float[np.ndarray, "M N"]


def plane(
    trainer: AbstractTrainer,
    solver: Any,
    batch: Any,
    names: Any,
    most: float,
    scale_errors: bool = False,
) -> Plane:
    """Follows the likelihood over two elements, up to a rise of about `most`."""
    labels = ("first", "second")
    pairs = zip(names, labels, strict=True)
    found = [find_element(trainer, name, label) for name, label in pairs]
    if found[0] == found[1]:
        raise ValueError(f"`first` and `second` are both {found[0][0]!r}.")
    options = Options(256, None, scale_errors)
    scan = Scan("contour", trainer, solver, batch, options)
    rise = _MARGIN**2 * most
    ends = crossings(scan, dict(found), rise)
    _warn_of_open(scan, dict(found), ends)
    pair = [index for _, index in found]
    base = scan.base.flat
    spans = [
        _span(scan, index, float(base[index]), scan.unit(index), ends[name])
        for name, index in found
    ]
    # A valley that is bent is followed better along the one than along the other.
    tried: list[tuple[float, tuple[int, int], _Valley]] = []
    for order in ((0, 1), (1, 0)):
        first, second = order
        valley = _followed(scan, (pair[first], pair[second]), spans[first], rise)
        coarse = _coarseness(valley, ends[found[second][0]], rise)
        tried.append((coarse, order, valley))
        if coarse <= _COARSE:
            break
    coarse, order, (*values, delta) = min(tried, key=lambda one: one[0])
    if math.isinf(coarse):
        warn(
            f"`contour`: the region of {found[0][0]!r} and {found[1][0]!r} turns back "
            "along both, and only a part of it is drawn."
        )
    own = [
        values_of(scan.trainer, index, np.append(values[i], scan.base.flat[index]))[0]
        for index, i in zip(pair, order, strict=True)
    ]
    x, y = (array[:-1].reshape(delta.shape) for array in own)
    return Plane((found[0][0], found[1][0]), x, y, (own[0][-1], own[1][-1]), delta)


def _warn_of_open(
    scan: Scan, elements: dict[str, int], ends: dict[str, Interval]
) -> None:
    """Names the sides on which the region has no end."""
    sides = [
        f"{'below' if (sign < 0) != scan.falls(index) else 'above'} in {name!r}"
        for name, index in elements.items()
        for sign, end in zip((-1, 1), ends[name], strict=True)
        if math.isinf(end)
    ]
    if sides:
        warn(
            f"`contour`: the region is open, {', '.join(sides)}: there its lines end "
            "at the edge of what is drawn, and it goes on."
        )


class _Valley(NamedTuple):
    """The values of two elements, the first along the rows, and the rise."""

    first: Float[np.ndarray, "M N"]
    second: Float[np.ndarray, "M N"]
    delta: Float[np.ndarray, "M N"]


def _coarseness(valley: _Valley, ends: tuple[float, float], rise: float) -> float:
    """Returns the largest step between rows, as a part of what all rows reach.

    Infinite if the second element does not reach the ends of its interval.
    """
    low, high = valley.second.min(), valley.second.max()
    gaps = np.array([low - ends[0], ends[1] - high])
    if (gaps[np.isfinite(gaps)] > _MISSED * (high - low)).any():
        return math.inf
    steps = np.diff(np.sqrt(np.maximum(valley.delta, 0)), axis=0)
    return float(np.nanmax(np.abs(steps), initial=0)) / math.sqrt(rise)


def _followed(
    scan: Scan, pair: tuple[int, int], span: tuple[float, float], rise: float
) -> _Valley:
    """Follows the valley along the first element, and from there along the second.

    Each row goes as far as the likelihood does: a grid of the two elements would have
    few points in the narrow valley of two that are correlated.
    """
    first, second = pair
    minimum = float(scan.base.nll)
    x = np.linspace(*span, _COUNT)
    spine = _spine(scan, first, x)
    roots = np.sqrt(np.fmax(2 * (spine.nll.astype(float) - minimum), 0))
    steps = np.abs(np.diff(np.nan_to_num(roots, posinf=0)))
    if steps.max() > _COARSE * math.sqrt(rise):
        # Half of the rows go to where it rises.
        share = steps / steps.sum() + 1 / len(steps)
        x = np.interp(np.linspace(0, 2, _COUNT), np.cumsum([0, *share]), x)
        spine = _spine(scan, first, x)
    rows = [Points(*(part[i] for part in spine)) for i in range(len(x))]
    unit = scan.unit_beside(second, first)
    left = np.fmax(rise - 2 * (spine.nll.astype(float) - minimum), _LEAST * rise)
    sides = [
        side(scan, Line(row, (first, second), unit), sign, height)
        for row, height in zip(rows, left, strict=True)
        for sign in (-1, 1)
    ]
    ends = np.array([end.value for end in searched(scan, sides)]).reshape(-1, 2)
    y, starts = np.empty((len(x), _COUNT)), list[Start]()
    for row, point in enumerate(rows):
        at = float(point.flat[second])
        low, high = _span(scan, second, at, unit, ends[row])
        share = np.linspace(-1, 1, _COUNT)
        y[row] = at + share * np.where(share < 0, at - low, high - at)
        start = scan.start(point.flat, pair)
        starts += chained(y[row], at, start, len(starts))
    x = np.broadcast_to(x[:, None], y.shape)
    values = list(zip(x.flat, y.flat, strict=True))
    points = scan.points([pair] * y.size, values, starts)
    delta = 2 * (points.nll.astype(float) - minimum)
    return _Valley(x, y, delta.reshape(y.shape))


def _spine(scan: Scan, index: int, values: np.ndarray) -> Points:
    """Finds the minima along one element."""
    start, best = scan.start(scan.base.flat, [index]), float(scan.base.flat[index])
    held = [(index,)] * len(values), [(value,) for value in values]
    return scan.points(*held, chained(values, best, start, 0))


def _span(
    scan: Scan, index: int, value: float, unit: float, ends: Any
) -> tuple[float, float]:
    """Returns the ends, a few units away where the likelihood sets none."""
    reach = np.array([-_WIDTH * unit, _WIDTH * unit])
    near = np.clip(value + reach, scan.low[index], scan.high[index])
    low, high = np.where(np.isfinite(ends), ends, near)
    return float(low), float(high)

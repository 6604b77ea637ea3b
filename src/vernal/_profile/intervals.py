"""Intervals by profile likelihood."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .._boundary import warn
from .._step import AbstractTrainer
from .conditional import Held, Points
from .elements import find_elements
from .scan import Options, Scan, Start, is_lower
from .search import search

Interval = tuple[float, float]


def intervals(
    trainer: AbstractTrainer,
    solver: Any,
    batch: Any,
    names: Sequence[str] | str | None,
    level: float,
    options: Options,
) -> dict[str, Interval]:
    """Implements `Trainer.intervals`."""
    elements = find_elements(trainer, names, "names")
    quantile = quantile_of(probability(level, "level"))
    scan = Scan("intervals", trainer, solver, batch, options)
    return crossings(scan, elements, quantile)


def probability(value: Any, argument: str) -> float:
    """Checks a probability between 0 and 1."""
    try:
        share = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share < 1:
        raise ValueError(
            f"`{argument}` is {value}, but must be a probability between 0 and 1, such "
            "as 0.683."
        )
    return share


def quantile_of(level: float) -> float:
    r"""Returns the quantile of $\chi^2$ of one degree of freedom."""
    # SciPy takes long to import, and is there with JAX.
    from scipy.special import erfinv

    return 2 * float(erfinv(level)) ** 2


def crossings(
    scan: Scan, elements: dict[str, int], quantile: float
) -> dict[str, Interval]:
    """Finds where the deviance of each element has risen by a quantile."""
    sides = [
        _Side(scan, name, i, s, quantile)
        for s in (-1, 1)
        for name, i in elements.items()
    ]
    while running := [side for side in sides if side.is_running]:
        held = Held(
            np.array([(side.index, side.index) for side in running]),
            np.array([(side.value, np.nan) for side in running]),
        )
        found = scan.points(held, [s.start for s in running], len(sides) > 2)
        for row, side in enumerate(running):
            side.take(jax.tree.map(lambda x, i=row: x[i], found))
    lowest = min(sides, key=lambda side: side.lowest.nll)
    base, nll = scan.base.nll, lowest.lowest.nll
    if is_lower(nll, base):
        error: Any = ValueError(
            f"On the way to {lowest.label} the likelihood is higher than at the minimum "
            f"({nll:.6g} against {base:.6g} as its negative logarithm): it is not the "
            "minimum. Fit again from there, the attribute `model` of this error."
        )
        error.model = scan.model(lowest.lowest.flat)
        raise error
    is_lost = lambda side: math.isnan(side.value)
    for what, labels in {
        "no crossing was found, as the likelihood is not finite beyond": [
            side.label for side in sides if is_lost(side)
        ],
        "the solver found no minimum": [
            side.label for side in sides if not side.is_minimum and not is_lost(side)
        ],
    }.items():
        if labels:
            warn(f"Profile likelihood: {what}, at {', '.join(labels[:4])}.")
    lows, highs = sides[: len(elements)], sides[len(elements) :]
    pairs = zip(elements, lows, highs, strict=True)
    return {name: (low.value, high.value) for name, low, high in pairs}


class _Side:
    """The search on the lower (-1) or upper (1) side of an element.

    - `value`: the value of the element to try next; at the end, the one that was found.
    - `start`: where the others begin there.
    - `lowest`: the lowest point on the way.
    - `is_minimum`: whether the last point is a minimum of the others.
    """

    def __init__(self, scan: Scan, name: str, index: int, sign: int, quantile: float):
        self.label = f"the {'lower' if sign < 0 else 'upper'} end of {name!r}"
        self.index, self._base, self._root = index, scan.base, math.sqrt(quantile)
        self._best = float(scan.base.flat[index])
        self._unit = sign * scan.unit(index)
        self._bound = float((scan.low if sign < 0 else scan.high)[index])
        self._farthest = max((self._bound - self._best) / self._unit, 0.0)
        eps = float(np.finfo(scan.base.flat.dtype).eps)
        noise = 16 * eps * (1 + abs(float(scan.base.nll)))
        self._search = search(self._root, self._farthest, noise)
        self.lowest, self.is_minimum, self.is_running = scan.base, True, True
        self.start: Start = scan.start(scan.base.flat, [index])
        self._places = {0.0: self.start}
        self._try(next(self._search))

    def _try(self, t: float) -> None:
        self._t = t
        is_bound = t >= self._farthest
        self.value = self._bound if is_bound else self._best + self._unit * t
        nearest = min(self._places, key=lambda place: abs(place - t))
        self.start = self._places[nearest]

    def take(self, point: Points) -> None:
        """Takes the point at the value that was tried, and goes on."""
        delta = 2 * float(point.nll - self._base.nll)
        excess = math.sqrt(max(delta, 0)) - self._root
        if math.isfinite(excess):
            self._places[self._t] = point.flat, point.response
        self.is_minimum = bool(point.is_minimum)
        if point.nll < self.lowest.nll:
            self.lowest = point
        try:
            self._try(self._search.send(excess if math.isfinite(excess) else math.inf))
        except StopIteration as end:
            self.is_running = False
            if not math.isfinite(end.value):
                self.value = end.value * math.copysign(1, self._unit)

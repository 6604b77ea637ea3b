"""Intervals by profile likelihood."""

import itertools
import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from .._boundary import first_names, warn
from .._inference import ROUNDING
from .._step import AbstractTrainer, prior_ends
from .._tree import ByName
from .conditional import Points
from .elements import find_elements, values_of
from .scan import LOST, Options, Scan, Start
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
    # SciPy takes long to import, and is there with JAX.
    from scipy.special import erfinv

    share = probability(level, "level")
    scan = Scan("intervals", trainer, solver, batch, options)
    # The quantile of chi-squared of one degree of freedom.
    found = crossings(scan, elements, 2 * float(erfinv(share)) ** 2)
    own = {}
    for name, index in elements.items():
        ends, _ = values_of(scan.trainer, index, np.asarray(found[name]))
        low, high = map(float, ends)
        own[name] = (high, low) if scan.falls(index) else (low, high)
    return ByName(own)


def probability(value: Any, argument: str) -> float:
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


def crossings(
    scan: Scan, elements: dict[str, int], quantile: float
) -> dict[str, Interval]:
    """Finds where the deviance of each element has risen by a quantile."""
    sides = {}
    for sign, (name, index) in itertools.product((-1, 1), elements.items()):
        which = "lower" if (sign < 0) != scan.falls(index) else "upper"
        line = Line(scan.base, (index,), scan.unit(index))
        sides[f"the {which} end of {name!r}"] = side(scan, line, sign, quantile)
    ends = dict(zip(sides, searched(scan, list(sides.values())), strict=True))
    _check(scan, ends)
    values, hidden = [end.value for end in ends.values()], list[str]()
    of_end = [*elements.values()] * 2
    for place, (label, i) in enumerate(zip(ends, of_end, strict=True)):
        end = values[place]
        is_open = math.isinf(end) or end not in (scan.low[i], scan.high[i])
        # Numbers that nearly cancel do so less well at another value.
        if scan.is_hidden[i] and is_open:
            hidden.append(label)
            values[place] = math.nan if math.isfinite(end) else end
    if hidden:
        warn(f"Profile likelihood: {ROUNDING}, for {first_names(hidden, str)}.")
    pairs = zip(values[: len(elements)], values[len(elements) :], strict=True)
    return dict(zip(elements, pairs, strict=True))


class End(NamedTuple):
    """How a search ended: the value, the lowest point on the way, and the last one."""

    value: float
    lowest: Points
    last: Points


class Line(NamedTuple):
    """From where an element is moved, in which unit, and which others are held there.

    The element is the last one of `held`.
    """

    base: Points
    held: tuple[int, ...]
    unit: float


Try = tuple[tuple[int, ...], tuple[float, ...], Start]
"""The elements that are held, at which values, and where the others begin."""


def searched(scan: Scan, sides: Sequence[Generator[Try, Points, End]]) -> list[End]:
    """Goes through searches side by side."""
    running = {i: next(side) for i, side in enumerate(sides)}
    ends: dict[int, End] = {}
    while running:
        found = scan.points(*zip(*running.values(), strict=True))
        for row, i in enumerate(list(running)):
            try:
                point = jax.tree.map(lambda x, i=row: x[i], found)
                running[i] = sides[i].send(point)
            except StopIteration as end:
                ends[i] = end.value
                del running[i]
    return [ends[i] for i in range(len(sides))]


def side(
    scan: Scan, line: Line, sign: int, quantile: float
) -> Generator[Try, Points, End]:
    """Searches the lower (-1) or upper (1) side of an element.

    It yields what to try next, and is sent the point.
    """
    end = yield from _in_unit(scan, line, sign, quantile)
    unit = scan.unit_by_slope(line.held[-1])
    if not math.isinf(end.value) or unit <= line.unit:
        return end
    # It may have seemed flat, since no step was long enough.
    again = yield from _in_unit(scan, line._replace(unit=unit), sign, quantile)
    lowest = min(end.lowest, again.lowest, key=lambda point: point.nll)
    return again._replace(lowest=lowest)


def _in_unit(
    scan: Scan, line: Line, sign: int, quantile: float
) -> Generator[Try, Points, End]:
    """Searches by steps in the unit of a line."""
    (base, held, unit), root = line, math.sqrt(quantile)
    *others, index = held
    beside, unit = tuple(map(float, base.flat[others])), sign * unit
    best, bound = float(base.flat[index]), (scan.low if sign < 0 else scan.high)[index]
    farthest = max((float(bound) - best) / unit, 0.0)
    eps = float(np.finfo(base.flat.dtype).eps)
    noise = 16 * eps * (1 + abs(float(scan.base.nll)))
    zero = -best / unit if best * unit < 0 else math.inf
    looking = search(root, farthest, noise, eps, zero)
    places, lowest, t = {0.0: scan.start(base.flat, held)}, base, next(looking)
    value_at = lambda t: float(bound) if t >= farthest else best + unit * t
    seen: dict[float, Points] = {}
    while True:
        if t in seen:
            # Asked for again, from close by: not from where others were lost.
            places = {place: rows for place, rows in places.items() if place < t}
        start = places[min(places, key=lambda place: abs(place - t))]
        point = seen[t] = yield held, (*beside, value_at(t)), start
        lowest = min(lowest, point, key=lambda point: point.nll)
        excess = math.sqrt(max(2 * float(point.nll - base.nll), 0)) - root
        excess = excess if math.isfinite(excess) else math.inf
        # From a point that lies far too high, others may not find their minimum.
        if excess < root:
            places[t] = point.rows
        try:
            t = looking.send((excess, bool(point.is_minimum)))
        except StopIteration as end:
            t = end.value
            value = value_at(t) if math.isfinite(t) else sign * t
            return End(value, lowest, seen.get(t, point))


def _check(scan: Scan, ends: dict[str, End]) -> None:
    """Refuses a lower minimum; warns of ends that were not found."""
    base = scan.base.nll
    label, end = min(ends.items(), key=lambda pair: pair[1].lowest.nll)
    if scan.is_lower(end.lowest):
        against = f"({end.lowest.nll:.6g} against {base:.6g} as its negative logarithm)"
        if scan.is_lost(end.lowest.flat, float(end.lowest.nll)):
            raise ValueError(
                f"On the way to {label} the likelihood seems higher than at the "
                f"minimum {against}, but {LOST}"
            )
        error: Any = ValueError(
            f"On the way to {label} the likelihood is higher than at the minimum "
            f"{against}: it is not the minimum. Fit again from there, the attribute "
            "`model` of this error."
        )
        error.model = scan.model(end.lowest.flat)
        raise error
    lost = [label for label, end in ends.items() if math.isnan(end.value)]
    is_failed = lambda end: math.isfinite(end.value) and not end.last.is_minimum
    failed = [label for label, end in ends.items() if is_failed(end)]
    for what, labels in (
        ("no crossing was found, where it jumps or is not finite", lost),
        ("the solver found no minimum", failed),
    ):
        if labels:
            warn(
                f"Profile likelihood: {what}, at {first_names(labels, str)}."
                + scan.error_note()
                + prior_ends(scan.trainer)
            )

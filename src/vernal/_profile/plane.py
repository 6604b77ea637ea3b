"""The likelihood over a grid of two elements, for a picture."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .._step import AbstractTrainer
from .elements import find_element
from .intervals import crossings
from .own_values import values_of
from .profile import chained
from .scan import Options, Scan, Start

# The values of each element, and how far they go beyond the outermost contour.
_COUNT = 33
_MARGIN = 1.1

# In standard errors, where the likelihood sets no end.
_WIDTH = 5


class Plane(NamedTuple):
    r"""The names, values and best values of two elements, and $\Delta\chi^2$."""

    names: tuple[str, str]
    x: Float[np.ndarray, " M"]
    y: Float[np.ndarray, " N"]
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
    ends = crossings(scan, dict(found), _MARGIN**2 * most)
    (x, y), pair = (
        [_values(scan, index, ends[name]) for name, index in found],
        [index for _, index in found],
    )
    best = scan.base.flat[pair].astype(float)
    # Along the first element, and from there to both sides along the second.
    start = scan.start(scan.base.flat, pair[:1])
    spine = scan.points(
        [pair[:1]] * len(x), [(value,) for value in x], chained(x, best[0], start, 0)
    )
    starts: list[Start] = []
    for flat in spine.flat:
        starts += chained(y, float(flat[pair[1]]), scan.start(flat, pair), len(starts))
    points = scan.points([pair] * len(starts), list(itertools.product(x, y)), starts)
    delta = 2 * (points.nll.astype(float) - float(scan.base.nll))
    names, shape = (found[0][0], found[1][0]), (len(x), len(y))
    own = [
        values_of(scan.trainer, index, np.append(values, at))[0]
        for index, values, at in zip(pair, (x, y), best, strict=True)
    ]
    (*x, first), (*y, second) = own
    return Plane(names, np.array(x), np.array(y), (first, second), delta.reshape(shape))


def _values(scan: Scan, index: int, ends: tuple[float, float]) -> np.ndarray:
    value, reach = float(scan.base.flat[index]), _WIDTH * scan.unit(index)
    low, high = float(scan.low[index]), float(scan.high[index])
    near = max(low, value - reach), min(high, value + reach)
    least, most = (
        end if math.isfinite(end) else other
        for end, other in zip(ends, near, strict=True)
    )
    return np.linspace(least, most, _COUNT)

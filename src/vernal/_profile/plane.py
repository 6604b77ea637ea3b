"""The likelihood over a grid of two elements, for a picture."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._step import AbstractTrainer
from .elements import find_element
from .held import Scan
from .intervals import crossings
from .profile import from_minimum, symmetric_error
from .scan import Options, prepare
from .walk import Walk, run_walk

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
    trainer: AbstractTrainer, solver: Any, batch: Any, names: Any, most: float
) -> Plane:
    """Follows the likelihood over two elements, up to a rise of about `most`."""
    labels = ("first", "second")
    pairs = zip(names, labels, strict=True)
    found = [find_element(trainer, name, label) for name, label in pairs]
    if found[0] == found[1]:
        raise ValueError(f"`first` and `second` are both {found[0][0]!r}.")
    scan = prepare("contour", trainer, solver, batch, Options(256, None))
    ends = crossings(scan, dict(found), _MARGIN**2 * most)
    (x, y), (first, second) = (
        (_values(scan, index, ends[name]) for name, index in found),
        (index for _, index in found),
    )
    spine, _ = run_walk(scan, from_minimum(scan.flat, first, x))
    points, _ = run_walk(scan, _columns(spine.flat[1:], first, second, x, y))
    nll = np.asarray(points.nll, float).reshape(len(x), len(y))
    best = float(spine.flat[0, first]), float(spine.flat[0, second])
    delta = 2 * (nll - float(spine.nll[0]))
    return Plane((found[0][0], found[1][0]), x, y, best, delta)


def _values(scan: Scan, index: int, ends: tuple[float, float]) -> np.ndarray:
    value, error = float(scan.flat[index]), symmetric_error(scan, index)
    if not np.isfinite(error):
        error = float(scan.metric.standard_errors()[index])
    low, high = (float(side[index]) for side in scan.limits())
    near = max(low, value - _WIDTH * error), min(high, value + _WIDTH * error)
    least, most = (
        end if math.isfinite(end) else other
        for end, other in zip(ends, near, strict=True)
    )
    return np.linspace(least, most, _COUNT)


def _columns(spine: Any, first: int, second: int, x: np.ndarray, y: np.ndarray) -> Walk:
    """Goes from the best value of the second element up and down, at each first."""
    start, size = np.searchsorted(y, np.asarray(spine[:, second])), len(y)
    # A way that is shorter stays at its end.
    steps = np.arange(size)[None, :]
    down = np.maximum(start[:, None] - 1 - steps, 0)
    up = np.minimum(start[:, None] + steps, size - 1)
    values = y[np.concatenate([down, up])]
    held = np.broadcast_to(np.concatenate([x, x])[:, None], values.shape)
    place = np.arange(size)[None, :] - start[:, None]
    rows = np.arange(len(x))[:, None] + np.where(place < 0, 0, len(x))
    reached = np.where(place < 0, -1 - place, place)
    return Walk(
        starts=jnp.concatenate([spine, spine]),
        elements=jnp.tile(jnp.asarray([[first, second]]), (2 * len(x), 1)),
        values=jnp.asarray(np.stack([held, values], axis=-1), spine.dtype),
        rows=rows.ravel(),
        steps=reached.ravel(),
    )

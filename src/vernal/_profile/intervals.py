"""Intervals by profile likelihood."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import warn
from .._step import AbstractTrainer
from .crossing import INFINITE, LOST, run_crossings
from .elements import find_elements
from .held import Scan
from .scan import Options, converged, is_lower, prepare

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
    scan = prepare("intervals", trainer, solver, batch, options)
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
    count, dtype = len(elements), scan.flat.dtype
    index = np.tile(np.fromiter(elements.values(), np.int32, count), 2)
    sides = np.repeat(np.array([-1, 1], dtype), count)
    args = jnp.asarray(index), jnp.asarray(sides), jnp.asarray(quantile, dtype)
    found = run_crossings(scan, *args)
    value, end, base, lowest = jax.device_get(
        (found.value, found.end, found.base.nll, found.lowest.nll)
    )
    done = converged(found.last)
    labels = [
        f"the {'lower' if side < 0 else 'upper'} end of {name!r}"
        for side, name in zip(sides, [*elements, *elements], strict=True)
    ]
    if is_lower(lowest, base).any():
        row = int(np.argmin(lowest - base))
        message = (
            f"On the way to {labels[row]} the likelihood is higher than "
            f"at the minimum ({lowest[row]:.6g} against {base[row]:.6g} as its "
            "negative logarithm): it is not the minimum. Fit again from there, the "
            "attribute `model` of this error."
        )
        error: Any = ValueError(message)
        error.model = scan.model(found.lowest.flat[row])
        raise error
    ends = np.where(end == INFINITE, sides * math.inf, value)
    ends = np.where(end == LOST, math.nan, ends)
    for rows, what in (
        (end == LOST, "no crossing was found, as the likelihood is not finite beyond"),
        (~done & (end != LOST), "the solver found no minimum"),
    ):
        if rows.any():
            shown = ", ".join(labels[row] for row in np.flatnonzero(rows)[:4])
            warn(f"Profile likelihood: {what}, at {shown}.")
    low, high = np.split(ends.astype(float), 2)
    return {
        name: (float(least), float(most))
        for name, least, most in zip(elements, low, high, strict=True)
    }

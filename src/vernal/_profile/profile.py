"""`Profile`: the likelihood along one element."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, Generic, final

import jax
import numpy as np
from jaxtyping import Bool, Float
from typing_extensions import TypeVar

from .._boundary import first_names, warn
from .._step import AbstractTrainer, prior_ends
from .._tree import ByName
from .conditional import Points, run_models
from .elements import coordinates_of, find_element, find_elements, values_of
from .intervals import crossings
from .scan import LOST, Options, Scan, Start

Model = TypeVar("Model", covariant=True, default=Any)

# How far a profile goes by default, in standard errors, and its values.
_WIDTH, _COUNT = 3, 21


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Profile(Generic[Model]):
    r"""What [`vernal.Trainer.profile`][] returns: the likelihood along one element.

    At each value of that element all others are where the likelihood is highest.

    **Attributes:**

    - `name`: the name of the element.
    - `values`: its values, $K$ of them.
    - `losses`: the lowest negative log-likelihood at each, with the priors; with
        `scale_errors` that by the scaled errors.
    - `converged`: whether the solver has found a minimum there.
    - `value`, `error`: the value of the element at the minimum, and its symmetric
        standard error: infinite if the data do not constrain it, NaN on a bound.
    - `minimum`: the negative log-likelihood at the minimum.
    """

    name: str
    values: Float[np.ndarray, " K"]
    losses: Float[np.ndarray, " K"]
    converged: Bool[np.ndarray, " K"]
    value: float
    error: float
    minimum: float
    _trainer: AbstractTrainer
    _flat: Float[np.ndarray, "K D"]

    @functools.cached_property
    def models(self) -> Model:
        """The models at each value, stacked: each array has $K$ rows."""
        return run_models(self._trainer, self._flat)

    @property
    def delta(self) -> Float[np.ndarray, " K"]:
        r"""Twice the negative log-likelihood above its minimum, $\Delta\chi^2$."""
        return 2 * (self.losses - self.minimum)

    def __repr__(self) -> str:
        return (
            f"Profile({self.name!r}, {len(self.values)} values from "
            f"{self.values.min():.6g} to {self.values.max():.6g})"
        )


def profile(
    trainer: AbstractTrainer,
    solver: Any,
    batch: Any,
    name: Any,
    values: Any,
    options: Options,
) -> Any:
    """Implements `Trainer.profile`."""
    is_one = isinstance(name, str)
    if not is_one:
        elements = find_elements(trainer, name, "name")
    else:
        elements = dict([find_element(trainer, name, "name")])
        values = None if values is None else dict.fromkeys(elements, values)
    given = {} if values is None else values
    if not isinstance(given, Mapping) or given.keys() - elements.keys():
        raise ValueError(
            f"`values` is {values!r}, but for several profiles must be a dictionary by "
            f"their names: {', '.join(map(repr, elements))}."
        )
    given = {own: _checked(each) for own, each in given.items()}
    scan = Scan("profile", trainer, solver, batch, options)
    axes = {x: _axis(scan, x, i, given.get(x)) for x, i in elements.items()}
    index, goals, starts = [], [], []
    for x, (_, free) in axes.items():
        i = elements[x]
        start, best = scan.start(scan.base.flat, [i]), float(scan.base.flat[i])
        starts += chained(free, best, start, len(goals))
        index += [(i,)] * len(free)
        goals += [(value,) for value in free]
    points, found, end = scan.points(index, goals, starts), {}, 0
    for x, (own_values, free) in axes.items():
        i, first, end = elements[x], end, end + len(free)
        own = jax.tree.map(lambda row, a=first, b=end: row[a:b], points)
        found[x] = _profile(scan, x, i, own_values, own)
        is_bound = np.isin(free, (scan.low[i], scan.high[i])) & np.isposinf(own.nll)
        ends = scan.error_note() + prior_ends(scan.trainer)
        lower = scan.is_lower(own)
        if lower.any():
            _warn_of_lower(scan, found[x], own, lower)
        _warn_of(found[x], is_bound, ends)
    return next(iter(found.values())) if is_one else ByName(found)


def chained(values: np.ndarray, best: float, root: Start, first: int) -> list[Start]:
    """Begins at the minimum, and goes to the lowest and to the highest value.

    Each value begins at the one before it; `first` is the index of the first of them.
    """
    order = np.argsort(values, kind="stable")
    starts: list[Start] = [root] * len(values)
    for way in (order[values[order] < best][::-1], order[values[order] >= best]):
        for before, own in itertools.pairwise(way):
            starts[own] = first + int(before)
    return starts


def _profile(
    scan: Scan, name: str, index: int, values: np.ndarray, points: Points
) -> Profile[Any]:
    free = scan.base.flat[index]
    value, slope = values_of(scan.trainer, index, np.array([free], float))
    error = abs(float(slope[0])) * float(scan.errors[index])
    return Profile(
        name=name,
        values=values,
        losses=points.nll,
        converged=points.is_minimum,
        value=float(value[0]),
        # On a bound the likelihood is no parabola.
        error=np.nan if scan.is_on_bound(index) else error,
        minimum=float(scan.base.nll),
        _trainer=scan.trainer,
        _flat=points.flat,
    )


def _axis(
    scan: Scan, name: str, index: int, given: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Checks values against the bounds; by default across three standard errors.

    Returns also those of the free coordinate, which are often the same.
    """
    values = _default(scan, name, index) if given is None else given
    low, high = float(scan.low[index]), float(scan.high[index])
    if (out := values[(values < low) | (values > high)]).size:
        raise ValueError(
            f"`values`: {out[0]:.6g} is outside of the bounds of {name!r}, "
            f"({low:.6g}, {high:.6g})."
        )
    free = coordinates_of(scan.trainer, index, values)
    if (out := values[np.isnan(free)]).size:
        raise ValueError(
            f"`values`: the bijection of {name!r} does not return {out[0]:.6g}."
        )
    return values, free


def _default(scan: Scan, name: str, index: int) -> np.ndarray:
    ends = np.nan, np.nan
    if scan.is_on_bound(index):
        # On a bound the likelihood is no parabola, and its curvature is no scale.
        ends = crossings(scan, {name: index}, float(_WIDTH**2))[name]
    if not np.isfinite(ends).all():
        free, error = float(scan.base.flat[index]), scan.wide_errors[index]
        if not np.isfinite(error):
            raise ValueError(
                f"`values`: the data do not constrain {name!r} here, so that three "
                "standard errors are no range. Give `values`."
            )
        reach = np.array([-_WIDTH * error, _WIDTH * error])
        ends = np.clip(free + reach, scan.low[index], scan.high[index])
    ends, _ = values_of(scan.trainer, index, np.asarray(ends))
    return np.linspace(ends.min(), ends.max(), _COUNT)


def _checked(values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        array = np.zeros(0, object)
    if array.ndim != 1 or array.dtype.kind not in "fiu" or not array.size:
        raise ValueError(f"`values` is {values!r}, but must be a vector of numbers.")
    array = array.astype(float)
    if not np.isfinite(array).all():
        raise ValueError("`values` are not all finite.")
    return array


def _warn_of_lower(
    scan: Scan, found: Profile[Any], points: Points, lower: np.ndarray
) -> None:
    """Warns of a point below the minimum, or of one that rounding puts there."""
    place = int(np.argmin(np.where(lower, found.losses, np.inf)))
    is_lost = scan.is_lost(points.flat[place], float(points.nll[place]))
    told = (
        f"but {LOST}"
        if is_lost
        else "so it is not the minimum. Fit again from there, the model "
        f"{place} of `profile.models`."
    )
    warn(
        f"`profile`: at {found.name} = {found.values[place]:.6g} the likelihood "
        f"{'seems' if is_lost else 'is'} higher than at the minimum "
        f"({found.losses[place]:.6g} against {found.minimum:.6g} as its negative "
        f"logarithm), {told}"
    )


def _warn_of(found: Profile[Any], is_bound: np.ndarray, ends: str) -> None:
    """Warns of what was not found; `ends` says what else may be the cause.

    At a bound (`is_bound`) a likelihood of zero is told by the values alone.
    """
    is_lost = ~found.converged & ~is_bound
    few = lambda values: first_names(values.tolist(), "{:.6g}".format)
    at = lambda which: f"{found.name} = {few(found.values[which])}"
    is_zero = is_lost & np.isposinf(found.losses)
    if is_zero.any():
        warn(
            f"`profile`: the negative logarithm of the likelihood is infinite at "
            f"{at(is_zero)}: the likelihood is zero there, or too small for its dtype."
        )
    if (is_lost & ~is_zero).any():
        warn(
            f"`profile`: the solver found no minimum at {at(is_lost & ~is_zero)}: "
            "`profile.converged` says where. Raise `max_steps`, or lower the "
            "tolerances of the solver. If that does not help, the likelihood is flat "
            f"in another element there, or falls without end.{ends}"
        )

"""`Profile`: the likelihood along one element."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float
from typing_extensions import TypeVar

from .._boundary import warn
from .._step import AbstractTrainer
from .elements import find_element
from .held import Scan
from .scan import Options, converged, is_lower, prepare
from .walk import Walk, run_walk

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
    - `losses`: the lowest negative log-likelihood at each, with the priors.
    - `models`: the models there, stacked: each array has $K$ rows.
    - `converged`: whether the solver has found a minimum there.
    - `value`, `error`: the value of the element at the minimum, and its symmetric
        standard error: infinite if the data do not constrain it, NaN on a bound.
    - `minimum`: the negative log-likelihood at the minimum.
    """

    name: str
    values: Float[np.ndarray, " K"]
    losses: Float[np.ndarray, " K"]
    models: Model
    converged: Bool[np.ndarray, " K"]
    value: float
    error: float
    minimum: float

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
    name: str,
    values: ArrayLike | Sequence[float] | None,
    options: Options,
) -> Profile[Any]:
    """Implements `Trainer.profile`."""
    own, index = find_element(trainer, name, "name")
    given = None if values is None else _checked(values)
    scan = prepare("profile", trainer, solver, batch, options)
    return along(scan, own, index, given)


def along(scan: Scan, name: str, index: int, values: np.ndarray | None) -> Profile[Any]:
    """Makes the profile of one element; by default across three standard errors."""
    value, error = float(scan.flat[index]), symmetric_error(scan, index)
    low, high = (float(side[index]) for side in scan.limits())
    if values is None:
        if not np.isfinite(error):
            raise ValueError(
                f"`values`: the data do not constrain {name!r} here, so that three "
                "standard errors are no range. Give `values`."
            )
        least, most = (
            max(low, value - _WIDTH * error),
            min(high, value + _WIDTH * error),
        )
        values = np.linspace(least, most, _COUNT)
    assert values is not None
    if (out := values[(values < low) | (values > high)]).size:
        raise ValueError(
            f"`values`: {out[0]:.6g} is outside of the bounds of {name!r}, "
            f"({low:.6g}, {high:.6g})."
        )
    points, models = run_walk(scan, from_minimum(scan.flat, index, values))
    done, nll = converged(points), np.asarray(points.nll)
    found = Profile(
        name=name,
        values=values,
        losses=nll[1:],
        models=jax.tree.map(_rest, models),
        converged=done[1:],
        value=float(points.flat[0, index]),
        # On a bound the likelihood is no parabola.
        error=np.nan if value in (low, high) else error,
        minimum=float(nll[0]),
    )
    _warn_of(found, is_lower(nll[1:], nll[0]))
    return found


def symmetric_error(scan: Scan, index: int) -> float:
    """Returns the standard error of an element, without a bound."""
    return float(scan.metric.errors_of_the_data()[index])


def _rest(leaf: Any) -> Any:
    # The first is the minimum.
    return leaf[1:] if isinstance(leaf, jax.Array) else leaf


def from_minimum(flat: Any, index: int, values: np.ndarray) -> Walk:
    """Goes from the minimum to the lowest and to the highest value."""
    start = float(flat[index])
    order = np.argsort(values, kind="stable")
    ways = [order[values[order] < start][::-1], order[values[order] >= start]]
    # Most values lie on both sides: two lengths, and two programs, are enough.
    half, longest = len(values) // 2 + 1, max(map(len, ways))
    length = 1 + (half if longest <= half else len(values))
    steps = np.full((2, length), np.nan)
    rows, places = np.zeros(len(values), int), np.zeros(len(values), int)
    for row, way in enumerate(ways):
        steps[row, 1 : 1 + len(way)] = values[way]
        steps[row, 1 + len(way) :] = values[way[-1]] if len(way) else np.nan
        rows[way], places[way] = row, 1 + np.arange(len(way))
    return Walk(
        starts=jnp.stack([flat, flat]),
        elements=jnp.full((2, 1), index),
        values=jnp.asarray(steps, flat.dtype)[:, :, None],
        rows=np.concatenate([[0], rows]),
        steps=np.concatenate([[0], places]),
    )


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


def _warn_of(found: Profile[Any], lower: np.ndarray) -> None:
    if lower.any():
        place = int(np.argmin(np.where(lower, found.losses, np.inf)))
        warn(
            f"`profile`: at {found.name} = {found.values[place]:.6g} the likelihood is "
            f"higher than at the minimum ({found.losses[place]:.6g} against "
            f"{found.minimum:.6g} as its negative logarithm): it is not the minimum. "
            f"Fit again from there, the model {place} of `profile.models`."
        )
    if not found.converged.all():
        few = ", ".join(f"{x:.6g}" for x in found.values[~found.converged][:4])
        warn(
            f"`profile`: the solver found no minimum at {found.name} = {few}: "
            "`profile.converged` says where. Raise `max_steps`, or lower the "
            "tolerances of the solver."
        )

"""The estimated distance to the minimum, and what it says."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float

from .._boundary import Params
from .._tree import element_name

# A loss that can fall by this fraction of its scatter is at its minimum.
TOLERANCE = 1e-3

# A table shows no difference below about so many times that: a fifth of an error bar.
_WORTH_A_NOTE = 20


class Distance(NamedTuple):
    r"""How far a point is from a minimum, in units of what is minimised.

    - `edm`: $\frac12 g^\top F^{-1} g$, NaN where it is not known.
    - `tolerance`: the largest `edm` of a minimum, beside what numbers hide.
    - `rounding`: how far the loss can fall unseen, since it is rounded.
    - `spacing`: the distance that the spacing of the parameters may hide; without any
        scatter, one that is too small to matter.
    - `is_saddle`: whether the point cannot be a minimum: the loss curves downwards, is
        flat in every direction, falls along one without curvature, or has derivatives
        that are not finite.
    - `is_complete`: whether `edm` is more than a lower bound.
    - `direction`: the direction of the minimum, of length one, with each parameter in
        units of its scale. Where the loss curves downwards, it does so along it.
    - `is_plateau`: whether the loss is flat here, and lower across: `direction` leads
        there, in the units of the parameters.
    - `is_leap`: whether the step to the minimum is longer than a parameter, as where
        residuals have hardly any slope. After a `second_look`: whether they have none.
    - `is_unclear`: whether the gradient may account for some of the curvature.
    - `is_held`: whether an element is held at its bound.
    - `is_endless`: whether the loss only approaches a limit, without a minimum on the
        way: `direction` leads there.
    - `is_steep`: whether there is a slope without curvature: `edm` leaves it out. After
        a `second_look`: whether the loss falls along it, or nobody knows.
    """

    edm: Float[Array | np.ndarray, ""]
    tolerance: Float[Array | np.ndarray, ""]
    rounding: Float[Array | np.ndarray, ""]
    spacing: Float[Array | np.ndarray, ""]
    is_saddle: Bool[Array | np.ndarray, ""]
    is_complete: Bool[Array | np.ndarray, ""]
    direction: Float[Array | np.ndarray, " D"]
    is_plateau: Any = False
    is_leap: Any = False
    is_unclear: Any = False
    is_held: Any = False
    is_endless: Any = False
    is_steep: Any = False

    @property
    def is_far(self) -> bool:
        """Whether a table would show the difference. For numbers on the host."""
        return bool(self.edm > max(_WORTH_A_NOTE * self.tolerance, self.spacing))

    @property
    def noise(self) -> Any:
        """The largest fall of the loss that means nothing. For numbers on the host."""
        return np.fmax(self.visible, self.spacing)

    @property
    def visible(self) -> Any:
        """The least change of the loss that is one. For numbers on the host."""
        return np.fmax(self.tolerance, self.rounding)

    @property
    def is_short(self) -> bool:
        """Whether the loss can fall further. For numbers on the host."""
        return bool(self.edm > self.noise or self.is_far or self.is_saddle)

    @property
    def is_flat(self) -> bool:
        """Whether the loss is flat in each direction. For numbers on the host."""
        # Where derivatives are not finite, there is no direction either.
        has_way = self.is_plateau or np.any(self.direction)
        return bool(self.is_saddle and np.isfinite(self.edm) and not has_way)

    @property
    def is_flat_at_bound(self) -> bool:
        """Whether only what is held changes the loss. For numbers on the host."""
        return bool(self.is_flat and self.is_held)

    @property
    def is_lost(self) -> bool:
        """Whether there is no minimum that errors are of. For numbers on the host."""
        is_saddle = self.is_saddle and not self.is_flat_at_bound
        is_known = np.isfinite(self.edm) or self.is_steep
        return bool(self.is_endless or (is_saddle and is_known))

    @property
    def is_minimum(self) -> bool:
        """Whether the loss cannot fall any further. For numbers on the host."""
        is_known = self.is_complete and not np.isnan(self.edm)
        return bool(is_known and not (self.is_steep or self.is_short))

    @property
    def remedy(self) -> str:
        """What helps where rounding hides the minimum. For numbers on the host."""
        if not (self.is_far and self.edm <= self.rounding):
            return ""
        dtype = self.direction.dtype
        wider = "" if dtype == np.float64 else "compute in float64, or "
        if self.edm < np.finfo(dtype).tiny:
            return (
                f"The squares of the residuals are below the smallest number of "
                f"{dtype}: {wider}fit in larger units"
            )
        return (
            f"The loss is rounded, in {dtype}, by more than that: {wider}leave "
            "constants out of it"
        )


def unknown(like: Array | np.ndarray) -> Distance:
    """Returns a distance that is not known, in the dtype of the parameters."""
    nan, no = np.asarray(np.nan, like.dtype), np.asarray(False)
    return Distance(nan, nan, nan, nan, no, no, np.zeros(like.shape, like.dtype))


def truth_p_values(
    distance: Distance, directions: int, squares: tuple[float, int] | None
) -> tuple[float, float]:
    r"""Returns how probable it is that the truth is as far from the minimum.

    There $2\,\mathrm{edm}$ has the distribution of chi-squared, with a degree of
    freedom for each of the `directions` that are constrained. That is the first number.
    The second holds for errors of any scale: the share that $2\,\mathrm{edm}$ has in
    the `squares` of residuals, a sum and its count, has the distribution of beta.
    """
    edm = float(distance.edm)
    if not distance.is_far:
        return 1.0, 1.0
    known = float(chi_squared_p_value(2 * edm, directions))
    if squares is None:
        return known, known
    return known, float(share_p_value(2 * edm, directions, *squares))


def share_p_value(fall: Any, directions: Any, total: Any, count: Any) -> Any:
    """Returns the probability that chi-squared falls by a larger share of `total`."""
    # A dependency of JAX.
    from scipy.special import betainc

    fall, total = np.asarray(fall, float), np.asarray(total, float)
    free = np.asarray(count) - directions
    rest = np.clip(1 - fall / np.where(total > 0, total, np.nan), 0, 1)
    found = betainc(np.maximum(free, 1) / 2, np.asarray(directions) / 2, rest)
    return np.where(free > 0, found, 1.0)


def chi_squared_p_value(value: Any, degrees: Any) -> Any:
    """Returns the probability of a larger chi-squared: 1 without degrees of freedom."""
    # A dependency of JAX. In 32 bits JAX's own has few digits.
    from scipy.special import chdtrc

    degrees = np.asarray(degrees, float)
    return np.where(degrees > 0, chdtrc(degrees, value), 1.0)


def minimum_note(distance: Distance, params: Params) -> str | None:
    """Returns a note if a trainer is not at a minimum, or there is none this way."""
    if distance.is_endless:
        limit = "no minimum this way: the loss only approaches a limit"
        return limit + endless_words(distance, params)
    return edm_note(distance, params)


def edm_note(distance: Distance, params: Params) -> str | None:
    """Returns a note for a table if a trainer is not at a minimum."""
    if distance.is_saddle:
        said = f"not at a minimum: the loss {saddle_words(distance, params)}"
        return f"perhaps {said}" if distance.is_flat_at_bound else said
    if distance.is_endless or not distance.is_far:
        return None
    where = along(np.asarray(distance.direction, float), params)
    remedy = f". {distance.remedy}" if distance.remedy else ""
    return f"not at a minimum: edm {distance.edm:.3g}{where}{remedy}"


def endless_words(distance: Distance, params: Params) -> str:
    """Says along which parameters there is no minimum, and what helps."""
    where = along(np.asarray(distance.direction, float), params)
    return (
        f"{where}, and standard errors mean nothing there: give a prior or a bound, "
        "fit fewer parameters, or start from elsewhere. `intervals` has the limit on "
        "the other side"
    )


def slope_note(distance: Distance, params: Params) -> str | None:
    """Returns a note for errors from slopes, if there are hardly any at the minimum."""
    if distance.is_short or not distance.is_leap:
        return None
    where = along(np.asarray(distance.direction, float), params)
    return (
        f"residuals have hardly any slope here{where}, and errors that come from "
        'slopes are too large: give `kind="observed"`, or call `intervals`'
    )


def saddle_words(
    distance: Distance, params: Params, remedy: str = "start from elsewhere"
) -> str:
    """Says why a point that `is_saddle` is none of a minimum, and what helps."""
    direction = np.asarray(distance.direction, float)
    where = along(direction, params).removeprefix(", ")
    if distance.is_plateau:
        return f"is flat here, and lower across, {where}: start there"
    if distance.is_flat_at_bound:
        return (
            "is flat here in all that is not held at its bound: unless that bound is "
            "the answer, start away from it"
        )
    if not where:
        return "is flat here: start from elsewhere"
    if distance.is_steep:
        return f"falls {where}, without curvature: fit on, or give a prior or a bound"
    return f"curves downwards {where}: {remedy}"


def along(direction: np.ndarray, params: Params) -> str:
    """Names the parameters that a direction involves most, with their weights."""
    order = np.argsort(-abs(direction), kind="stable")
    names = [
        f"{element_name(params, int(index))} ({direction[index]:+.2g})"
        for index in order[:5]
        if abs(direction[index]) > 0.1
    ]
    return f", along {', '.join(names)}" if names else ""

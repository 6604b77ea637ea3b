"""The negative log-likelihood around a point, to second order."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._boundary import boolean, warn
from .._curvature import Mode, matmul
from .._data import as_batch
from .._fit import distance_here
from .._minimum import (
    Distance,
    Local,
    Site,
    along,
    chi_squared_p_value,
    distance_of,
    endless,
    has_minimum,
    may_run_away,
    measure_spectrum,
    minimum_note,
    second_look,
    slope_note,
    surroundings,
    truth_p_values,
    what_falls,
)
from .._projection import ROUNDING, DenseWhitening
from .._step import (
    AbstractTrainer,
    DataKind,
    prior_count,
    priors_of,
    stripped,
    template_of,
)
from .._tree import as_parameters, by_path, widest
from .derivatives import ErrorKind, Passes, derive
from .elements import elements_of, held_elements, whitening_of_elements, with_held
from .laplace import Laplace, laplace
from .sandwich import few_text

# A distance from the minimum that is less probable than this is no accident.
NO_ACCIDENT = 1e-6

# Sums of squares below this may have lost digits.
_LEAST_SQUARES = 1e-290

# Squares of what is far off are infinite, and say so themselves.
_QUIET = np.errstate(over="ignore", invalid="ignore")


class Around(NamedTuple):
    """What one evaluation of the derivatives says of the surroundings of a point.

    - `whitening`: the map that whitens the parameters.
    - `deviance`: twice the negative log-likelihood of the data.
    - `norm`: its root, where the squares themselves may underflow; else `None`.
    - `data`: what `residuals` returned, `None` for an `nll`.
    - `data_count`: the number of data, `None` if it is not known.
    - `distance`: how far the point is from a minimum, `None` where there is none.
    - `held`: which elements are held at their bounds: they are not free.
    - `zero_count`: how many data have residuals of zero, whatever the parameters.
    - `fitted_count`: the number of directions that the data constrain, those that they
        share with priors in part.
    - `kind`: which matrix the errors come from.
    - `penalty`: twice the negative logarithm of the priors, `None` without any.
    - `truth_p_values`: how probable it is that the truth is as far from the minimum,
        with errors as they are said to be, and with errors of any scale.
    - `local`: the derivatives by which `distance` was found, if they are of what is
        fitted.
    - `is_of_few`: as of a `Sandwich`, of what is not held.
    """

    whitening: DenseWhitening
    deviance: float
    norm: float | None
    data: DataKind | None
    data_count: int | None
    distance: Distance | None
    held: Bool[np.ndarray, " D"]
    zero_count: int
    fitted_count: int | float
    kind: ErrorKind
    penalty: float | None
    truth_p_values: tuple[float, float]
    local: Local | None
    is_of_few: Any

    @property
    def chi_squared(self) -> float | None:
        """The deviance, where it has the distribution of a chi-squared."""
        if self.data is None or self.data.is_robust:
            return None
        return self.deviance

    @property
    def free_count(self) -> int:
        return int(np.count_nonzero(~self.held))

    @property
    def degrees_of_freedom(self) -> int | float | None:
        """The number of data less that of directions."""
        return None if self.data_count is None else self.data_count - self.fitted_count

    @property
    def reduced_chi_squared(self) -> float | None:
        """Chi-squared for each degree of freedom, if there is any."""
        degrees, chi_squared = self.degrees_of_freedom or 0, self.chi_squared
        return None if chi_squared is None or degrees <= 0 else chi_squared / degrees

    def error_scale(self, scale_errors: bool) -> float:
        """Returns the factor of errors whose scale is the scatter of the residuals."""
        if not boolean(scale_errors, "scale_errors"):
            return 1.0
        has_scale = self.data is not None and self.data.has_scale
        require_scatter(self.kind, self.penalty is not None, has_scale)
        if self.reduced_chi_squared is None:
            raise ValueError(NO_SCATTER)
        if self.data_count and may_be_masked(self.zero_count, self.data_count):
            warn(zeros_text(self.zero_count, self.data_count))
        if self.norm is None:
            return math.sqrt(self.reduced_chi_squared)
        return self.norm / math.sqrt(self.degrees_of_freedom or 1)

    def zeros_note(self) -> str | None:
        """Says that residuals may be of missing data, if chi-squared counts them."""
        zeros, count = self.zero_count, self.data_count
        # A count may be met exactly, and so are all data of a forecast.
        has_scale = self.data is not None and self.data.has_scale
        if has_scale or not (count and self.reduced_chi_squared):
            return None
        if not may_be_masked(zeros, count):
            return None
        harm = "reduced chi-squared is too small and the p-value too large"
        return zeros_text(zeros, count, harm=harm).removesuffix(".")

    def of_elements(self, trainer: AbstractTrainer) -> "OfElements":
        whitening = whitening_of_elements(trainer, self.whitening)
        known = np.asarray(whitening.errors_of_the_data(), float)
        # A bijection may leave an element one value: the ones of a correlation matrix.
        is_fixed = (known == 0) & (template_of(trainer).bijections is not None)
        is_held = held_elements(trainer, self.held) | is_fixed
        return OfElements(np.where(is_held, np.nan, known), whitening)


def require_scatter(kind: ErrorKind, has_priors: bool, has_scale: bool) -> None:
    """Refuses `scale_errors` if a scale is known, or taken from the scatter already."""
    if kind == "sandwich":
        raise ValueError(
            '`scale_errors` and `kind="sandwich"`, which robust losses have by '
            "default, both take the scale of the errors from the scatter of the "
            "data. Give one of them."
        )
    if has_priors:
        raise ValueError(
            "`scale_errors` would scale the widths of the `priors` too, which are "
            "known. Scale the residuals by their scatter, and leave it out."
        )
    if has_scale:
        raise ValueError(
            "`scale_errors` takes the scale of the errors from the scatter of the "
            "residuals, and the likelihoods of these data know their scale. Take "
            'the errors from the scatter of the data: `kind="sandwich"`.'
        )


NO_SCATTER = (
    "`scale_errors` takes the scale of the errors from the scatter of `residuals`, and "
    "there is none: define `residuals`, and give more data than free parameters. Or "
    "leave `scale_errors` out."
)


def may_be_masked(zeros: Any, data_count: Any) -> Any:
    """Whether residuals are zero more often than by accident, and not all of them."""
    return (zeros >= 2) & (100 * zeros >= data_count) & (zeros < data_count)


def zeros_text(
    zeros: int,
    data_count: int,
    where: str = "",
    harm: str = "reduced chi-squared and the errors of `scale_errors` are too small",
) -> str:
    """Says what residuals of zero do to a fit, and what helps."""
    return (
        f"{zeros} of {data_count} residuals{where} are exactly zero, whatever the "
        f"parameters, and count as data. If they stand for missing data, {harm}: let "
        "`residuals` return a likelihood with a mask, "
        "`vn.likelihoods.Gaussian(model, data, where=mask)`, or leave those data out. "
        "`report` can be told the number of data instead: `data_count=`."
    )


@jax.jit
def zeros_of(
    jacobian: Float[Array, "N D"], residuals: Float[Array, " N"], missing: Any
) -> Int[Array, ""]:
    """Counts the data with residuals of zero, whatever the parameters.

    Those of the `missing` ones are so too.
    """
    is_still = (residuals == 0) & ~jnp.any(jacobian != 0, axis=1)
    return jnp.count_nonzero(is_still) - missing


class OfElements(NamedTuple):
    """The standard errors of elements, NaN where one is not free, and their map."""

    errors: Float[np.ndarray, " E"]
    whitening: DenseWhitening

    def correlations(self) -> Float[np.ndarray, "F F"]:
        """Returns the correlations of the free elements."""
        free = np.flatnonzero(~np.isnan(self.errors))
        return self.whitening.correlations_of_the_data(self.errors)[np.ix_(free, free)]

    def by_path(self, trainer: AbstractTrainer) -> dict[str, np.ndarray]:
        leaves = by_path(elements_of(trainer)).by_name()
        ends = np.cumsum([leaf.size for leaf in leaves.values()])
        pieces = np.split(self.errors, ends[:-1])
        pairs = zip(leaves.items(), pieces, strict=True)
        return {path: piece.reshape(leaf.shape) for (path, leaf), piece in pairs}


def around(
    trainer: AbstractTrainer,
    batch: Any,
    what: str,
    jac: Mode | None = None,
    kind: ErrorKind | None = None,
) -> Around:
    """Evaluates the derivatives at the current point, by the program of `whiten`.

    Priors are in the curvature, and not in the deviance, which is that of the data.
    """
    return expanded(trainer, batch, laplace(trainer, batch, what, jac, kind))


@_QUIET
def seen_again(trainer: AbstractTrainer, batch: Any, here: Around) -> Around:
    """Looks again at a point that only seems to be no minimum, or to be one."""
    if here.distance is None or here.local is None:
        return here
    distance, falls = here.distance, what_falls(trainer)
    site = Site(stripped(trainer), as_batch(batch), falls)
    # The derivatives of an `nll` are those of a `second_look` already.
    if falls == "residuals" or distance.is_steep or distance.is_flat:
        distance = second_look(site, here.local, distance)
    return here._replace(distance=endless(site, here.local, distance))


def penalty_of(trainer: AbstractTrainer) -> float | None:
    """Returns twice the negative logarithm of the priors, `None` without any."""
    priors = priors_of(trainer)
    return None if priors is None else 2 * float(priors.penalty(trainer.model))


@_QUIET
def expanded(trainer: AbstractTrainer, batch: Any, here: Laplace) -> Around:
    derived, priors = here.derived, priors_of(trainer)
    (distance, local), whitening = _distance(trainer, batch, here), here.whitening
    penalty = penalty_of(trainer)
    of_priors, data_count, zero_count, squares, norm = None, None, 0, None, None
    if derived.data is None:
        deviance = 2 * float(derived.value) - (penalty or 0.0)
        if priors is not None:
            # Free of the curvature of bijections, which a Hessian of the data has.
            found = derive(trainer, batch, "priors", None, Passes(), holds=True)
            of_priors = found.found[0]
    else:
        of_each = np.square(np.asarray(derived.deviances, float))
        rows, data_count = prior_count(trainer), int(derived.data.size)
        of_data = of_each[: of_each.size - rows]
        deviance = float(of_data.sum())
        if deviance < _LEAST_SQUARES:
            # Unlike a sum of squares, it does not underflow.
            norm = math.hypot(*np.asarray(derived.deviances, float)[: of_data.size])
        of_priors = derived.found[0][-rows:] if rows else None
        if not of_data.all():
            own = derived.found[0][: of_data.size], derived.deviances[: of_data.size]
            zero_count = int(zeros_of(*own, of_data.size - data_count))
        if not derived.data.has_scale:
            # Missing data have residuals of zero.
            squares = float(of_each.sum()), int(np.count_nonzero(of_each))
    p_values = 1.0, 1.0
    if distance is not None:
        rank = int(np.count_nonzero(np.asarray(whitening.roots) > 0))
        p_values = truth_p_values(distance, rank, squares)
    if (held := np.asarray(derived.held)).any():
        # Neither a draw nor a propagated error moves what is held.
        whitening = with_held(whitening, held)
    return Around(
        whitening=whitening,
        deviance=deviance,
        norm=norm,
        data=derived.data,
        data_count=data_count,
        distance=distance,
        held=held,
        zero_count=zero_count,
        fitted_count=_fitted_count(here.expected, of_priors),
        kind=here.kind,
        penalty=penalty,
        truth_p_values=p_values,
        local=local,
        is_of_few=np.asarray(here.is_of_few) & ~held,
    )


def _distance(
    trainer: AbstractTrainer, batch: Any, here: Laplace
) -> tuple[Distance | None, Local | None]:
    """Returns the distance to the minimum of what is fitted, `None` without one.

    And the derivatives that it comes from, if they are of what is fitted.
    """
    falls, derived = what_falls(trainer), here.derived
    # A loss with a penalty has no known scale.
    if falls == "loss" or not has_minimum(trainer):
        return None, None
    if falls != ("nll" if derived.data is None else "residuals"):
        return distance_here(trainer, batch, falls), None
    # On the host, where nothing is compiled.
    at = derived.held, as_parameters(trainer.params), trainer.projector
    if derived.data is None:
        hessian, gradient = derived.found[0]
        curved = surroundings(derived.value, gradient, hessian, *at)
        return distance_of(curved), curved
    assert here.reduced is not None
    squares = np.square(np.asarray(derived.deviances, float)).sum()
    size = int(derived.data.size) + prior_count(trainer)
    local = measure_spectrum(*here.reduced, np.asarray(squares), size, *at)
    return distance_of(local), local


def may_mislead(trainer: AbstractTrainer, here: Laplace) -> bool:
    """Whether a point may be far from a minimum, or have none: it is worth a look.

    By the whitening that is there. That of a sandwich is of another curvature.
    """
    if here.kind == "sandwich":
        return True
    fall = possible_fall(here.whitening, *here.slope)
    # What is not known is looked at.
    if not fall.truth_p_value > NO_ACCIDENT:
        return True
    return _may_be_endless(trainer, here.whitening, fall.chi_squared)


def _may_be_endless(
    trainer: AbstractTrainer, whitening: DenseWhitening, fall: Any
) -> bool:
    """Whether finite errors may be of a minimum at infinity, `fall` of chi-squared."""
    leaves = map(np.asarray, jax.tree.leaves(trainer.params))  # compiles nothing
    sizes = abs(np.concatenate([leaf.ravel().astype(float) for leaf in leaves]))
    bars = whitening.errors_of_the_data()
    return may_run_away(np.asarray(fall, float), bars, sizes)


class Fall(NamedTuple):
    """How far chi-squared could fall, and along how many directions."""

    chi_squared: Float[Array, "..."]
    directions: Int[Array, "..."]

    @property
    def truth_p_value(self) -> Any:
        """How probable it is that the truth is as far, NaN where it is not known."""
        return chi_squared_p_value(*map(np.asarray, self))


@jax.jit
def possible_fall(
    whitening: DenseWhitening, gradient: Float[Array, " D"], unit: Any
) -> Fall:
    r"""Computes $g^\top P P^\top g$ from a gradient in units of the parameters."""
    # Residuals may be of another precision than the parameters.
    dtype = widest((whitening.dtype, gradient.dtype))
    parts = whitening.scale, unit, gradient, whitening.vectors, whitening.roots
    scale, unit, gradient, vectors, roots = (jnp.asarray(x, dtype) for x in parts)
    along = matmul(scale / unit * gradient, vectors)
    chi_squared = jnp.sum(jnp.square(along * jnp.maximum(roots, 0)))
    return Fall(chi_squared, jnp.count_nonzero(whitening.roots > 0))


def how_far(trainer: AbstractTrainer, here: Around, scale_errors: bool) -> str | None:
    """Says how far the minimum is, `None` if the truth of the data could be as far.

    Errors are forecast at the truth of simulated data, which has its own distance.
    """
    known, any_scale = here.truth_p_values
    p_value = any_scale if scale_errors else max(known, any_scale)
    if here.distance is None or not p_value <= NO_ACCIDENT:
        return None
    where = along(np.asarray(here.distance.direction, float), trainer.params)
    return (
        "far from the minimum: what is fitted could fall by about "
        f"{here.distance.edm:.3g} (edm){where}. Not even the truth would be so far "
        f"from it (p < {NO_ACCIDENT}). Unless the model is linear, the errors are not "
        "those of a fit."
    )


def warn_if_misleading(
    trainer: AbstractTrainer, batch: Any, here: Around, name: str, scale_errors: bool
) -> None:
    """Warns that `name` is asked for farther from the minimum than the truth is.

    Or where there is no minimum, or hardly any slope, in the words of a table.
    """
    if far := how_far(trainer, here, scale_errors):
        warn(
            f"`{name}` is asked for {far} Fit first: "
            f"`trainer.solve(solver, batch).trainer.{name}(...)`."
        )
        return
    if (distance := here.distance) is None:
        return
    # Infinite errors say themselves that there is none.
    is_odd = _may_be_endless(trainer, here.whitening, 2 * distance.edm)
    if is_odd or distance.is_saddle or distance.is_steep:
        distance = seen_again(trainer, batch, here).distance or distance
    if distance.is_lost:
        warn(f"`{name}`: {minimum_note(distance, trainer.params)}.")
    elif here.kind == "expected" and (note := slope_note(distance, trainer.params)):
        warn(f"`{name}`: {note}.")


def warn_if_of_few(
    trainer: AbstractTrainer, here: Around, name: str, where: str = ""
) -> None:
    """Warns that `name` has errors of too few data; `where` says which they are."""
    if few := few_text(here.is_of_few, trainer.params, where):
        warn(f"`{name}`: {few}.")


def _fitted_count(
    whitening: DenseWhitening, of_priors: Float[Array, "rows D"] | None
) -> int | float:
    r"""Returns $\mathrm{tr}\, F_d (F_d + F_p)^+$, an integer without priors.

    With the map $P$ that whitens the sum, and the Jacobian $R$ of the rows of priors,
    it is the rank less the shares of the priors, the eigenvalues of
    $R P P^\top R^\top$, which have no units.
    """
    rank = int(np.count_nonzero(np.asarray(whitening.roots) > 0))
    if of_priors is None:
        return rank
    parts = of_priors, whitening.scale, whitening.vectors, whitening.roots
    rows, scale, vectors, roots = (np.asarray(part, float) for part in parts)
    latent = rows * scale @ (vectors * np.maximum(roots, 0))
    shares = np.linalg.eigvalsh(latent @ latent.T)
    # What the data do not see at all takes no degree of freedom, whatever the rounding.
    nearest = np.round(shares)
    noise = max(len(scale), ROUNDING) * float(jnp.finfo(whitening.dtype).eps)
    shares = np.where(abs(shares - nearest) < noise, nearest, shares)
    # If a likelihood curves downwards, priors alone hold the direction.
    return float(rank - np.minimum(shares, 1).sum())

"""The negative log-likelihood around a point, to second order."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from .._boundary import boolean
from .._curvature import Mode
from .._fit import distance_here
from .._minimum import (
    Distance,
    distance_of,
    has_minimum,
    measure_hessian,
    spectral_distance,
    what_falls,
)
from .._projection import DenseWhitening, NullPolicy
from .._step import AbstractTrainer, defined, prior_count, priors_of, template_of
from .._tree import as_parameters, by_path
from .derivatives import Passes, derive, require_finite
from .elements import elements_of, held_elements, whitening_of_elements
from .fisher import require_likelihood
from .whiten import checked_spectra, hessian_rtol, of_hessian, of_spectrum, reduced

# Directions that the data do not constrain are kept, and marked.
_NULLS = NullPolicy(on_null="prior")


class Around(NamedTuple):
    """What one evaluation of the derivatives says of the surroundings of a point.

    - `whitening`: the map that whitens the parameters.
    - `deviance`: twice the negative log-likelihood; of residuals, their chi-squared.
    - `has_residuals`: whether it is that of residuals.
    - `data_count`: the number of data, `None` if it is not known.
    - `distance`: how far the point is from a minimum, `None` where there is none.
    - `held`: which elements are held at their bounds: they are not free.
    - `rank`: the number of directions that the data constrain.
    - `has_priors`: whether there is more than the data.
    """

    whitening: DenseWhitening
    deviance: float
    has_residuals: bool
    data_count: int | None
    distance: Distance | None
    held: Bool[np.ndarray, " D"]
    rank: int
    has_priors: bool

    @property
    def free_count(self) -> int:
        """The number of elements that are free."""
        return int(np.count_nonzero(~self.held))

    @property
    def degrees_of_freedom(self) -> int | None:
        """The number of data less that of directions."""
        return None if self.data_count is None else self.data_count - self.rank

    @property
    def reduced_chi_squared(self) -> float | None:
        """Chi-squared for each degree of freedom, if there is any."""
        degrees = self.degrees_of_freedom or 0
        return self.deviance / degrees if self.has_residuals and degrees > 0 else None

    def error_scale(self, scale_errors: bool) -> float:
        """Returns the factor of errors whose scale is the scatter of the residuals."""
        if not boolean(scale_errors, "scale_errors"):
            return 1.0
        if self.has_priors:
            raise ValueError(
                "`scale_errors` would scale the widths of the `priors` too, which are "
                "known. Scale the residuals by their scatter, and leave it out."
            )
        if self.reduced_chi_squared is None:
            raise ValueError(
                "`scale_errors` takes the scale of the errors from the scatter of "
                "`residuals`, and there is none: define `residuals`, and give more "
                "data than free parameters. Or leave `scale_errors` out."
            )
        return math.sqrt(self.reduced_chi_squared)

    def correlations(self, trainer: AbstractTrainer) -> Float[np.ndarray, "F F"]:
        """Returns the correlations of the free elements."""
        free = np.flatnonzero(~np.isnan(self._flat_errors(trainer)))
        whitening = whitening_of_elements(trainer, self.whitening)
        return whitening.correlations_of_the_data()[np.ix_(free, free)]

    def _flat_errors(self, trainer: AbstractTrainer) -> Float[np.ndarray, " E"]:
        whitening = whitening_of_elements(trainer, self.whitening)
        known = np.asarray(whitening.errors_of_the_data(), float)
        # A bijection may leave an element one value: the ones of a correlation matrix.
        is_fixed = (known == 0) & (template_of(trainer).bijections is not None)
        return np.where(held_elements(trainer, self.held) | is_fixed, np.nan, known)

    def errors(self, trainer: AbstractTrainer, scale: float) -> dict[str, np.ndarray]:
        """Returns the standard errors by path, NaN for elements that are not free."""
        leaves = by_path(elements_of(trainer)).by_name()
        flat = scale * self._flat_errors(trainer)
        ends = np.cumsum([leaf.size for leaf in leaves.values()])
        pieces = np.split(flat, ends[:-1])
        pairs = zip(leaves.items(), pieces, strict=True)
        return {path: piece.reshape(leaf.shape) for (path, leaf), piece in pairs}


def around(trainer: AbstractTrainer, batch: Any, jac: Mode | None, what: str) -> Around:
    """Evaluates the derivatives at the current point, by the program of `whiten`.

    Priors are in the curvature, and not in the deviance, which is that of the data.
    """
    require_likelihood(trainer, what)
    of = _of_residuals if "residuals" in defined(trainer) else _of_nll
    found = of(trainer, batch, jac)
    if not found.held.any():
        return found
    # Neither a draw nor a propagated error moves what is held.
    scale = jnp.where(found.held, 0, found.whitening.scale)
    whitening = eqx.tree_at(lambda w: w.scale, found.whitening, scale)
    return found._replace(whitening=whitening)


def _of_residuals(trainer: AbstractTrainer, batch: Any, jac: Mode | None) -> Around:
    found = derive(trainer, batch, "jacobian", None, Passes(jac=jac), holds=True)
    (jacobian,), is_finite, residuals, held = found
    spectrum, slope, squares = reduced(jacobian, residuals)
    (spectrum,), eps = checked_spectra(trainer, batch, (spectrum,), is_finite)
    params = as_parameters(trainer.params)
    whitening = of_spectrum(spectrum, params, _NULLS, "", eps)

    def distance() -> Distance:
        parts = spectrum, slope, squares, residuals.size, held
        return spectral_distance(*parts, params, trainer.projector)

    away, of_data = _distance(trainer, batch, "residuals", distance), whitening
    data = np.asarray(residuals, float).ravel()[: residuals.size - prior_count(trainer)]
    if data.size < residuals.size:
        # Directions that a prior alone constrains take no degree of freedom.
        own = reduced(jacobian[: data.size], residuals[: data.size]).spectrum
        of_data = of_spectrum(own, params, _NULLS, "", eps)
    return Around(
        whitening=whitening,
        deviance=float(np.sum(np.square(data))),
        has_residuals=True,
        data_count=data.size,
        distance=away,
        held=np.asarray(held),
        rank=_rank(of_data),
        has_priors=data.size < residuals.size,
    )


def _rank(whitening: DenseWhitening) -> int:
    """Counts the directions that are constrained."""
    return int(np.count_nonzero(np.asarray(whitening.roots) > 0))


def _of_nll(trainer: AbstractTrainer, batch: Any, jac: Mode | None) -> Around:
    found = derive(trainer, batch, "nll", None, Passes(jac=jac), holds=True)
    (expansion,), is_finite, value, held = found
    hessian = expansion.hessian
    what = "The curvature of `nll`"
    require_finite((hessian,), is_finite, what, trainer, batch)
    params = as_parameters(trainer.params)
    rtol = hessian_rtol((hessian,))
    whitening = of_hessian(hessian, params, _NULLS, "", "nll", rtol)

    def distance() -> Distance:
        args = value, expansion.gradient, hessian, held, params, trainer.projector
        return distance_of(measure_hessian(*args))

    priors = priors_of(trainer)
    penalty = 0.0 if priors is None else float(priors.penalty(trainer.model))
    return Around(
        whitening=whitening,
        deviance=2 * (float(value) - penalty),
        has_residuals=False,
        data_count=None,
        distance=_distance(trainer, batch, "nll", distance),
        held=np.asarray(held),
        rank=_rank(whitening),
        has_priors=priors is not None,
    )


def _distance(
    trainer: AbstractTrainer, batch: Any, kind: str, known: Any
) -> Distance | None:
    """Returns the distance to the minimum of what is fitted, `None` without one."""
    falls = what_falls(trainer)
    # A loss with a penalty has no known scale.
    if falls == "loss" or not has_minimum(trainer):
        return None
    return known() if falls == kind else distance_here(trainer, batch, falls)

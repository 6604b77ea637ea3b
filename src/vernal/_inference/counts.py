"""The deviance to expect of data of which some are counts."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._data import as_batch
from .._likelihoods import AbstractLikelihood, Moments, Poisson
from .._program import program
from .._step import AbstractTrainer, count_of, residual_terms, step_key, stripped
from .expansion import Around
from .laplace import Laplace

# Of counts, for each direction that they constrain, for expansions in their scatter.
_LEAST_COUNTS = 5


class OfCounts(NamedTuple):
    """What is known of data of which some are counts, before they are fitted.

    - `mean`, `variance`: those of the deviance, if the model is right.
    - `rate`, `covariance`, `curvature`: for each row, the latter two as in `Moments`;
        zero for other data.
    - `fractions`: how many counts are not whole numbers; `counts`: of how many.
    """

    mean: float
    variance: float
    rate: Float[np.ndarray, " N"]
    covariance: Float[np.ndarray, " N"]
    curvature: Float[np.ndarray, " N"]
    fractions: int
    counts: int

    def note(self) -> str | None:
        """Says which data are no counts, `None` if all are."""
        if not self.fractions:
            return None
        return (
            f"{self.fractions} of {self.counts} data of `Poisson` are not whole "
            "numbers, as counts are: the errors and the p-value are not those of "
            "rates, nor of counts less a background. Fit the counts themselves, with "
            "the exposure and the background in the model"
        )


def of_counts(trainer: AbstractTrainer, batch: Any) -> OfCounts | None:
    """Evaluates the moments of the deviance, `None` if no data are counts.

    That of the others is a chi-squared, with a degree of freedom for each datum.
    """
    found, fractions, counts = [], 0, 0
    for term, size, rows in _terms(stripped(trainer), as_batch(batch)):
        number, rate, zeros = np.asarray(size), np.zeros(rows), np.zeros(rows)
        moments = Moments(number, 2 * number, zeros, zeros)
        if isinstance(term, Poisson):
            moments, data = term.deviance_moments(), np.asarray(term.counts)
            rate = np.asarray(term.rate, float) * (moments.mean > 0)
            fractions += int(np.count_nonzero(data != np.round(data)))
            counts += int(size)
        found.append((moments.mean, moments.variance, rate, *moments[2:]))
    if not counts:
        return None
    columns = zip(*found, strict=True)
    joined = [np.concatenate([*map(np.ravel, column)]) for column in columns]
    mean, variance, rate, covariance, curvature = joined
    return OfCounts(
        mean=float(mean.sum()),
        variance=float(variance.sum()),
        rate=rate,
        covariance=covariance,
        curvature=curvature,
        fractions=fractions,
        counts=counts,
    )


@program
def _terms(trainer: AbstractTrainer, batch: Any) -> list[tuple[Any, Any, Any]]:
    """Returns each likelihood or array, with its numbers of data and of rows."""
    terms = residual_terms(trainer, batch, step_key(trainer))
    return [(term, count_of(term), _row_count(term)) for term in terms]


def _row_count(term: Any) -> int:
    is_likelihood = isinstance(term, AbstractLikelihood)
    residuals = term.scoring_residuals() if is_likelihood else term
    return residuals.size * (2 if jnp.iscomplexobj(residuals) else 1)


def expected_deviance(
    data: OfCounts, fit: Laplace, here: Around
) -> tuple[float, float] | None:
    r"""Returns the mean and the standard deviation of the deviance of a fit.

    With the covariance $c$ of the deviance with the scoring residuals, their Jacobian
    $K$, the Fisher matrix $F$, that of priors included, and $A = K F^+ K^\top$: the
    deviance itself falls by one for each direction that the data constrain, and its
    mean $m$ is that at fitted rates, which scatter by $A_{ii} \mu_i$; so the mean is

    $$\sum_i m_i - k - \tfrac12 \sum_i A_{ii}\, \mu_i m_i''.$$

    From the variance a fit takes what the deviance shares with the slopes of the
    likelihood, $c^\top (2 A - A^2) c$; without priors $A^2 = A$. Both are the leading
    terms in the scatter of the parameters. See McCullagh, *The conditional distribution
    of goodness-of-fit statistics for discrete data*, Journal of the American
    Statistical Association 81 (1986), 104. There are none if there are hardly more
    counts than directions that they constrain.
    """
    assert here.data_count is not None
    jacobian = np.asarray(fit.derived.found[0], float)[: data.covariance.size]
    parts = fit.expected.scale, fit.expected.vectors, fit.expected.roots
    scale, vectors, roots = (np.asarray(part, float) for part in parts)
    latent = jacobian @ (scale[:, None] * vectors * np.maximum(roots, 0))
    scatter = np.square(latent).sum(axis=1)
    if data.rate.sum() < _LEAST_COUNTS * scatter[data.rate > 0].sum():
        return None
    slopes = data.covariance @ latent
    taken = float(2 * slopes @ slopes - np.square(latent @ slopes).sum())
    share = 1 - here.fitted_count / here.data_count
    variance = max(data.variance - taken, 0) * share
    of_rates = 0.5 * float(scatter @ data.curvature)
    mean = data.mean - here.fitted_count - of_rates
    return (mean, math.sqrt(variance)) if mean > 0 and variance > 0 else None

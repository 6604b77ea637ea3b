"""The deviance to expect of data of which some are counts."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._data import as_batch
from .._likelihoods import (
    AbstractLikelihood,
    Gaussian,
    Moments,
    Poisson,
    normal_moments,
)
from .._program import program
from .._step import AbstractTrainer, count_of, residual_terms, step_key, stripped
from .expansion import Around
from .laplace import Laplace

# Of counts, for each direction that they constrain, for expansions in their scatter.
_LEAST_COUNTS = 5


class OfCounts(NamedTuple):
    """What is known of data of which some are counts, before they are fitted.

    - `rate`: that of each row, zero for other data.
    - `moments`: those of each row, if the model is right.
    - `fractions`: how many counts are not whole numbers; `counts`: of how many.
    """

    rate: Float[np.ndarray, " N"]
    moments: Moments
    fractions: int
    counts: int

    def note(self, is_sandwich: bool, is_few: bool) -> str | None:
        """Says which data are no counts, or that they are too few for a p-value."""
        if self.fractions and not is_sandwich:
            return (
                f"{self.fractions} of {self.counts} data of `Poisson` are not whole "
                "numbers: these errors hold for counts, not for rates, or for counts "
                "less a background. Fit the counts themselves, with the exposure and "
                "the background in the model"
            )
        if self.fractions or not is_few:
            return None
        return (
            f"there are fewer than {_LEAST_COUNTS} counts for each parameter: the "
            "deviance has no known distribution, and no p-value"
        )


def of_counts(trainer: AbstractTrainer, batch: Any) -> OfCounts | None:
    """Evaluates the moments of the deviance, `None` if no data are counts."""
    found, fractions, counts = [], 0, 0
    for term, size, rows in _terms(stripped(trainer), as_batch(batch)):
        present = _present(term, int(size), int(rows))
        rate, moments = np.zeros(int(rows)), normal_moments(present)
        if isinstance(term, Poisson):
            moments, data = term.deviance_moments(), np.asarray(term.counts)
            rate = np.asarray(term.rate, float).ravel() * (moments.mean > 0)
            fractions += int(np.count_nonzero(data != np.round(data)))
            counts += int(size)
        found.append((rate, *moments))
    if not counts:
        return None
    columns = zip(*found, strict=True)
    rate, *moments = (np.concatenate(column, axis=-1) for column in columns)
    return OfCounts(rate, Moments(*moments), fractions, counts)


@program
def _terms(trainer: AbstractTrainer, batch: Any) -> list[tuple[Any, Any, Any]]:
    """Returns each likelihood or array, with its numbers of data and of rows."""
    terms = residual_terms(trainer, batch, step_key(trainer))
    return [(term, count_of(term), _row_count(term)) for term in terms]


def _present(term: Any, size: int, rows: int) -> Float[np.ndarray, " rows"]:
    """Returns one for each row of data, zero for what is missing."""
    if not isinstance(term, Gaussian) or term.where is None:
        return np.full(rows, size / rows)
    where = np.ravel(term.where).astype(float)
    # The real parts, then the imaginary ones.
    return np.tile(where, rows // where.size)


def _row_count(term: Any) -> int:
    is_likelihood = isinstance(term, AbstractLikelihood)
    residuals = term.scoring_residuals() if is_likelihood else term
    return residuals.size * (2 if jnp.iscomplexobj(residuals) else 1)


class Expected(NamedTuple):
    """The distribution of the deviance of a fit, if the model is right."""

    mean: float
    std: float
    skewness: float

    def p_value(self, deviance: float) -> float:
        """Returns the probability of a larger one, by Pearson's third distribution.

        That is a gamma distribution which is shifted: of normal data, chi-squared.
        """
        from scipy.stats import pearson3

        return float(pearson3.sf(deviance, self.skewness, self.mean, self.std))


def expected_deviance(data: OfCounts, fit: Laplace, here: Around) -> Expected | None:
    r"""Finds the distribution of the deviance of a fit, by its first three moments.

    With the covariance $c$ of the deviance with the scoring residuals $z$, their
    Jacobian $K$, the Fisher matrix $F$, that of priors included, and $A = K F^+
    K^\top$: the deviance itself falls by one for each direction that the data
    constrain, and its mean $m$ is that at fitted rates, which scatter by $A_{ii}
    \mu_i$; so the mean is

    $$\sum_i m_i - k - \tfrac12 \sum_i A_{ii}\, \mu_i m_i''.$$

    The others are those of $\sum_i d_i - m_i - a_i z_i$ with $a = A c$, since a fit
    takes what the deviance shares with the slopes of the likelihood; of each datum the
    fit leaves the share $1 - A_{ii}$. These are the leading terms in the scatter of
    the parameters. See McCullagh, *The conditional distribution of goodness-of-fit
    statistics for discrete data*, Journal of the American Statistical Association 81
    (1986), 104. There is none if there are hardly more counts than directions that they
    constrain, if some are not whole numbers, or if the fit leaves no scatter.
    """
    moments = data.moments
    jacobian = np.asarray(fit.derived.found[0], float)[: data.rate.size]
    parts = fit.expected.scale, fit.expected.vectors, fit.expected.roots
    scale, vectors, roots = (np.asarray(part, float) for part in parts)
    latent = jacobian @ (scale[:, None] * vectors * np.maximum(roots, 0))
    scatter = np.square(latent).sum(axis=1)
    is_few = data.rate.sum() < _LEAST_COUNTS * scatter[data.rate > 0].sum()
    if data.fractions or is_few:
        return None
    taken = latent @ (moments.covariance @ latent)
    share = np.maximum(1 - scatter, 0)
    of_rates = 0.5 * scatter @ moments.curvature
    mean = moments.mean.sum() - here.fitted_count - of_rates
    second = moments.variance - 2 * taken * moments.covariance + taken**2
    weights = np.stack([taken**0, -3 * taken, 3 * taken**2, -(taken**3)])
    variance, third = share @ second, share @ (weights * moments.cubes).sum(axis=0)
    if not (mean > 0 and variance > 0):
        return None
    return Expected(float(mean), math.sqrt(variance), float(third / variance**1.5))

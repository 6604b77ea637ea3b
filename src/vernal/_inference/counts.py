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
# Rounding may take something from exactly so many.
_LEAST_COUNTS = 5 * (1 - 1e-3)

# A deviance that single counts move more than this is no smooth one: of simulations of
# such data, p-values by its moments are off by half.
_MOST_JUMPS = 1.5

# A datum with a larger rate has so many values that its jumps are small beside them.
_SPARSE = 1.0

# A fit of fewer directions than this leaves the rates as they are known.
_NO_DIRECTION = 0.01

# Fewer counts than this, of known rates, are simulated: so many times for each sum.
_SIMULATED_COUNTS, _SIMULATIONS = 10, 2_000


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
            "there are too few counts: the deviance has no known distribution, and no "
            "p-value"
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
    """The distribution of the deviance of a fit, if the model is right.

    - `jumps`: how much single counts of sparse data move it, beside its scatter.
    - `rate`: that of each count, if they are few, and their rates not fitted to them.
    """

    mean: float
    std: float
    skewness: float
    jumps: float
    rate: Float[np.ndarray, " N"] | None

    def p_value(self, deviance: float) -> float | None:
        """Returns the probability of a larger one, by Pearson's third distribution.

        That is a gamma distribution which is shifted: of normal data, chi-squared. A
        deviance that has few values is no such one. Of few counts of known rates it is
        simulated; else its p-value is not known.
        """
        from scipy.stats import pearson3

        if self.rate is not None:
            return _simulated_p_value(self.rate, deviance)
        if self.jumps > _MOST_JUMPS:
            return None
        return float(pearson3.sf(deviance, self.skewness, self.mean, self.std))


def _simulated_p_value(rate: Float[np.ndarray, " N"], deviance: float) -> float:
    """Simulates each sum of counts in turn, so that small p-values have digits too."""
    from scipy.special import xlogy
    from scipy.stats import poisson

    total, rng, found = rate.sum(), np.random.default_rng(0), 0.0
    for size in range(int(poisson.isf(1e-9, total)) + 2):
        shape = _SIMULATIONS, size
        rows = np.sort(rng.choice(rate.size, shape, p=rate / total), axis=1)
        # The second count of a row adds 2 log 2 - 1 log 1 to a sum of n log n.
        order = np.arange(size)
        first = np.where(np.diff(rows, prepend=-1, axis=1) > 0, order, 0)
        nth = order - np.maximum.accumulate(first, axis=1) + 1
        gained = xlogy(nth, nth) - xlogy(nth - 1, nth - 1) - np.log(rate[rows])
        own = 2 * (total - size + gained.sum(axis=1))
        # Equal ones have digits of float32.
        chance = np.mean(own >= deviance - 1e-5 * abs(deviance))
        found += float(poisson.pmf(size, total) * chance)
    return min(found, 1.0)


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

    It has few values if single counts move it by as much as it scatters, as the few
    bins with two counts do in sparse data, of rates $\mu_i$ below one. One more count
    of a datum moves its part by $\Delta_i$, and the measure is $\sum_i \mu_i \langle
    \Delta_i^4 \rangle$ over these, in units of the squared variance. See Last, Peccati
    and Schulte, *Normal approximation on Poisson spaces*, Probability Theory and
    Related Fields 165 (2016), 667.
    """
    moments = data.moments
    jacobian = np.asarray(fit.derived.found[0], float)[: data.rate.size]
    parts = fit.expected.scale, fit.expected.vectors, fit.expected.roots
    scale, vectors, roots = (np.asarray(part, float) for part in parts)
    latent = jacobian @ (scale[:, None] * vectors * np.maximum(roots, 0))
    scatter = np.square(latent).sum(axis=1)
    constrained = scatter[data.rate > 0].sum()
    if data.fractions or data.rate.sum() < _LEAST_COUNTS * constrained:
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
    is_known = data.counts == here.data_count and constrained < _NO_DIRECTION
    rate = data.rate if is_known and data.rate.sum() < _SIMULATED_COUNTS else None
    is_sparse = data.rate < _SPARSE
    jumps = (share * is_sparse) @ _jumps(data, taken) / variance**2
    shape = float(third / variance**1.5), float(jumps)
    return Expected(float(mean), math.sqrt(variance), *shape, rate)


def _jumps(data: OfCounts, taken: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Returns the fourth powers of what one more count changes, times its rate."""
    root = np.sqrt(data.rate)
    own = -taken / np.where(root > 0, root, 1)
    powers = np.stack([data.rate, *data.moments.jumps])
    weights = np.stack([math.comb(4, j) * own ** (4 - j) for j in range(5)])
    return (weights * powers).sum(axis=0)

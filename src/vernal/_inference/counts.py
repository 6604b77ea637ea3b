"""The mean and the variance of a deviance, of which a part may be that of counts."""

from typing import Any

from .._data import as_batch
from .._likelihoods import Poisson
from .._program import program
from .._step import AbstractTrainer, count_of, residual_terms, step_key, stripped


def deviance_moments(trainer: AbstractTrainer, batch: Any) -> tuple[float, float]:
    """Returns the mean and the variance of the deviance of data, some of them counts.

    That of all others is a chi-squared, with one degree of freedom for each datum.
    """
    mean, variance = 0.0, 0.0
    for term, size in _terms_and_sizes(stripped(trainer), as_batch(batch)):
        own = float(size), 2 * float(size)
        if isinstance(term, Poisson):
            own = term.deviance_moments()
        mean, variance = mean + own[0], variance + own[1]
    return mean, variance


@program
def _terms_and_sizes(trainer: AbstractTrainer, batch: Any) -> list[tuple[Any, Any]]:
    terms = residual_terms(trainer, batch, step_key(trainer))
    return [(term, count_of(term)) for term in terms]

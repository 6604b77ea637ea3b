"""The deviance of counts: where they are few, chi-squared is not its distribution."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float

# Beyond the largest rate the two are series. Below the least one the rate is too small
# to have a count.
_LEAST, _LARGEST, _COUNT = 1e-6, 300.0, 512


def deviance_moments(rate: Any) -> tuple[float, float]:
    r"""Returns the mean and the variance of the deviance of counts with these rates.

    That of one count $n$ is $2 (\mu - n + n \log(n / \mu))$, summed over the
    distribution of $n$; for large rates the series in $1 / \mu$. See Kaastra, *On the
    use of C-stat in testing models for X-ray spectra*, Astronomy & Astrophysics 605
    (2017), A51.
    """
    rate = np.ravel(np.asarray(rate, float))
    logs, means, variances = _table()
    at = np.log(np.clip(rate, _LEAST, _LARGEST))
    large = np.maximum(rate, _LARGEST)
    is_few = rate < _LARGEST
    mean = np.where(is_few, np.interp(at, logs, means), 1 + 1 / (6 * large))
    variance = np.where(is_few, np.interp(at, logs, variances), 2 + 2 / (3 * large))
    return float(mean.sum()), float(variance.sum())


@functools.cache
def _table() -> tuple[Float[np.ndarray, " K"], ...]:
    """Sums over all counts, for rates in equal steps of their logarithm."""
    from scipy.special import gammaln, xlogy

    logs = np.linspace(np.log(_LEAST), np.log(_LARGEST), _COUNT)
    rate, n = np.exp(logs)[:, None], np.arange(600.0)
    chance = np.exp(xlogy(n, rate) - rate - gammaln(n + 1))
    deviance = 2 * (rate - n + xlogy(n, n / rate))
    mean = np.sum(chance * deviance, axis=1)
    return logs, mean, np.sum(chance * (deviance - mean[:, None]) ** 2, axis=1)

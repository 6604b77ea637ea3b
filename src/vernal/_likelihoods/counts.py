"""The deviance of counts: where they are few, chi-squared is not its distribution."""

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

# Above the largest rate these are series. Below the least one there is never a count.
_LEAST, _LARGEST, _STEPS = 1e-12, 300.0, 1024


class Moments(NamedTuple):
    r"""Of the deviance of each datum.

    - `mean`, `variance`: its mean $m$, and its variance.
    - `covariance`: that with Pearson's residual of the same datum.
    - `curvature`: $\mu\, d^2 m / d \mu^2$, with the rate $\mu$.
    """

    mean: Float[np.ndarray, "*N"]
    variance: Float[np.ndarray, "*N"]
    covariance: Float[np.ndarray, "*N"]
    curvature: Float[np.ndarray, "*N"]


def deviance_moments(rate: Any) -> Moments:
    r"""Returns the moments of the deviance of one count for each of these rates.

    It is $2 (\mu - n + n \log(n / \mu))$, and the moments are sums over the
    distribution of $n$; for large rates they are series in $1 / \mu$. See Kaastra, *On
    the use of C-stat in testing models for X-ray spectra*, Astronomy & Astrophysics 605
    (2017), A51. The covariance is $\sqrt \mu$ times the derivative of the mean.
    """
    rate = np.asarray(rate, float)
    large = np.maximum(rate, _LARGEST)
    series = Moments(
        mean=1 + 1 / (6 * large),
        variance=2 + 2 / (3 * large),
        covariance=-1 / (6 * large**1.5),
        curvature=1 / (3 * large**2),
    )
    logs, table = _table()
    at = np.log(np.clip(rate, _LEAST, _LARGEST))
    few = [np.interp(at, logs, column) for column in table]
    is_few, is_tiny = rate < _LARGEST, rate < _LEAST
    chosen = (np.where(is_few, *pair) for pair in zip(few, series, strict=True))
    return Moments(*(np.where(is_tiny, 0, column) for column in chosen))


@functools.cache
def _table() -> tuple[Float[np.ndarray, " K"], Moments]:
    """Sums over all counts, for rates in equal steps of their logarithm."""
    from scipy.special import gammaln, xlogy

    logs = np.linspace(np.log(_LEAST), np.log(_LARGEST), _STEPS)
    rate, n = np.exp(logs)[:, None], np.arange(600.0)
    chance = np.exp(xlogy(n, rate) - rate - gammaln(n + 1))
    deviance = 2 * (rate - n + xlogy(n, n / rate))
    expect = lambda values: np.sum(chance * values, axis=1)
    mean = expect(deviance)
    apart, pearson = deviance - mean[:, None], (n - rate) / np.sqrt(rate)
    return logs, Moments(
        mean=mean,
        variance=expect(apart**2),
        covariance=expect(apart * pearson),
        curvature=expect(apart * (pearson**2 - n / rate)) - 2,
    )

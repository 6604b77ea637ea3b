"""The deviance of counts: where they are few, chi-squared is not its distribution."""

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

# Above the largest rate these are series. Below the least one there is never a count.
_LEAST, _LARGEST, _STEPS = 1e-12, 300.0, 1024


class Moments(NamedTuple):
    r"""Of the deviance $d$ and Pearson's residual $z$ of each datum.

    - `mean`, `variance`: the mean $m$ and the variance of $d$.
    - `covariance`: that of $d$ and $z$.
    - `curvature`: $\mu\, d^2 m / d \mu^2$, with the rate $\mu$.
    - `cubes`: the means of $(d - m)^3$, $(d - m)^2 z$, $(d - m) z^2$ and $z^3$.
    - `jumps`: $\mu$ times the means of $\Delta, \dots, \Delta^4$, with the change
        $\Delta$ of $d$ by one more count; zero for other data.
    """

    mean: Float[np.ndarray, " N"]
    variance: Float[np.ndarray, " N"]
    covariance: Float[np.ndarray, " N"]
    curvature: Float[np.ndarray, " N"]
    cubes: Float[np.ndarray, "4 N"]
    jumps: Float[np.ndarray, "4 N"]


def normal_moments(present: Float[np.ndarray, " N"]) -> Moments:
    """Returns the moments of normal data, zero where they are missing."""
    zeros = np.zeros_like(present)
    cubes = np.stack([8 * present, zeros, 2 * present, zeros])
    return Moments(present, 2 * present, zeros, zeros, cubes, np.stack([zeros] * 4))


def deviance_moments(rate: Any) -> Moments:
    r"""Returns the moments of the deviance of one count for each of these rates.

    It is $2 (\mu - n + n \log(n / \mu))$, and the moments are sums over the
    distribution of $n$; for large rates they are series in $1 / \mu$. See Kaastra, *On
    the use of C-stat in testing models for X-ray spectra*, Astronomy & Astrophysics 605
    (2017), A51. The covariance is $\sqrt \mu$ times the derivative of the mean.
    """
    rate = np.asarray(rate, float)
    large = np.maximum(rate, _LARGEST)
    zero, root = np.zeros_like(rate), 1 / np.sqrt(large)
    series = (
        *(1 + root**2 / 6, 2 + 2 * root**2 / 3, -(root**3) / 6, root**4 / 3),
        *(zero + 8, zero, zero + 2, root),
        *(zero, zero + 4, -16 * root**2, 48 * root**2),
    )
    logs, table = _table()
    at = np.log(np.clip(rate, _LEAST, _LARGEST))
    few = [np.interp(at, logs, column) for column in table]
    is_few, is_tiny = rate < _LARGEST, rate < _LEAST
    chosen = (np.where(is_few, *pair) for pair in zip(few, series, strict=True))
    found = [np.where(is_tiny, 0, column) for column in chosen]
    cubes, jumps = np.stack(found[4:8]), np.stack(found[8:])
    return Moments(*found[:4], cubes=cubes, jumps=jumps)


@functools.cache
def _table() -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "12 K"]]:
    """Sums over all counts, for rates in equal steps of their logarithm."""
    from scipy.special import gammaln, xlogy

    logs = np.linspace(np.log(_LEAST), np.log(_LARGEST), _STEPS)
    rate, n = np.exp(logs)[:, None], np.arange(600.0)
    chance = np.exp(xlogy(n, rate) - rate - gammaln(n + 1))
    deviance = 2 * (rate - n + xlogy(n, n / rate))
    expect = lambda values: np.sum(chance * values, axis=1)
    mean = expect(deviance)
    d, z = deviance - mean[:, None], (n - rate) / np.sqrt(rate)
    curvature = expect(d * (z**2 - n / rate)) - 2
    cubes = expect(d**3), expect(d**2 * z), expect(d * z**2), expect(z**3)
    change = np.diff(deviance, axis=1)
    jumps = [np.sum(rate * chance[:, :-1] * change**j, axis=1) for j in (1, 2, 3, 4)]
    firsts = mean, expect(d**2), expect(d * z), curvature
    return logs, np.stack([*firsts, *cubes, *jumps])

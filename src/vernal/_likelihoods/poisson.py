"""The Poisson distribution."""

from types import MappingProxyType
from typing import ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._boundary import entrance
from .._pickling import Portable
from .counts import Moments, deviance_moments
from .likelihood import (
    AbstractLikelihood,
    Known,
    as_alike,
    as_mask,
    as_prediction,
    count_of,
    present,
    told_of,
)

# Below this distance of rate and count, relative to their sum, the series is accurate.
_NEAR = 0.15

_COUNTS = (
    "They are the data; what the model expects is `rate`, the first argument: "
    "`Poisson(model(x), counts)`. A background or efficiency with parameters "
    "belongs to it. To hold counts at each step, give `jax.lax.stop_gradient(counts)`."
)


@final
class Poisson(Portable, AbstractLikelihood):
    r"""Counts, such as those of photons in bins.

    ```python
    def residuals(self, model, batch):
        return vn.likelihoods.Poisson(model(batch.energy), batch.counts)
    ```

    $$-\log L = \sum_i \mu_i - n_i + n_i \log \frac{n_i}{\mu_i}$$

    without the constant $\log n_i!$ and so on: it is zero for $\mu = n$. Twice that is
    Cash's statistic, which takes the place of $\chi^2$ in reports. For few counts it is
    not distributed as $\chi^2$: the p-value of a report is by its own mean and
    variance. The expected Fisher matrix is
    $J^\top \mathrm{diag}(1 / \mu) J$, with the Jacobian $J$ of the rates.

    See Cash, *Parameter estimation in astronomy through application of the likelihood
    ratio*, The Astrophysical Journal 228 (1979), and Baker and Cousins, *Clarification
    of the use of chi-square and likelihood functions in fits to histograms*, Nuclear
    Instruments and Methods 221 (1984).
    """

    rate: Float[Array, "..."]
    counts: Float[Array, "..."]
    where: Bool[Array, "..."] | None
    known: ClassVar[Known] = MappingProxyType({"counts": _COUNTS})

    @entrance
    def __init__(
        self, rate: ArrayLike, counts: ArrayLike, *, where: ArrayLike | None = None
    ):
        r"""**Arguments:**

        - `rate`: the counts that the model expects, $\mu$, not their density. The
            likelihood of a negative rate is zero, and its residual infinite: bound the
            parameters if need be.
        - `counts`: $n$, an array of the same shape, of integers or floats. Fits and
            derivatives refuse those that depend on the parameters.
        - `where`: as for [`vernal.likelihoods.Gaussian`][].

        **Raises:**

        - `TypeError`: if `rate` is not real and floating-point, or `where` not boolean.
        - `ValueError`: if the shapes do not agree.
        """
        rate = as_prediction(rate, "rate")
        if jnp.issubdtype(rate.dtype, jnp.complexfloating):
            raise TypeError("`rate` is complex, but a rate is real.")
        self.where = as_mask(where, rate, "rate")
        counts = as_alike(counts, "counts", rate, "rate", broadcasts=False)
        self.rate = present(self.where, rate, 1)
        self.counts = present(self.where, counts, 1)

    def nll(self) -> Float[Array, ""]:
        # Without a count it is the rate, whose root has no derivative at zero.
        half = 0.5 * jnp.square(self._of_positive())
        each = jnp.where(self.counts > 0, half, self.rate)
        return jnp.sum(self._within_support(each))

    def residuals(self) -> Float[Array, "..."]:
        is_zero = self.rate == 0
        root = jnp.where(is_zero, 0, jnp.sqrt(2 * jnp.where(is_zero, 1, self.rate)))
        each = jnp.where(self.counts > 0, self._of_positive(), root)
        return self._within_support(each)

    def count(self) -> int | Int[Array, ""]:
        return count_of(self.where, self.rate)

    def scoring_residuals(self) -> Float[Array, "..."]:
        rate = jax.lax.stop_gradient(self.rate)
        # A rate that underflows carries no information.
        std = jnp.sqrt(jnp.where(rate == 0, 1, rate))
        return self._within_support((self.rate - self.counts) / std)

    def deviance_moments(self) -> Moments:
        """Returns, on the host, moments for each datum; zero for what is missing."""
        # What is missing is as a count whose rate is zero: always zero.
        is_there = True if self.where is None else np.asarray(self.where)
        rate = np.where(is_there, np.asarray(self.rate, float), 0)
        return deviance_moments(rate.ravel())

    def impossible(self) -> str:
        """Says, on the host, which data have no likelihood; empty if all have one."""
        rate, counts = self.rate, self.counts
        return told_of(
            {
                "`counts` are negative": counts < 0,
                "rates are negative": rate < 0,
                "rates are zero where there are counts": (rate == 0) & (counts > 0),
            }
        )

    def _of_positive(self) -> Float[Array, "..."]:
        """Computes the residuals where counts and rates are positive."""
        # NaN stays. Without a count this is not used, nor may its derivatives overflow.
        is_unused = (self.rate <= 0) | (self.counts == 0)
        rate = jnp.where(is_unused, 1, self.rate)
        counts = jnp.where(self.counts > 0, self.counts, 1)
        # The derivative of a quotient divides by a square, which must not underflow.
        # XLA would join two quotients, with the same effect, but not two products.
        total = jax.lax.stop_gradient(rate + counts)
        is_tiny = total < jnp.finfo(rate.dtype).tiny ** 0.25
        factor = jnp.where(is_tiny, 1 / total, 1)
        rate, counts = rate * factor, counts * factor
        difference, total = rate - counts, rate + counts
        is_near = abs(difference) < _NEAR * total
        # After Loader, "Fast and accurate computation of binomial probabilities"
        # (2000), divided by the square of the difference. Its root is smooth.
        away = jnp.where(is_near, difference, 0) / total
        terms = -2 * counts / total * _odd_powers(away)
        near = difference * jnp.sqrt(2 * (1 + terms) / total)
        far_rate = jnp.where(is_near, 2 * counts, rate)
        deviance = 2 * (far_rate - counts - counts * jnp.log(far_rate / counts))
        far = jnp.sign(far_rate - counts) * jnp.sqrt(deviance)
        return jnp.where(is_near, near, far) / jnp.sqrt(factor)

    def _within_support(self, value: Float[Array, "..."]) -> Float[Array, "..."]:
        is_impossible = (self.rate < 0) | ((self.rate == 0) & (self.counts > 0))
        value = jnp.where(is_impossible, np.inf, value)
        return jnp.where(self.counts >= 0, value, np.nan)


def _odd_powers(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Computes $\sum_{j \ge 1} x^{2 j - 1} / (2 j + 1)$ for small $x$."""
    square, total = jnp.square(x), jnp.zeros_like(x)
    for j in range(10, 0, -1):
        total = total * square + 1 / (2 * j + 1)
    return x * total

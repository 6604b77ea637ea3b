"""The normal distribution."""

from types import MappingProxyType
from typing import ClassVar, final

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int

from .._boundary import entrance
from .._pickling import Portable
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

_STD = (
    "Where error bars are fitted, the likelihood has the sum of `jnp.log(std)` too, "
    "which no residual has: define `nll` instead. To hold them at each step, give "
    "`jax.lax.stop_gradient(std)`."
)


@final
class Gaussian(Portable, AbstractLikelihood):
    r"""Data with normal errors: as the array `(mean - data) / std`, with missing data.

    ```python
    def residuals(self, model, batch):
        x, y, std = batch
        return vn.likelihoods.Gaussian(model(x), y, std, where=jnp.isfinite(y))
    ```

    $$-\log L = \sum_i \frac{(m_i - y_i)^2}{2 \sigma_i^2}$$

    without the constant of $\sigma$, which is not fitted: fits and derivatives refuse a
    `std` that depends on the parameters.
    """

    mean: Inexact[Array, "..."]
    data: Inexact[Array, "..."]
    std: Float[Array, "..."]
    where: Bool[Array, "..."] | None
    known: ClassVar[Known] = MappingProxyType({"std": _STD})

    @entrance
    def __init__(
        self,
        mean: ArrayLike,
        data: ArrayLike,
        std: ArrayLike = 1.0,
        *,
        where: ArrayLike | None = None,
    ):
        r"""**Arguments:**

        - `mean`: what the model predicts, $m$; complex numbers are two data each.
        - `data`: the data $y$, an array of the same shape.
        - `std`: their error bars $\sigma$; it broadcasts to that shape. The likelihood
            is NaN where one is not positive.
        - `where`: which data there are, as booleans that broadcast to that shape. The
            others may be NaN, and so may their error bars; what the model predicts of
            them must be finite, and have finite derivatives.

        **Raises:**

        - `TypeError`: if `mean` is not floating-point, or `where` not boolean.
        - `ValueError`: if the shapes do not agree.
        """
        mean = as_prediction(mean, "mean")
        self.where = as_mask(where, mean, "mean")
        data = as_alike(data, "data", mean, "mean", broadcasts=False)
        std = as_alike(std, "std", mean.real, "mean", broadcasts=True)
        self.mean = present(self.where, mean, 0)
        self.data = present(self.where, data, 0)
        self.std = present(self.where, std, 1)

    def nll(self) -> Float[Array, ""]:
        return 0.5 * jnp.sum(jnp.square(jnp.abs(self.residuals())))

    def residuals(self) -> Inexact[Array, "..."]:
        # A negative one would count as its absolute value.
        std = jnp.where(self.std > 0, self.std, jnp.nan)
        return (self.mean - self.data) / std.astype(self.mean.dtype)

    def count(self) -> int | Int[Array, ""]:
        return count_of(self.where, self.mean)

    def scoring_residuals(self) -> Inexact[Array, "..."]:
        return self.residuals()

    def impossible(self) -> str:
        """Says, on the host, which error bars are none; empty if all are positive."""
        return told_of(
            {
                "error bars (`std`) are zero": self.std == 0,
                "error bars (`std`) are negative": self.std < 0,
            }
        )

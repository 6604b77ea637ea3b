"""Losses that bear outliers."""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, final, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._boundary import entrance, one_of
from .._pickling import Portable
from .likelihood import (
    AbstractLikelihood,
    as_alike,
    as_mask,
    as_prediction,
    count_of,
    present,
)

Loss = Literal["soft_l1", "huber", "cauchy", "arctan"]
Scalar = Callable[[Array], Array]


class _Kind(NamedTuple):
    r"""A robust loss $\rho(z)$ of a squared residual $z$.

    - `ratio`: $\rho(z) / z$, smooth at zero.
    - `weight`: $\rho'(z)$.
    """

    ratio: Scalar
    weight: Scalar


def _over(fn: Scalar, series: Scalar) -> Scalar:
    """Divides a function by its argument; near zero by its series."""

    def ratio(z: Array) -> Array:
        is_small = z < 1e-3
        safe = jnp.where(is_small, 1, z)
        return jnp.where(is_small, series(z), fn(safe) / safe)

    return ratio


def _huber_ratio(z: Array) -> Array:
    safe = jnp.where(z <= 1, 1, z)
    return jnp.where(z <= 1, 1, (2 * jnp.sqrt(safe) - 1) / safe)


_KINDS: dict[str, _Kind] = {
    "soft_l1": _Kind(
        lambda z: 2 / (1 + jnp.sqrt(1 + z)), lambda z: 1 / jnp.sqrt(1 + z)
    ),
    "huber": _Kind(_huber_ratio, lambda z: 1 / jnp.sqrt(jnp.maximum(z, 1))),
    "cauchy": _Kind(
        _over(jnp.log1p, lambda z: 1 - z / 2 + z**2 / 3 - z**3 / 4 + z**4 / 5),
        lambda z: 1 / (1 + z),
    ),
    "arctan": _Kind(
        _over(jnp.arctan, lambda z: 1 - z**2 / 3 + z**4 / 5),
        lambda z: 1 / (1 + z**2),
    ),
}


@final
class Robust(Portable, AbstractLikelihood):
    r"""A loss that bears outliers, with the names of `scipy.optimize.least_squares`.

    ```python
    def residuals(self, model, batch):
        left = (model(batch.x) - batch.y) / batch.std
        return vn.likelihoods.Robust(left, "soft_l1")
    ```

    $$\frac12 C^2 \sum_i \rho\big((r_i / C)^2\big)$$

    with the scale $C$ and, by name,

    - `"soft_l1"`: $\rho(z) = 2 (\sqrt{1 + z} - 1)$
    - `"huber"`: $z$, and $2 \sqrt z - 1$ where $z > 1$
    - `"cauchy"`: $\log(1 + z)$
    - `"arctan"`: $\arctan(z)$

    This is not the likelihood of the data. So their errors are those of the sandwich,
    from the scatter of the data themselves (see [`vernal.Trainer.standard_errors`][]),
    and reports have no $\chi^2$.

    **Attributes:**

    - `left`: the residuals $r$.
    - `loss`: the name of the loss.
    - `scale`: $C$, from where on residuals count for less.
    - `where`: which data there are, `None` for all.
    """

    left: Float[Array, "..."]
    loss: str = eqx.field(static=True)
    scale: Float[Array, "..."]
    where: Bool[Array, "..."] | None
    is_robust: ClassVar[bool] = True
    known: ClassVar[tuple[str, str] | None] = (
        "scale",
        "Another scale lowers a loss that bears outliers, whatever the data are. Give "
        "a number, or `jax.lax.stop_gradient(scale)`.",
    )

    @entrance
    def __init__(
        self,
        residuals: ArrayLike,
        loss: Loss = "soft_l1",
        scale: ArrayLike = 1.0,
        *,
        where: ArrayLike | None = None,
    ):
        """**Arguments:**

        - `residuals`: prediction less data, in units of the error bars, or any others.
        - `loss`: the name of the loss.
        - `scale`: in the units of `residuals`; it broadcasts to their shape. The loss
            is NaN where it is not positive.
        - `where`: which data there are, as booleans that broadcast to their shape. The
            other residuals may be NaN, but must have finite derivatives.

        **Raises:**

        - `TypeError`: if `residuals` are not real and floating-point.
        - `ValueError`: if there is no such `loss`, or the shapes do not agree.
        """
        left = as_prediction(residuals, "residuals")
        if jnp.issubdtype(left.dtype, jnp.complexfloating):
            raise TypeError(
                "`residuals` are complex. Give real ones: the real and the imaginary "
                "parts, or absolute values."
            )
        self.loss = one_of(loss, get_args(Loss), "loss")
        self.where = as_mask(where, left, "residuals")
        scale = as_alike(scale, "scale", left, "residuals", broadcasts=True)
        scale = present(self.where, scale, 1)
        # Without a scale all residuals would count for nothing.
        self.scale = jnp.where(scale > 0, scale, jnp.nan)
        self.left = present(self.where, left, 0)

    def nll(self) -> Float[Array, ""]:
        return 0.5 * jnp.sum(jnp.square(self.residuals()))

    def residuals(self) -> Float[Array, "..."]:
        return self.left * jnp.sqrt(_KINDS[self.loss].ratio(self._squares()))

    def count(self) -> int | Int[Array, ""]:
        return count_of(self.where, self.left)

    def scoring_residuals(self) -> Float[Array, "..."]:
        # With weights that are held, as in iteratively reweighted least squares.
        weight = _KINDS[self.loss].weight(self._squares())
        return self.left * jnp.sqrt(jax.lax.stop_gradient(weight))

    def _squares(self) -> Float[Array, "..."]:
        squares = jnp.square(self.left / self.scale)
        # One that overflows, or whose inverse underflows, would weigh nothing.
        limits = jnp.finfo(squares.dtype)
        return jnp.minimum(squares, limits.max * limits.eps)

"""Losses that bear outliers."""

from collections.abc import Callable
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, final, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._boundary import entrance, one_of
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

Loss = Literal["soft_l1", "huber", "cauchy", "arctan"]
Scalar = Callable[[Array], Array]


class _Kind(NamedTuple):
    r"""A robust loss $\rho(z)$ of a squared residual $z$.

    What is far is a function of $s = z^{1/4}$, since $z$ may overflow.

    - `ratio`: $\rho(z) / z$ where $z \le 1$, smooth at zero.
    - `root`: $\sqrt{\rho(s^4)}$ where $s > 1$.
    - `weight`: $\sqrt{\rho'(s^4)}$ of $w = \min(1, 1/s)$ and $t = \min(s, 1/s)$.
    """

    ratio: Scalar
    root: Scalar
    weight: Callable[[Array, Array], Array]


def _over(fn: Scalar, series: Scalar) -> Scalar:
    """Divides a function by its argument; near zero by its series."""

    def ratio(z: Array) -> Array:
        is_small = z < 1e-3
        safe = jnp.where(is_small, 1, z)
        return jnp.where(is_small, series(z), fn(safe) / safe)

    return ratio


_KINDS: dict[str, _Kind] = {
    "soft_l1": _Kind(
        lambda z: 2 / (1 + jnp.sqrt(1 + z)),
        lambda s: s * jnp.sqrt(2 * (jnp.sqrt(1 + s**-4) - s**-2)),
        lambda w, t: w / jnp.sqrt(jnp.sqrt(1 + t**4)),
    ),
    "huber": _Kind(
        jnp.ones_like,
        lambda s: s * jnp.sqrt(2 - s**-2),
        lambda w, t: w,
    ),
    "cauchy": _Kind(
        _over(jnp.log1p, lambda z: 1 - z / 2 + z**2 / 3 - z**3 / 4 + z**4 / 5),
        lambda s: jnp.sqrt(4 * jnp.log(s) + jnp.log1p(s**-4)),
        lambda w, t: w**2 / jnp.sqrt(1 + t**4),
    ),
    "arctan": _Kind(
        _over(jnp.arctan, lambda z: 1 - z**2 / 3 + z**4 / 5),
        lambda s: jnp.sqrt(jnp.pi / 2 - jnp.arctan(s**-4)),
        lambda w, t: w**4 / jnp.sqrt(1 + t**8),
    ),
}


_SCALE = (
    "Another scale lowers a loss that bears outliers, whatever the data are. Give a "
    "number, or `jax.lax.stop_gradient(scale)`."
)


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
    and reports have no $\chi^2$. The residuals $r$ are its attribute `left`.
    """

    left: Float[Array, "..."]
    loss: str = eqx.field(static=True)
    scale: Float[Array, "..."]
    where: Bool[Array, "..."] | None
    is_robust: ClassVar[bool] = True
    known: ClassVar[Known] = MappingProxyType({"scale": _SCALE})

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
        - `scale`: $C$, from where on residuals count for less, in their units; it
            broadcasts to their shape. The loss is NaN where it is not positive.
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
        kind, unit = _KINDS[self.loss], self.left / self.scale
        # True of NaN, too, so that a bad scale is seen.
        beyond = ~(jnp.abs(unit) <= 1)
        near = self.left * jnp.sqrt(kind.ratio(jnp.where(beyond, 0, unit) ** 2))
        # What is infinite stays so, where a bounded loss would hide it.
        is_far = beyond & jnp.isfinite(self.left)
        root = _root(jnp.where(is_far, self.left, self.scale), self.scale)
        far = jnp.sign(self.left) * self.scale * kind.root(root)
        return jnp.where(is_far, far, near)

    def count(self) -> int | Int[Array, ""]:
        return count_of(self.where, self.left)

    def scoring_residuals(self) -> Float[Array, "..."]:
        # With weights that are held, as in iteratively reweighted least squares.
        root = _root(*jax.lax.stop_gradient((self.left, self.scale)))
        inverse = 1 / root
        near, far = jnp.minimum(1, inverse), jnp.minimum(root, inverse)
        return self.left * _KINDS[self.loss].weight(near, far)

    def impossible(self) -> str:
        """Says, on the host, which data have no scale; empty if all have one."""
        return told_of({"`scale` are not positive": jnp.isnan(self.scale)})


def _root(left: Array, scale: Array) -> Array:
    # Not that of their ratio, which may overflow.
    return jnp.sqrt(jnp.abs(left)) / jnp.sqrt(scale)

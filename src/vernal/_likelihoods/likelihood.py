"""The interface of a likelihood."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Int

from .._boundary import refuse_foreign
from .._tree import is_inexact


class AbstractLikelihood(eqx.Module):
    r"""Data, and what a model predicts of them.

    `residuals` of a [`vernal.Trainer`][] may return one, or a pytree of several and of
    arrays. To add a likelihood, subclass it, and define `where` and the methods.

    **Attributes:**

    - `where`: which data there are; `None` for all. What is missing counts for nothing:
        its residuals and their derivatives must be zero.
    - `is_robust`: whether it is not a likelihood that the data are believed to have,
        but one that bears outliers. Then $\chi^2$ has no meaning, and errors are those
        of the sandwich, see [`vernal.Trainer.standard_errors`][].
    """

    where: eqx.AbstractVar[Bool[Array, "..."] | None]
    is_robust: ClassVar[bool] = False

    @abc.abstractmethod
    def nll(self) -> Float[Array, ""]:
        """Returns the negative log-likelihood, zero for a perfect prediction."""

    @abc.abstractmethod
    def residuals(self) -> Inexact[Array, "..."]:
        r"""Returns the deviance residuals $d$, with the sign of prediction less datum.

        $\frac12 \sum_i d_i^2$ is `nll`, which Levenberg-Marquardt so minimises.
        """

    @abc.abstractmethod
    def scoring_residuals(self) -> Inexact[Array, "..."]:
        r"""Returns the residuals $s$ of Fisher scoring, for whitening and errors.

        With their Jacobian $K$, $K^\top s$ is the gradient of `nll`, and $K^\top K$ the
        expected Fisher matrix. They are Pearson's residuals, whose error bars are held
        with `jax.lax.stop_gradient`.
        """

    def count(self) -> int | Int[Array, ""]:
        """Returns the number of data; complex ones count twice."""
        residuals = jax.eval_shape(self.residuals)
        twice = 2 if jnp.issubdtype(residuals.dtype, jnp.complexfloating) else 1
        if self.where is None:
            return twice * residuals.size
        return twice * jnp.sum(jnp.broadcast_to(self.where, residuals.shape))


def as_prediction(value: Any, name: str) -> Inexact[Array, "..."]:
    """Returns what a model predicts as an array of floating-point numbers."""
    refuse_foreign(value, f"`{name}`")
    if not is_inexact(value):
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(
            f"`{name}` is of {kind}, but must be an array of floating-point numbers: "
            "what the model predicts."
        )
    return jnp.asarray(value)


def as_alike(
    value: Any, name: str, like: Inexact[Array, "..."], of: str, broadcasts: bool
) -> Array:
    """Returns numbers in the precision of a prediction, and checks their shape."""
    refuse_foreign(value, f"`{name}`")
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    is_complex = lambda x: jnp.issubdtype(x.dtype, jnp.complexfloating)
    if is_complex(value) and not is_complex(like):
        raise TypeError(f"`{name}` is complex, where it must be real.")
    shape = np.shape(value)
    fits = shape == like.shape
    if broadcasts:
        fits = fits or _broadcast(shape, like.shape) == like.shape
    if not fits:
        what = "which does not broadcast to" if broadcasts else "but must have"
        raise ValueError(
            f"`{name}` has shape {shape}, {what} that of `{of}`, {like.shape}."
        )
    return jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape)


def as_mask(
    where: Any, like: Inexact[Array, "..."], of: str
) -> Bool[Array, "..."] | None:
    """Returns which data there are, in the shape of a prediction."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise TypeError(
            f"`where` is of {where.dtype}, but must be of booleans: true for each "
            "datum that is there, such as `jnp.isfinite(data)`."
        )
    if _broadcast(where.shape, like.shape) != like.shape:
        raise ValueError(
            f"`where` has shape {where.shape}, which does not broadcast to that of "
            f"`{of}`, {like.shape}."
        )
    return jnp.broadcast_to(where, like.shape)


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        return None


def present(where: Bool[Array, "..."] | None, value: Array, stand_in: int) -> Array:
    """Puts a number in place of what is missing, so that no gradient is NaN."""
    if where is None:
        return value
    return jnp.where(where, value, jnp.asarray(stand_in, value.dtype))

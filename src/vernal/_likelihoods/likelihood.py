"""The interface of a likelihood."""

import abc
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Inexact, Int

from .._boundary import RefusedError, refuse_foreign, refuse_taken
from .._tree import at_least_single, is_inexact

Known = Mapping[str, str]


class AbstractLikelihood(eqx.Module):
    r"""Data, and what a model predicts of them.

    `residuals` of a [`vernal.Trainer`][] may return one, or a pytree of several and of
    arrays. To add a likelihood, subclass it, and define the methods.

    **Attributes:**

    - `is_robust`: whether it is not a likelihood that the data are believed to have,
        but one that bears outliers. Then $\chi^2$ has no meaning, and errors are those
        of the sandwich, see [`vernal.Trainer.standard_errors`][].
    - `known`: the names of the fields that must not depend on the parameters, each
        with the remedy, for an error.
    """

    is_robust: ClassVar[bool] = False
    known: ClassVar[Known] = MappingProxyType({})

    def __check_init__(self) -> None:
        refuse_taken(type(self), AbstractLikelihood)

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

    @abc.abstractmethod
    def count(self) -> int | Int[Array, ""]:
        """Returns the number of data; complex ones count twice.

        The residuals of other data, which are missing, must be zero.
        """


T = TypeVar("T", bound=AbstractLikelihood)


def require_known(term: T, param: Array, what: str) -> T:
    """Refuses a likelihood of which something that must be known is fitted.

    It is found out when the parameters are differentiated, of which `param` is one: by
    then whatever depends on them has a tangent. An error calls the likelihood `what`.
    """
    for name, remedy in term.known.items():
        value = _require_known(
            getattr(term, name),
            param,
            f"{what}: its `{name}` depends on the parameters. {remedy}",
        )
        term = eqx.tree_at(lambda term, name=name: getattr(term, name), term, value)
    return term


def _require_known(value: Array, param: Array, text: str) -> Array:
    @jax.custom_jvp
    def known(value: Array, param: Array) -> Array:
        return value

    def rule(primals: Any, tangents: Any) -> Any:
        if not any(isinstance(tangent, SymbolicZero) for tangent in tangents):
            raise RefusedError(text)
        return primals[0], tangents[0]

    known.defjvp(rule, symbolic_zeros=True)
    return known(value, param)


def as_prediction(value: Any, name: str) -> Inexact[Array, "..."]:
    """Returns what a model predicts as an array of floats, of float32 at least.

    Data and error bars are cast to its dtype: half precision would round both, and
    make counts above 65504 infinite.
    """
    refuse_foreign(value, f"`{name}`")
    if not is_inexact(value):
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(
            f"`{name}` is of {kind}, but must be an array of floating-point numbers: "
            "what the model predicts."
        )
    return at_least_single(jnp.asarray(value))


def as_alike(
    value: Any, name: str, like: Inexact[Array, "..."], of: str, broadcasts: bool
) -> Array:
    """Returns numbers in the precision of a prediction, and checks their shape."""
    refuse_foreign(value, f"`{name}`")
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    is_complex = lambda x: jnp.issubdtype(x.dtype, jnp.complexfloating)
    if is_complex(value) and not is_complex(like):
        raise TypeError(f"`{name}` is complex, where it must be real.")
    return _as_wide(jnp.asarray(value, like.dtype), name, like, of, broadcasts)


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
    return _as_wide(where, "where", like, of, broadcasts=True)


def _as_wide(value: Array, name: str, like: Array, of: str, broadcasts: bool) -> Array:
    """Broadcasts to the shape of a prediction, if it may; refuses other shapes."""
    try:
        fits = np.broadcast_shapes(value.shape, like.shape) == like.shape
    except ValueError:
        fits = False
    if not fits or (value.shape != like.shape and not broadcasts):
        what = "which does not broadcast to" if broadcasts else "but must have"
        raise ValueError(
            f"`{name}` has shape {value.shape}, {what} that of `{of}`, {like.shape}."
        )
    return jnp.broadcast_to(value, like.shape)


def present(where: Bool[Array, "..."] | None, value: Array, stand_in: int) -> Array:
    """Puts a number in place of what is missing, so that no gradient is NaN."""
    if where is None:
        return value
    return jnp.where(where, value, jnp.asarray(stand_in, value.dtype))


def told_of(found: Mapping[str, Bool[Array, "..."]]) -> str:
    """Says, on the host, which data are bad, and in what way; empty if none are."""
    shown = []
    for what, bad in found.items():
        count, first = jax.device_get(_count_and_first(bad))
        place = [int(i) for i in np.unravel_index(first, bad.shape)]
        if count:
            shown.append(f"{count} of {bad.size} {what}, the first at {place}.")
    return " ".join(shown)


@jax.jit
def _count_and_first(bad: Bool[Array, "..."]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    return jnp.sum(bad), jnp.argmax(bad)


def count_of(
    where: Bool[Array, "..."] | None, residuals: Inexact[Array, "..."]
) -> int | Int[Array, ""]:
    """Counts the data that there are; complex ones twice."""
    twice = 2 if jnp.issubdtype(residuals.dtype, jnp.complexfloating) else 1
    return twice * (residuals.size if where is None else jnp.sum(where))

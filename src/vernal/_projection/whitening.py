"""The interface of a linear map that whitens flat vectors."""

import abc
import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._boundary import Params


class AbstractWhitening(eqx.Module):
    """A linear map $P$ from a latent array to flat vectors."""

    scale: eqx.AbstractVar[Float[Array, "*members D"]]
    """The units in which the directions are orthonormal."""
    eigenvalues: eqx.AbstractVar[Float[Array, "*members D"]]
    """Those of the scaled matrix, descending, and then the null ones."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype in which it computes."""
        return self.scale.dtype

    @property
    @abc.abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of the latent array."""

    @property
    @abc.abstractmethod
    def rank(self) -> Any:
        """The number of directions that are not null; an array if values decide."""

    @property
    @abc.abstractmethod
    def is_null(self) -> Bool[Array, "*members D"]:
        """Which of the eigenvalues are null: the last ones."""

    @abc.abstractmethod
    def apply(self, latent: Float[Array, "..."]) -> Float[Array, " D"]:
        """Returns $P u$."""

    @abc.abstractmethod
    def transpose(self, vector: Float[Array, " D"]) -> Float[Array, "..."]:
        """Returns $P^T g$."""

    @abc.abstractmethod
    def invert(self, vector: Float[Array, " D"]) -> Float[Array, "..."]:
        """Returns $P^+ x$."""

    @abc.abstractmethod
    def matrix(self) -> Float[Array, "D latent"]:
        """Returns $P$."""

    @abc.abstractmethod
    def log_abs_det(self) -> Float[Array, ""]:
        r"""Returns $\frac12 \log\det(P^T P)$."""

    @abc.abstractmethod
    def standard_errors(self) -> Float[Array, " D"]:
        """Returns the root of the diagonal of `covariance`."""

    @abc.abstractmethod
    def covariance(self) -> Float[Array, "D D"]:
        """Returns $P P^T$, infinite where it is unbounded."""

    @abc.abstractmethod
    def null_space(self, params: Params) -> tuple[dict[str, float], ...]:
        """Names the null directions in the space of `params`."""

    @property
    def latent_size(self) -> int:
        return math.prod(self.latent_shape)


class Unchanged(AbstractWhitening):
    """The identity, for a parameter without a matrix."""

    shape: tuple[int, ...] = eqx.field(static=True)
    kind: np.dtype = eqx.field(static=True)

    def __init__(self, like: Array):
        self.shape, self.kind = like.shape, like.dtype

    @property
    def scale(self) -> Float[Array, "*members D"]:  # pyright: ignore
        return jnp.ones(self.latent_size, self.dtype)

    eigenvalues = scale  # pyright: ignore

    @property
    def dtype(self) -> np.dtype:
        return self.kind

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def rank(self) -> int:
        return self.latent_size

    @property
    def is_null(self) -> Bool[Array, "*members D"]:
        return jnp.zeros(self.latent_size, bool)

    def apply(self, latent: Float[Array, "..."]) -> Float[Array, " D"]:
        return jnp.ravel(latent)

    def transpose(self, vector: Float[Array, " D"]) -> Float[Array, "..."]:
        return vector.reshape(self.latent_shape)

    invert = transpose

    def matrix(self) -> Float[Array, "D latent"]:
        return jnp.eye(self.latent_size, dtype=self.dtype)

    def log_abs_det(self) -> Float[Array, ""]:
        return jnp.zeros((), self.dtype)

    def standard_errors(self) -> Float[Array, " D"]:
        return jnp.full(self.latent_size, jnp.nan, self.dtype)

    def covariance(self) -> Float[Array, "D D"]:
        return jnp.full((self.latent_size, self.latent_size), jnp.nan, self.dtype)

    def null_space(self, params: Params) -> tuple[dict[str, float], ...]:
        return ()

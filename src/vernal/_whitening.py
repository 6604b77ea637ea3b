"""The interface of a linear map that whitens flat vectors."""

import abc
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class AbstractWhitening(eqx.Module):
    """A linear map $P$ from a latent array to flat vectors, and what is known of it.

    It computes in `dtype`; `rank` is the number of directions that are not null. The
    `spectrum` has the eigenvalues of the matrix that was whitened, scaled to be free
    of units: those of the directions that were kept, descending, then the null ones.
    """

    dtype: eqx.AbstractVar[np.dtype]
    latent_shape: eqx.AbstractVar[tuple[int, ...]]
    rank: eqx.AbstractVar[int]
    spectrum: eqx.AbstractVar[Float[Array, " D"]]

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
        """Returns $P P^T$, infinite where it has no bound."""

    @property
    def latent_size(self) -> int:
        """The number of elements of the latent array."""
        return math.prod(self.latent_shape)


class Unchanged(AbstractWhitening):
    """The identity, for a parameter of which nothing is known."""

    latent_shape: tuple[int, ...] = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)

    @property
    def rank(self) -> int:
        """The number of elements."""
        return self.latent_size

    @property
    def spectrum(self) -> Float[Array, " D"]:
        """Ones: no direction is scaled."""
        return jnp.ones(self.latent_size, self.dtype)

    def apply(self, latent: Float[Array, "..."]) -> Float[Array, " D"]:
        """Returns the elements."""
        return jnp.ravel(latent)

    def transpose(self, vector: Float[Array, " D"]) -> Float[Array, "..."]:
        """Returns the elements in their shape."""
        return vector.reshape(self.latent_shape)

    def invert(self, vector: Float[Array, " D"]) -> Float[Array, "..."]:
        """Returns the elements in their shape."""
        return vector.reshape(self.latent_shape)

    def matrix(self) -> Float[Array, "D latent"]:
        """Returns the identity."""
        return jnp.eye(self.latent_size, dtype=self.dtype)

    def log_abs_det(self) -> Float[Array, ""]:
        """Returns zero."""
        return jnp.zeros((), self.dtype)

    def standard_errors(self) -> Float[Array, " D"]:
        """Returns NaN: no matrix was given."""
        return jnp.full(self.latent_size, jnp.nan, self.dtype)

    def covariance(self) -> Float[Array, "D D"]:
        """Returns NaN: no matrix was given."""
        return jnp.full((self.latent_size, self.latent_size), jnp.nan, self.dtype)

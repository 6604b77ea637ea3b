"""A linear map that whitens flat vectors, kept as the factors of its matrix."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from .._boundary import Params
from .._curvature import Spectrum, matmul, refuse
from .null_space import name_null_space
from .whitening import AbstractWhitening

OnNull = Literal["drop", "raise", "prior"]


class DenseWhitening(AbstractWhitening):
    r"""The matrix $P = S V R$.

    $S$ is diagonal and holds the units; the columns of $V$ are orthonormal and $R$ is
    diagonal, both free of units. Every product passes through the factors one after the
    other, so that no number ever carries the square of a unit.

    Where null directions have a prior, $V$ has them too, last, each with a minus one in
    $R$: no shape then depends on how many there are, and the sign, which is free, marks
    them.
    """

    scale: Float[Array, " D"]
    vectors: Float[Array, "D latent"]
    roots: Float[Array, " latent"]
    null_vectors: Float[Array, "D dropped"]
    """The directions that were dropped."""
    eigenvalues: Float[Array, " D"]
    has_prior: bool = eqx.field(static=True)
    resolution: float = eqx.field(static=True)
    """The size below which a component of a null direction counts as zero."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the factors."""
        return self.scale.dtype

    @property
    def is_null(self) -> Bool[Array, "*members D"]:
        """Which of the eigenvalues are those of null directions."""
        if self.has_prior:
            return self.roots < 0
        is_null = jnp.arange(self.eigenvalues.shape[-1]) >= self.roots.shape[-1]
        return jnp.broadcast_to(is_null, self.eigenvalues.shape)

    @property
    def rank(self) -> Any:
        """The number of directions that are not null."""
        if self.has_prior:
            return jnp.sum(self.roots > 0, axis=-1)
        return self.roots.shape[-1]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The latent array is a vector, with an element for each column of $P$."""
        return self.roots.shape[-1:]

    @property
    def spectrum(self) -> Float[Array, "*members D"]:
        """The eigenvalues of the scaled matrix."""
        return self.eigenvalues

    def apply(self, latent: Float[Array, " latent"]) -> Float[Array, " D"]:
        """Returns $P u$."""
        return self.scale * matmul(self.vectors, self.roots * latent)

    def transpose(self, vector: Float[Array, " D"]) -> Float[Array, " latent"]:
        """Returns $P^T g$."""
        return self.roots * matmul(self.scale * vector, self.vectors)

    def invert(self, vector: Float[Array, " D"]) -> Float[Array, " latent"]:
        """Returns $P^+ x$, with the pseudo-inverse in the metric of $S^{-2}$."""
        return matmul(vector / self.scale, self.vectors) / self.roots

    @property
    def _factor(self) -> Float[Array, "D latent"]:
        return self.vectors * self.roots[None, :]

    def matrix(self) -> Float[Array, "D latent"]:
        """Returns $P$."""
        return self.scale[:, None] * self._factor

    def log_abs_det(self) -> Float[Array, ""]:
        r"""Returns $\frac12 \log\det(P^T P)$.

        For an orthogonal $[V, N]$ Jacobi's identity of complementary minors gives
        $\det(V^T S^2 V) = \det(S^2) \det(N^T S^{-2} N)$, whose last factor is as small
        as the null space.
        """
        value = jnp.sum(jnp.log(self.scale)) + jnp.sum(jnp.log(abs(self.roots)))
        if self.null_vectors.shape[-1] == 0:
            return value
        # Householder reflections keep rows of very different size accurate only
        # where the largest come first.
        descending = jnp.argsort(self.scale)
        rows = (self.null_vectors / self.scale[:, None])[descending]
        triangle = jnp.linalg.qr(rows, mode="r")
        return value + jnp.sum(jnp.log(jnp.abs(jnp.diag(triangle))))

    def null_space(self) -> Float[Array, "D nullity"]:
        """Returns the null directions, as columns. Not under `jax.jit`."""
        basis = jnp.concatenate([self.vectors, self.null_vectors], axis=1)
        return basis[:, np.asarray(self.is_null)]

    def _unbounded(self, null: Float[Array, "D nullity"]) -> Bool[Array, " D"]:
        """Which elements have a part in any of some null directions."""
        return jnp.linalg.norm(null, axis=1) > self.resolution

    def standard_errors(self) -> Float[Array, " D"]:
        """Returns the root of the diagonal of `covariance`."""
        errors = self.scale * jnp.linalg.norm(self._factor, axis=1)
        return jnp.where(self._unbounded(self.null_vectors), jnp.inf, errors)

    def errors_of_the_data(self) -> Float[Array, " D"]:
        """Returns the standard errors without a prior, in any case."""
        is_null = self.roots < 0
        factor = self.vectors * jnp.where(is_null, 0, self.roots)[None, :]
        errors = self.scale * jnp.linalg.norm(factor, axis=1)
        own = jnp.where(is_null[None, :], self.vectors, 0)
        null = jnp.concatenate([own, self.null_vectors], axis=1)
        return jnp.where(self._unbounded(null), jnp.inf, errors)

    def covariance(self) -> Float[Array, "D D"]:
        r"""Returns $P P^T$, with the limit $\pm\infty$ where directions were dropped.

        The limit is that of $S N N^T S / \lambda$ as $\lambda$ goes to zero from above.
        """
        scaled = matmul(self._factor, self._factor.T)
        covariance = self.scale[:, None] * scaled * self.scale[None, :]
        if self.null_vectors.shape[-1] == 0:
            return covariance
        unbounded = self._unbounded(self.null_vectors)
        null = matmul(self.null_vectors, self.null_vectors.T)
        size = jnp.sqrt(jnp.diag(null))
        infinite = (
            unbounded[:, None]
            & unbounded[None, :]
            & (jnp.abs(null) > self.resolution * size[:, None] * size[None, :])
        )
        return jnp.where(infinite, jnp.sign(null) * jnp.inf, covariance)


class Cut(NamedTuple):
    """Which directions are null, and what becomes of them."""

    threshold: float | int
    rank: int | None
    on_null: OnNull
    resolution: float


def check_rank_kind(rank: Any, blocks: Any) -> None:
    """Checks that there is a rank for each block, or one where there are none."""
    if rank is not None and isinstance(rank, Mapping) != (blocks is not None):
        raise TypeError(
            "`rank` must be a mapping from the selectors in `blocks` to whole numbers, "
            f"or one number where there are no blocks, but it is {rank!r}."
        )


def of_spectrum(
    spectrum: Spectrum, params: Params, cut: Cut, name: str, *, is_inverse: bool
) -> DenseWhitening:
    """Makes the map from a decomposition.

    **Arguments:**

    - `spectrum`: of the matrix called `name` over the elements of `params`.
    - `cut`: which of the directions are null.
    - `is_inverse`: whether the matrix is the inverse of a covariance.
    """
    scale, values, vectors = spectrum
    threshold, rank, on_null, resolution = cut
    size = values.size
    rank, values = _choose_rank(values, cut, name)
    if on_null == "raise" and rank is not None and rank < size:
        shown = "; ".join(
            " and ".join(f"{path} ({weight:+.3g})" for path, weight in null.items())
            for null in name_null_space(params, vectors[:, rank:], resolution)
        )
        raise ValueError(
            f"{name} does not constrain {size - rank} of {size} directions: {shown}. "
            'Freeze a parameter of each, or use `on_null="drop"` or `"prior"`.'
        )
    is_null = ~(values > threshold * values[0])
    if rank is not None:
        is_null = jnp.arange(size) >= rank
    roots = jnp.sqrt(jnp.where(is_null, 1, values))
    roots = jnp.where(is_null, -1, 1 / roots if is_inverse else roots)
    kept = size if on_null == "prior" else rank
    return DenseWhitening(
        scale=scale,
        vectors=vectors[:, :kept],
        roots=roots[:kept],
        null_vectors=vectors[:, kept:],
        eigenvalues=values,
        has_prior=on_null == "prior",
        resolution=resolution,
    )


def check_options(
    threshold: float | int, rank: int | None, on_null: OnNull, size: int
) -> None:
    if on_null not in get_args(OnNull):
        raise ValueError(
            f'`on_null` is {on_null!r}, but must be "drop", "raise" or "prior".'
        )
    if not 0 <= threshold < 1:
        raise ValueError(
            f"`rtol` must be at least 0 and less than 1, not {threshold}: it is a "
            "fraction of the largest eigenvalue."
        )
    if rank is None:
        return
    if not 1 <= rank <= size:
        raise ValueError(
            f"`rank` must be between 1 and the number of parameters, {size}, not "
            f"{rank}."
        )
    if rank < size and on_null == "raise":
        raise ValueError(
            f"`rank={rank}` leaves {size - rank} null directions, but "
            '`on_null="raise"` allows none. Use `"drop"` or `"prior"`, or leave `rank` '
            "out."
        )


def _choose_rank(
    values: Float[Array, " D"], cut: Cut, name: str
) -> tuple[int | None, Float[Array, " D"]]:
    """Returns the number of directions that are not null, and the checked values.

    The number is `None` where it depends on values that are not known.
    """
    tolerance, size = cut.threshold * values[0], values.size
    rank, is_traced = cut.rank, isinstance(values, Tracer)
    if rank is not None or (is_traced and cut.on_null == "raise"):
        rank = size if rank is None else rank
        return rank, refuse(
            values,
            ~(values[rank - 1] > tolerance),
            f"`rank={rank}` keeps directions that {name} does not constrain. Lower "
            "`rank` or `rtol`."
            if cut.rank is not None
            else f"{name} does not constrain every direction. Make the projector "
            'outside of `jax.jit` to see which, or use `on_null="prior"`.',
            lambda: (
                f"Only {np.count_nonzero(values > tolerance)} of {values.size} "
                f"eigenvalues are above the tolerance of {tolerance}."
            ),
        )
    if not is_traced:
        return int(np.count_nonzero(values > tolerance)), values
    if cut.on_null == "prior":
        return None, values
    raise ValueError(
        "`rank` must be given under `jax.jit` and `jax.vmap`, where the number of "
        "null directions, and with it the shape of the latent space, cannot depend "
        f"on values. For {name}, {size} keeps them all. Or use "
        '`on_null="prior"`, which leaves the latent space its shape.'
    )

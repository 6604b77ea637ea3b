"""The covariance of Huber and White: the scatter is that of the data themselves."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._curvature import after, matmul, refuse, square_factor
from .._minimum import along
from .._policy import all_finite
from .._projection import DenseWhitening
from .._step import AbstractTrainer, prior_count
from .._tree import as_parameters, ravel
from .derivatives import Derived, Passes, derive

NO_SANDWICH = (
    '`kind="sandwich"`, which robust losses have by default, takes the errors from the '
    "scatter of the data, and there is none: they are no more than the free "
    "parameters, or the model predicts them exactly. Give more data than free "
    'parameters, or `kind="expected"`.'
)

# The least share of the scatter of data that may be left after the fit: with less, an
# error would be too small by a factor of ten.
_LEAST = 0.01


class Sandwich(NamedTuple):
    """A covariance, and what there is to know of the scatter that it is made of.

    - `whitening`: the map whose covariance it is.
    - `missing`: the number of directions without scatter.
    - `direction`: the one that has the least, without units.
    - `is_exact`: whether there are data, and all of them have residuals of zero, but
        for rounding.
    - `is_finite`: whether what it is made of is finite; else it is of zeros.
    """

    whitening: DenseWhitening
    missing: Int[Array, ""]
    direction: Float[Array, " D"]
    is_exact: Bool[Array, ""]
    is_finite: Bool[Array, ""]

    @property
    def lacks_scatter(self) -> Bool[Array, ""]:
        """Whether an error would be zero because there is no scatter."""
        return self.is_finite & (self.is_exact | (self.missing > 0))

    def checked(self, trainer: AbstractTrainer) -> DenseWhitening:
        """Returns the map; refuses to make one without scatter."""

        def detail() -> str:
            if not self.missing:
                return "All residuals are zero."
            least = np.asarray(self.direction, float)
            where = along(least, as_parameters(trainer.params))
            rank = np.count_nonzero(np.asarray(self.whitening.roots) >= 0)
            return f"It is missing in {self.missing} of {rank} directions{where}."

        lacks = self.lacks_scatter
        roots = refuse(self.whitening.roots, lacks, NO_SANDWICH, detail)
        return eqx.tree_at(lambda w: w.roots, self.whitening, roots)


def sandwich(
    trainer: AbstractTrainer,
    batch: Any,
    passes: Passes,
    derived: Derived,
    expected: DenseWhitening,
    observed: DenseWhitening,
) -> Sandwich:
    """Makes the sandwich of the curvature that is `observed`.

    `derived` has the Jacobian of the scoring residuals, which that of the deviance
    residuals is too if all data are normal; `expected` is its curvature.
    """
    scoring, found = derived.found[0], derived
    if derived.data is not None and derived.data.has_scale:
        found = derive(trainer, batch, "deviance", None, passes, holds=True)
    (jacobian,), residuals = found.found, found.deviances
    assert residuals is not None
    is_datum = np.arange(residuals.size) < residuals.size - prior_count(trainer)
    maps, parts = (expected, observed), (scoring, jacobian, residuals)
    return _sandwich(maps, parts, is_datum, as_parameters(trainer.params))


@jax.jit
def _sandwich(
    maps: tuple[DenseWhitening, DenseWhitening],
    parts: tuple[Array, Array, Array],
    is_datum: Bool[Array, " N"],
    params: Any,
) -> Sandwich:
    is_finite = all_finite(parts)
    # LAPACK may not return if there is a NaN.
    cleared = (jnp.where(is_finite, part, 0) for part in parts)
    (expected, observed), (scoring, jacobian, residuals) = maps, cleared
    # The gradient of each datum's `nll`; of priors, rows of their information.
    weights = jnp.where(is_datum, residuals, 1).astype(jacobian.dtype)
    whitening = _scattered(observed, weights[:, None] * jacobian)
    later = after(scoring, whitening.roots)
    shares, directions = _shares(expected, later, is_datum)
    sizes = matmul(jnp.abs(jacobian), jnp.abs(ravel(params)).astype(jacobian.dtype))
    eps = max(float(jnp.finfo(x.dtype).eps) for x in (residuals, expected.scale))
    largest = lambda x: jnp.max(jnp.where(is_datum, x, 0), initial=0)
    is_exact = largest(jnp.abs(residuals).astype(sizes.dtype)) <= eps * largest(sizes)
    is_exact &= jnp.any(is_datum[:, None] & (scoring != 0))
    return Sandwich(
        whitening, jnp.sum(shares < _LEAST), directions[:, 0], is_exact, is_finite
    )


def _scattered(
    whitening: DenseWhitening, scores: Float[Array, "N D"]
) -> DenseWhitening:
    r"""Replaces the covariance $H^{-1}$ by $H^{-1} S^\top S H^{-1}$, the sandwich.

    With $H^{-1} = P P^\top$ its root is $P (S P)^\top$. Null directions stay.
    """
    is_null = whitening.roots < 0
    known, latent = _latent(whitening, scores)
    root = matmul(known, square_factor(latent).T)
    vectors, roots, _ = jnp.linalg.svd(root)
    return eqx.tree_at(
        lambda w: (w.vectors, w.roots),
        whitening,
        (
            jnp.where(is_null[None, :], whitening.vectors, vectors),
            jnp.where(is_null, whitening.roots, roots),
        ),
    )


def _shares(
    whitening: DenseWhitening, rows: Float[Array, "N D"], is_datum: Bool[Array, " N"]
) -> tuple[Float[Array, " D"], Float[Array, "D D"]]:
    r"""Computes which share of their scatter the data have left, along directions.

    Of equal errors a residual has left $1 - h_i$ of its variance, with the leverage
    $h_i$: none if parameters fit it exactly, as they do if there are no more data. A
    prior is known to the full. The shares ascend, and those of what is null are one.
    """
    known, latent = _latent(whitening, rows)
    left = jnp.where(is_datum, 1 - jnp.sum(jnp.square(latent), axis=1), 1)
    root = jnp.sqrt(jnp.maximum(left, 0))[:, None] * latent
    null = jnp.diag(whitening.roots < 0).astype(root.dtype)
    shares, vectors = jnp.linalg.eigh(matmul(root.T, root) + null)
    directions = matmul(known, vectors)
    size = jnp.linalg.norm(directions, axis=0)
    return shares, directions / jnp.where(size > 0, size, 1)[None, :]


def _latent(
    whitening: DenseWhitening, rows: Float[Array, "N D"]
) -> tuple[Float[Array, "D D"], Float[Array, "N D"]]:
    """Returns the known part of a map, and rows in the space that it maps from."""
    known = whitening.vectors * jnp.maximum(whitening.roots, 0)[None, :]
    # The product is without units, and none of its factors may overflow.
    return known, matmul(rows.astype(known.dtype) * whitening.scale[None, :], known)

"""The covariance of Huber and White: the scatter is that of the data themselves."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._curvature import after, matmul, positive, refuse, square_factor
from .._minimum import along
from .._policy import all_finite
from .._projection import DenseWhitening
from .._step import AbstractTrainer, prior_count
from .._tree import as_parameters, element_name, ravel
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

# The fewest data for an error: that of n scatters by its own share of 1 / sqrt(2 n).
_FEWEST = 5


class Sandwich(NamedTuple):
    """A covariance, and what there is to know of the scatter that it is made of.

    - `whitening`: the map whose covariance it is.
    - `missing`: the number of directions without scatter.
    - `direction`: the one that has the least, without units.
    - `is_exact`: whether there are data, and all of them have residuals of zero, but
        for rounding.
    - `is_finite`: whether what it is made of is finite; else it is of zeros.
    - `is_of_few`: the parameters whose error is of the scatter of very few data.
    """

    whitening: DenseWhitening
    missing: Int[Array, ""]
    direction: Float[Array, " D"]
    is_exact: Bool[Array, ""]
    is_finite: Bool[Array, ""]
    is_of_few: Bool[Array, " D"]

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
    known, latent = _latent(expected, after(scoring, whitening.roots))
    # Of equal errors a residual has left 1 - h of its variance, with the leverage h;
    # a prior is known to the full.
    left = jnp.where(is_datum, 1 - jnp.sum(jnp.square(latent), axis=1), 1)
    left = jnp.maximum(left, 0)
    shares, directions = _shares(expected, (known, latent), left)
    is_of_few = _is_of_few((known, latent), left, is_datum)
    is_of_few &= jnp.isfinite(jnp.asarray(expected.errors_of_the_data()))
    sizes = matmul(jnp.abs(jacobian), jnp.abs(ravel(params)).astype(jacobian.dtype))
    eps = max(float(jnp.finfo(x.dtype).eps) for x in (residuals, expected.scale))
    largest = lambda x: jnp.max(jnp.where(is_datum, x, 0), initial=0)
    is_exact = largest(jnp.abs(residuals).astype(sizes.dtype)) <= eps * largest(sizes)
    is_exact &= jnp.any(is_datum[:, None] & (scoring != 0))
    missing, direction = jnp.sum(shares < _LEAST), directions[:, 0]
    return Sandwich(whitening, missing, direction, is_exact, is_finite, is_of_few)


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
    whitening: DenseWhitening, parts: tuple[Array, Array], left: Float[Array, " N"]
) -> tuple[Float[Array, " D"], Float[Array, "D D"]]:
    """Computes which share of their scatter the data have left, along directions.

    None if parameters fit them exactly, as they do if there are no more data. The
    shares ascend, and those of what is null are one.
    """
    known, latent = parts
    root = jnp.sqrt(left)[:, None] * latent
    null = jnp.diag(whitening.roots < 0).astype(root.dtype)
    shares, vectors = jnp.linalg.eigh(matmul(root.T, root) + null)
    directions = matmul(known, vectors)
    size = jnp.linalg.norm(directions, axis=0)
    return shares, directions / jnp.where(size > 0, size, 1)[None, :]


def _is_of_few(
    parts: tuple[Array, Array], left: Float[Array, " N"], is_datum: Bool[Array, " N"]
) -> Bool[Array, " D"]:
    r"""Finds the parameters whose variance is a sum of very few squares.

    With the part $w_i$ that the datum $i$ is expected to have of the sum, it is that of
    $(\sum w_i)^2 / \sum w_i^2$ data, as Satterthwaite counts them.
    """
    known, latent = parts
    weights = left[:, None] * jnp.square(matmul(latent, known.T))
    weights /= positive(jnp.sum(weights, axis=0))[None, :]
    squares = jnp.where(is_datum[:, None], jnp.square(weights), 0)
    return jnp.sum(squares, axis=0) > 1 / _FEWEST


def few_text(is_of_few: Any, params: Any, where: str = "") -> str | None:
    """Says which errors are of the scatter of too few data, and what helps."""
    if not (found := np.flatnonzero(is_of_few)).size:
        return None
    name, others = element_name(params, int(found[0])), found.size - 1
    more = f" (and of {others} more)" * bool(others)
    return (
        f"the error of {name!r}{more}{where} is from the scatter of fewer than "
        f"{_FEWEST} data (sandwich), and may be far too small or too large. For "
        "residuals in units of their error bars, "
        '`kind="expected"` has errors that need no scatter'
    )


def _latent(
    whitening: DenseWhitening, rows: Float[Array, "N D"]
) -> tuple[Float[Array, "D D"], Float[Array, "N D"]]:
    """Returns the known part of a map, and rows in the space that it maps from."""
    known = whitening.vectors * jnp.maximum(whitening.roots, 0)[None, :]
    # The product is without units, and none of its factors may overflow.
    return known, matmul(rows.astype(known.dtype) * whitening.scale[None, :], known)

"""The normal approximation of the likelihood around a point: Laplace's."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._boundary import one_of
from .._curvature import Mode, Spectrum, matmul, square_factor
from .._projection import DenseWhitening, NullPolicy
from .._step import AbstractTrainer, defined, prior_count
from .._tree import as_parameters
from .derivatives import Derived, Passes, derive, require_finite
from .fisher import require_elements, require_likelihood, require_residuals
from .whiten import (
    Reduced,
    checked_spectra,
    hessian_rtol,
    of_hessian,
    of_spectrum,
    reduced,
)

ErrorKind = Literal["expected", "observed", "sandwich"]

# Directions that the data do not constrain are kept, and marked.
NULLS = NullPolicy(on_null="prior")


class Laplace(NamedTuple):
    """A normal distribution of the parameters, and the derivatives that it is made of.

    - `whitening`: its covariance is that of the parameters.
    - `derived`: the derivatives of `residuals`, or of `nll`.
    - `reduced`, `spectrum`: of the Jacobian, the latter in the dtype of the parameters;
        `None` for an `nll`.
    - `eps`: the coarsest epsilon.
    - `kind`: which matrix the covariance comes from.
    """

    whitening: DenseWhitening
    derived: Derived
    reduced: Reduced | None
    spectrum: Spectrum | None
    eps: float
    kind: ErrorKind


def laplace(
    trainer: AbstractTrainer,
    batch: Any,
    what: str,
    jac: Mode | None,
    kind: ErrorKind | None,
    *,
    holds: bool = True,
) -> Laplace:
    """Approximates the likelihood at the current point, by the program of `whiten`.

    Errors call the result `what`. Unless it `holds` what is pushed against its bound,
    the bounds are not looked at.
    """
    require_likelihood(trainer, what)
    require_elements(trainer, what)
    kind = checked_kind(trainer, kind)
    passes, params = Passes(jac=jac), as_parameters(trainer.params)
    if "residuals" not in defined(trainer):
        return _observed(trainer, batch, passes, holds)
    derived = derive(trainer, batch, "jacobian", None, passes, holds)
    parts = reduced(derived.found[0], derived.value)
    spectra = (parts.spectrum,)
    (spectrum,), eps = checked_spectra(trainer, batch, spectra, derived.is_finite)
    kind, whitening = of_kind(
        kind,
        derived,
        expected=lambda: of_spectrum(spectrum, params, NULLS, "", eps),
        observed=lambda: _observed(trainer, batch, passes, holds).whitening,
        scores=lambda: scores_of(trainer, batch, passes, derived),
    )
    return Laplace(whitening, derived, parts, spectrum, eps, kind)


def of_kind(
    kind: ErrorKind | None,
    derived: Derived,
    *,
    expected: Callable[[], DenseWhitening],
    observed: Callable[[], DenseWhitening],
    scores: Callable[[], Float[Array, "N D"]],
) -> tuple[ErrorKind, DenseWhitening]:
    """Chooses the kind of errors, by default the one that suits the data."""
    if kind is None:
        is_robust = derived.data is not None and derived.data.is_robust
        kind = "sandwich" if is_robust else "expected"
    whitening = expected() if kind == "expected" else observed()
    return kind, _scattered(whitening, scores()) if kind == "sandwich" else whitening


def checked_kind(trainer: AbstractTrainer, kind: Any) -> ErrorKind | None:
    """Checks the argument `kind`."""
    if kind is not None:
        one_of(kind, get_args(ErrorKind), "kind")
    require_residuals(trainer, kind)
    return kind


def _observed(
    trainer: AbstractTrainer, batch: Any, passes: Passes, holds: bool
) -> Laplace:
    """Approximates a likelihood by its Hessian."""
    derived = derive(trainer, batch, "nll", None, passes, holds)
    hessian = derived.found[0].hessian
    name = "`nll`" if "nll" in defined(trainer) else "the squared `residuals`"
    what = f"The curvature of {name}"
    require_finite((hessian,), derived.is_finite, what, trainer, batch)
    params, rtol = as_parameters(trainer.params), hessian_rtol((hessian,))
    whitening = of_hessian(hessian, params, NULLS, "", name, rtol)
    return Laplace(whitening, derived, None, None, rtol, "observed")


def scores_of(
    trainer: AbstractTrainer, batch: Any, passes: Passes, derived: Derived
) -> Float[Array, "N D"]:
    """Returns the gradient of each datum's `nll`; of priors, rows of their information.

    `derived` has the Jacobian of the scoring residuals. It is that of the deviance
    residuals too if all data are normal.
    """
    if derived.data is not None and derived.data.has_scale:
        derived = derive(trainer, batch, "deviance", None, passes, holds=True)
    (jacobian,), residuals = derived.found, derived.deviances
    assert residuals is not None
    is_datum = jnp.arange(residuals.size) < residuals.size - prior_count(trainer)
    weights = jnp.where(is_datum, residuals, 1).astype(jacobian.dtype)
    return weights[:, None] * jacobian


@jax.jit
def _scattered(
    whitening: DenseWhitening, scores: Float[Array, "N D"]
) -> DenseWhitening:
    r"""Replaces the covariance $H^{-1}$ by $H^{-1} S^\top S H^{-1}$, the sandwich.

    With $H^{-1} = P P^\top$ its root is $P (S P)^\top$. Null directions stay.
    """
    is_null = whitening.roots < 0
    known = whitening.vectors * jnp.where(is_null, 0, whitening.roots)[None, :]
    # `S P` is without units, and none of its factors may overflow.
    latent = matmul(scores.astype(known.dtype) * whitening.scale[None, :], known)
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

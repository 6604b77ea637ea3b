"""Standard errors, and the likelihood for samplers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._boundary import Params, PyTree
from .._curvature import (
    Mode,
    Spectrum,
    equilibrated_eigh,
    of_jacobian,
    positive,
)
from .._data import as_batch
from .._policy import all_finite
from .._program import Version, version_of
from .._projection import DenseWhitening, EigenProjector, whiten_spectrum
from .._step import (
    AbstractTrainer,
    bounds_of,
    defined,
    live,
    negative_log_likelihood,
    step_key,
    stripped,
)
from .._tree import as_parameters, ravel, ravel_size, unravel
from .derivatives import Derived, Passes, derive
from .fisher import require_likelihood
from .laplace import (
    NULLS,
    ErrorKind,
    default_kind,
    laplace,
    scores_of,
    with_scatter,
)
from .whiten import hessian_rtol, in_own_precision, of_spectrum


def standard_errors(
    trainer: AbstractTrainer, batch: Any, jac: Mode | None, kind: ErrorKind | None
) -> Params:
    """Implements `Trainer.standard_errors`."""
    here = laplace(trainer, batch, "A standard error", jac, kind)
    errors = jnp.asarray(here.whitening.errors_of_the_data())
    if bounds_of(trainer) is not None:
        errors = jnp.where(here.derived.held, jnp.nan, errors)
    return unravel(errors, as_parameters(trainer.params))


def errors_or_nan(
    trainer: AbstractTrainer, batch: Any, jac: Mode | None, kind: ErrorKind | None
) -> Params:
    """Returns the standard errors, NaN where there are none, in a compiled program.

    There are none if derivatives are not finite, or the point is not a minimum.
    """
    require_likelihood(trainer, "A standard error")
    passes = Passes(jac=jac)
    if "residuals" not in defined(trainer):
        whitening, derived, is_good = _by_hessian(trainer, batch, passes)
    else:
        whitening, derived, is_good = _by_jacobian(trainer, batch, passes)
        kind = kind or default_kind(derived)
        if kind != "expected":
            whitening, _, is_curved = _by_hessian(trainer, batch, passes)
            is_good &= is_curved
        if kind == "sandwich":
            scores = scores_of(trainer, batch, passes, derived)
            is_good &= all_finite(scores)
            whitening = with_scatter(whitening, jnp.where(is_good, scores, 0))
    errors = whitening.errors_of_the_data()
    known = jnp.where(is_good & ~derived.held, errors, jnp.nan)
    return unravel(known, as_parameters(trainer.params))


# LAPACK may not return if there is a NaN: what is not finite is replaced.
_Known = tuple[DenseWhitening, Derived, Bool[Array, ""]]


def _by_jacobian(trainer: AbstractTrainer, batch: Any, passes: Passes) -> _Known:
    derived = derive(trainer, batch, "jacobian", None, passes, holds=True)
    (jacobian,), params = derived.found, as_parameters(trainer.params)
    is_good = derived.is_finite & all_finite(jacobian)
    spectra = (of_jacobian(jnp.where(is_good, jacobian, 0)),)
    (spectrum,), eps = in_own_precision(spectra, params)
    return of_spectrum(spectrum, params, NULLS, "", eps), derived, is_good


def _by_hessian(trainer: AbstractTrainer, batch: Any, passes: Passes) -> _Known:
    derived = derive(trainer, batch, "nll", None, passes, holds=True)
    hessian, params = derived.found[0].hessian, as_parameters(trainer.params)
    is_good = derived.is_finite & all_finite(hessian)
    is_good &= jnp.all(jnp.diag(hessian) >= 0)
    eye = jnp.eye(ravel_size(params), dtype=hessian.dtype)
    hessian = jnp.where(is_good, hessian, eye)
    scale = jnp.sqrt(positive(jnp.diag(hessian)))
    values, vectors = equilibrated_eigh(hessian, scale)
    rtol = hessian_rtol((hessian,))
    is_good &= values[-1] >= -rtol * values[0]
    spectrum, nulls = Spectrum(1 / scale, values, vectors), NULLS.or_rtol(rtol)
    return whiten_spectrum(spectrum, params, nulls, rtol, ""), derived, is_good


def _potential(
    _: Version,
    trainer: AbstractTrainer,
    projector: EigenProjector | None,
    batch: Any,
    point: PyTree,
) -> Float[Array, ""]:
    """Computes the negative log-likelihood at a latent point."""
    if projector is None:
        params = unravel(point, trainer.params)
    else:
        params = projector.to_params(point)
    # The present version, since it may be called without a program.
    with version_of((trainer, batch)).context():
        key, bounds = step_key(trainer), bounds_of(trainer)
        if bounds is None:
            return negative_log_likelihood(live(trainer, params), batch, key)
        # In a latent space rounding moves what is on a bound.
        errors = None if projector is None else projector.standard_errors()
        within = live(trainer, bounds.clip(params))
        value = negative_log_likelihood(within, batch, key)
        return jnp.where(bounds.contain(params, errors), value, jnp.inf)


def objective(
    trainer: AbstractTrainer, batch: Any
) -> tuple[jax.tree_util.Partial, PyTree]:
    """Implements `Trainer.objective`."""
    require_likelihood(trainer, "The posterior of a sampler")
    params = as_parameters(trainer.params)
    start = ravel(params) if trainer.projector is None else trainer.latent
    # A pytree, and hashable, as an argument of `jax.jit` must be.
    bare, projector, batch = stripped(trainer), trainer.projector, as_batch(batch)
    version = version_of((bare, batch))
    return jax.tree_util.Partial(_potential, version, bare, projector, batch), start

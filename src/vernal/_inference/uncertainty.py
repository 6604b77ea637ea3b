"""Standard errors, and the likelihood for samplers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
from .._projection import EigenProjector, NullPolicy, whiten_spectrum
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
from .derivatives import Passes, derive
from .fisher import require_likelihood
from .whiten import hessian_rtol, in_own_precision, of_spectrum, whiten_all


def standard_errors(trainer: AbstractTrainer, batch: Any, jac: Mode | None) -> Params:
    """Implements `Trainer.standard_errors`."""
    require_likelihood(trainer, "A standard error")
    # No projector: if the data constrain nothing at all, there is none.
    whitening = whiten_all(trainer, batch, Passes(jac=jac), NullPolicy(on_null="prior"))
    errors = jnp.asarray(whitening.errors_of_the_data())
    if bounds_of(trainer) is not None:
        kind = "jacobian" if "residuals" in defined(trainer) else "nll"
        held = derive(trainer, batch, kind, None, Passes(jac=jac), holds=True).held
        errors = jnp.where(held, jnp.nan, errors)
    return unravel(errors, as_parameters(trainer.params))


def errors_or_nan(trainer: AbstractTrainer, batch: Any, jac: Mode | None) -> Params:
    """Returns the standard errors, NaN where there are none, in a compiled program.

    There are none if derivatives are not finite, or the point is not a minimum.
    """
    require_likelihood(trainer, "A standard error")
    params, nulls = as_parameters(trainer.params), NullPolicy(on_null="prior")
    passes = Passes(jac=jac)
    if "residuals" in defined(trainer):
        found = derive(trainer, batch, "jacobian", None, passes, holds=True)
        (jacobian,), is_good, _, held = found
        is_good &= all_finite(jacobian)
        # LAPACK may not return if there is a NaN.
        spectra = (of_jacobian(jnp.where(is_good, jacobian, 0)),)
        (spectrum,), eps = in_own_precision(spectra, params)
        whitening = of_spectrum(spectrum, params, nulls, "", eps)
    else:
        found = derive(trainer, batch, "nll", None, passes, holds=True)
        (expansion,), is_good, _, held = found
        hessian, eye = expansion.hessian, jnp.eye(ravel_size(params))
        is_good &= all_finite(hessian) & jnp.all(jnp.diag(hessian) >= 0)
        hessian = jnp.where(is_good, hessian, eye.astype(hessian.dtype))
        scale = jnp.sqrt(positive(jnp.diag(hessian)))
        values, vectors = equilibrated_eigh(hessian, scale)
        rtol = hessian_rtol((hessian,))
        is_good &= values[-1] >= -rtol * values[0]
        spectrum, eps = Spectrum(1 / scale, values, vectors), rtol
        nulls = nulls.or_rtol(rtol)
        whitening = whiten_spectrum(spectrum, params, nulls, eps, "")
    known = jnp.where(is_good & ~held, whitening.errors_of_the_data(), jnp.nan)
    return unravel(known, params)


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

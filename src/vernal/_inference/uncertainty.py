"""Standard errors, and the likelihood for samplers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._boundary import Params, PyTree
from .._curvature import Mode
from .._data import as_batch
from .._program import Version, version_of
from .._projection import EigenProjector, NullPolicy
from .._step import (
    AbstractTrainer,
    bounds_of,
    live,
    negative_log_likelihood,
    step_key,
    stripped,
)
from .._tree import as_parameters, ravel, unravel
from .derivatives import Passes
from .fisher import require_likelihood
from .whiten import whiten_all


def standard_errors(trainer: AbstractTrainer, batch: Any, jac: Mode | None) -> Params:
    """Implements `Trainer.standard_errors`."""
    require_likelihood(trainer, "A standard error")
    # No projector: if the data constrain nothing at all, there is none.
    whitening = whiten_all(trainer, batch, Passes(jac=jac), NullPolicy(on_null="prior"))
    params = as_parameters(trainer.params)
    errors = unravel(whitening.errors_of_the_data(), params)
    return (
        errors
        if (bounds := bounds_of(trainer)) is None
        else bounds.unknown(errors, params)
    )


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
        within = live(trainer, bounds.clip(params))
        value = negative_log_likelihood(within, batch, key)
        return jnp.where(bounds.contain(params), value, jnp.inf)


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

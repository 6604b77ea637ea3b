"""Whitening a latent space again, where a solve is now."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._curvature import matmul, on_device
from .._inference import (
    Passes,
    curvature,
    fisher,
    has_likelihood,
    whitened,
    whitens_free,
)
from .._minimum import MOST_PARAMETERS
from .._projection import DenseWhitening, EigenProjector, Unchanged
from .._step import AbstractTrainer, changed, reproject
from .._tree import paths, ravel_size
from .problem import Problem

# How many columns of a matrix are computed at a time.
_COLUMNS = 64


def can_whiten(trainer: AbstractTrainer) -> bool:
    """Whether the latent space is of the kind that `Trainer.whiten` makes."""
    projector = trainer.projector
    if projector is None or projector.latent_size < ravel_size(trainer.params):
        return False
    return {type(w) for w in projector.whitenings} <= {DenseWhitening, Unchanged}


def whitened_again(
    trainer: AbstractTrainer, problem: Problem
) -> tuple[EigenProjector, Any] | None:
    """Whitens where a trainer is now, as `Trainer.whiten` does by default.

    Returns the projector and the latent point; `None` if there is no curvature. For
    many parameters the Jacobian, which `solve` may not have formed, is not kept.
    """
    projector: EigenProjector = trainer.projector
    is_large = ravel_size(trainer.params) > MOST_PARAMETERS
    blocks = None
    if projector.has_names:
        names = paths(trainer.params)
        whitenings = zip(projector.blocks, projector.whitenings, strict=True)
        blocks = tuple(
            tuple(names[index] for index in block)
            for block, whitening in whitenings
            if isinstance(whitening, DenseWhitening)
        )
    passes = Passes(_COLUMNS if is_large else None, problem.jac)
    try:
        found = whitened(trainer, problem.batch, blocks, passes, {}, holds=True)
        again = reproject(trainer, found, None)
    except ValueError:
        again = whitened_without_signs(trainer, problem.batch, blocks, passes)
    except TypeError:
        # The solver needs the gradient of the loss alone.
        return None
    return None if again is None else (again.projector, again.latent)


def damped(projector: EigenProjector) -> EigenProjector:
    r"""Shortens steps, the more the less the data say of a direction.

    The scaled Fisher matrix $\Lambda$ becomes $\Lambda + 1$. See Marquardt, *An
    algorithm for least-squares estimation of nonlinear parameters* (1963).
    """
    dense = [w for w in projector.whitenings if isinstance(w, DenseWhitening)]
    # NumPy compiles nothing. A negative root marks a null direction.
    roots = [np.asarray(w.roots) for w in dense]
    short = [on_device(np.copysign(x / np.sqrt(1 + x * x), x)) for x in roots]
    return eqx.tree_at(
        lambda it: [w.roots for w in it.whitenings if isinstance(w, DenseWhitening)],
        projector,
        short,
    )


def whitened_without_signs(
    trainer: AbstractTrainer, batch: Any, blocks: Any, passes: Passes
) -> AbstractTrainer | None:
    """Whitens by the absolute curvature, where a Hessian curves downwards too.

    See Dauphin et al., *Identifying and attacking the saddle point problem in
    high-dimensional non-convex optimization* (2014).
    """
    matrix = fisher if has_likelihood(trainer) else curvature
    make = EigenProjector.from_fisher if blocks is None else EigenProjector.from_blocks
    try:
        found = jax.tree.map(_without_signs, matrix(trainer, batch, blocks, passes))
        made = make(found, trainer.params, on_null="prior")
        made = changed(made, _is_of_free=whitens_free(trainer))
        return reproject(trainer, made, None)
    except (TypeError, ValueError):
        # There is none, or it is not finite either.
        return None


def _without_signs(matrix: Array) -> Array:
    """Takes the absolute values of the eigenvalues of the scaled matrix."""
    scale = jnp.sqrt(jnp.abs(jnp.diag(matrix)))
    scale = jnp.where(scale > 0, scale, 1)
    rows, columns = scale[:, None], scale[None, :]
    values, vectors = jnp.linalg.eigh(matrix / columns / rows)
    return matmul(vectors * jnp.abs(values)[None, :], vectors.T) * columns * rows

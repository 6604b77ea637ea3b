"""One step, as a program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._devices import ANYWHERE, AbstractPlacement
from .._program import program
from .._step import (
    BATCH_BY_BATCH,
    AbstractTrainer,
    Progress,
    advance,
    progress_of,
    stepped_on,
    tree_norm,
    warn_of_sums,
    with_progress,
)
from .._tree import is_inexact


class StepInfo(NamedTuple):
    """What one step returned.

    **Attributes:**

    - `loss`: the loss at the parameters before the step.
    - `grad_norm`: the norm of its gradient in the model's own parameters.
    - `accepted`: whether the step was taken.
    - `stopped`: whether the trainer has stopped, and takes no further step.
    - `metrics`: the dictionary that the loss returned beside the scalar.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    accepted: Bool[Array, ""]
    stopped: Bool[Array, ""]
    metrics: dict[str, Any]


@program
def run_step(
    trainer: AbstractTrainer, batch: Any, place: AbstractPlacement = ANYWHERE
) -> tuple[Progress, StepInfo]:
    """Takes one step, unless the trainer has stopped."""
    # In an optimiser's state there may be a number that a user has put there.
    old = jax.tree.map(jnp.asarray, progress_of(trainer))
    start = with_progress(trainer, stepped_on(old, BATCH_BY_BATCH))
    warn_of_sums(start, batch)
    progress, outcome = advance(start, batch)
    norm = tree_norm(outcome.grads).astype(outcome.loss.dtype)
    blank_of = lambda x: jnp.full_like(x, jnp.nan if is_inexact(x) else 0)
    blank = lambda x: jnp.where(old.stopped, blank_of(x), x)
    info = StepInfo(
        outcome.loss,
        blank(norm),
        outcome.accepted,
        progress.stopped,
        jax.tree.map(blank, outcome.metrics),
    )
    return place.pin((progress, info))

"""One step, as a program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._devices import ANYWHERE, AbstractPlacement
from .._program import program
from .._step import (
    AbstractTrainer,
    Progress,
    advance,
    metric_shapes,
    progress_of,
    tree_norm,
    with_comparable_best,
    with_progress,
)


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

    def take() -> tuple[Progress, StepInfo]:
        start = with_comparable_best(progress_of(trainer), False)
        progress, outcome = advance(with_progress(trainer, start), batch)
        return progress, StepInfo(
            outcome.loss,
            tree_norm(outcome.grads).astype(outcome.loss.dtype),
            outcome.accepted,
            progress.stopped,
            outcome.metrics,
        )

    def stay() -> tuple[Progress, StepInfo]:
        nan, no = jnp.full_like(trainer.best_loss, jnp.nan), jnp.asarray(False)
        metrics = jax.tree.map(_blank, metric_shapes(trainer, batch))
        return progress_of(trainer), StepInfo(nan, nan, no, ~no, metrics)

    taken = jax.lax.cond(trainer.stopped, stay, take)
    return place.pin(taken)


def _blank(like: jax.ShapeDtypeStruct) -> Array:
    inexact = jnp.issubdtype(like.dtype, jnp.inexact)
    return jnp.full(like.shape, jnp.nan if inexact else 0, like.dtype)

"""The compiled parts of a fit: a chunk of steps, in one program, and a single step."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._data import Minibatches, Whole
from ._objective import metric_shapes
from ._record import Record, Rows
from ._step import Progress, advance, grad_norm


@eqx.filter_jit
def run_chunk(
    trainer: Any,
    source: Whole[Any] | Minibatches,
    count: Int[Array, ""],
    every: Int[Array, ""],
    record: Record,
    most_rows: int,
) -> tuple[Progress, Rows]:
    """Takes `count` steps, or fewer if the fit stops or the rows are full.

    The count is an array, and the rows are as many as there is room for, so that one
    program serves whatever the number of steps.
    """
    progress = trainer._progress
    last = progress.step_count + count

    def first_batch() -> Any:
        cursor = source.start(progress.step_count)
        return eqx.filter_eval_shape(source.next, cursor, progress.step_count)[0]

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        progress, cursor, rows = carry
        step = progress.step_count
        batch, cursor = source.next(cursor, step)
        new, outcome = advance(trainer._at(progress), batch)
        values = record.values(progress.params, outcome)
        return new, cursor, rows.add(outcome.loss, values, step % every == 0)

    def goes_on(carry: tuple[Any, ...]) -> Array:
        progress, _, rows = carry
        return (progress.step_count < last) & ~progress.stopped & ~rows.full

    cursor = source.start(progress.step_count)
    shapes = record.shapes(trainer, first_batch)
    rows = Rows.empty(progress.best_loss, shapes, most_rows)
    progress, _, rows = lax.while_loop(goes_on, body, (progress, cursor, rows))
    return progress, rows


class StepInfo(NamedTuple):
    """What one step tells of itself.

    **Attributes:**

    - `loss`: the loss at the parameters before the step.
    - `grad_norm`: the norm of its gradient in the model's own parameters.
    - `accepted`: whether the step was taken.
    - `stopped`: whether the trainer has stopped, and takes no further step.
    - `metrics`: what the loss returned beside the scalar.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    accepted: Bool[Array, ""]
    stopped: Bool[Array, ""]
    metrics: dict[str, Any]


@eqx.filter_jit
def run_step(trainer: Any, batch: Any) -> tuple[Progress, StepInfo]:
    """Takes one step, unless the trainer has stopped."""

    def take() -> tuple[Progress, StepInfo]:
        progress, outcome = advance(trainer, batch)
        return progress, StepInfo(
            outcome.loss,
            grad_norm(outcome.grads),
            outcome.accepted,
            progress.stopped,
            outcome.metrics,
        )

    def stay() -> tuple[Progress, StepInfo]:
        nan, no = jnp.full_like(trainer.best_loss, jnp.nan), jnp.asarray(False)
        metrics = jax.tree.map(_blank, metric_shapes(trainer, batch))
        return trainer._progress, StepInfo(nan, nan, no, ~no, metrics)

    return jax.lax.cond(trainer.stopped, stay, take)


def _blank(like: jax.ShapeDtypeStruct) -> Array:
    inexact = jnp.issubdtype(like.dtype, jnp.inexact)
    return jnp.full(like.shape, jnp.nan if inexact else 0, like.dtype)

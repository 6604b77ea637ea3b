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
    goal: Int[Array, ""],
    every: Int[Array, ""],
    record: Record,
    most_rows: int,
) -> tuple[Progress, Rows]:
    """Takes steps up to the count `goal`, or until the fit stops or the rows are full.

    The goal is an array, and the rows are as many as there is room for, so that one
    program serves whatever the number of steps.
    """
    start = trainer._progress
    cursor = source.start(start.step_count)

    def first_batch() -> Any:
        return eqx.filter_eval_shape(source.next, cursor, start.step_count)[0]

    shapes = record.shapes(trainer, first_batch)
    rows = Rows.empty(start.best_loss, shapes, most_rows)
    first_row = -(-start.step_count // every)
    end = jnp.minimum(goal, _times(first_row + rows.room, every))

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        progress, cursor, rows = carry
        step = progress.step_count
        batch, cursor = source.next(cursor, step)
        new, outcome = advance(trainer._at(progress), batch)
        values = record.values(progress.params, outcome)
        row = jnp.where(step % every == 0, step // every - first_row, rows.room)
        return new, cursor, rows.put(row, outcome.loss, values)

    def goes_on(carry: tuple[Any, ...]) -> Array:
        progress, *_ = carry
        return (progress.step_count < end) & ~progress.stopped

    progress, _, rows = lax.while_loop(goes_on, body, (start, cursor, rows))
    return progress, rows


def _times(a: Int[Array, ""], b: Int[Array, ""]) -> Int[Array, ""]:
    most = jnp.iinfo(a.dtype).max
    return jnp.where(a > most // b, most, a * b)


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

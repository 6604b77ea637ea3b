"""The compiled parts of a fit: a chunk of steps, in one program, and a single step."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._data import Minibatches, Whole
from ._monitor import Monitor, MonitorState
from ._objective import metric_shapes
from ._record import Record, Rows
from ._step import Progress, advance, scored_anew, tree_norm


class Chunk(NamedTuple):
    """What a chunk of steps comes to."""

    progress: Progress
    watched: MonitorState | None
    rows: Rows
    scores: Rows | None


@eqx.filter_jit
def run_chunk(
    trainer: Any,
    source: Whole[Any] | Minibatches,
    monitor: Monitor,
    watched: MonitorState | None,
    goal: Int[Array, ""],
    every: Int[Array, ""],
    record: Record,
    most_rows: int,
) -> Chunk:
    """Takes steps up to the count `goal`, or until the fit stops or the rows are full.

    The goal is an array, and the rows are as many as there is room for, so that one
    program serves whatever the number of steps.
    """
    start = scored_anew(trainer._progress, monitor.validates)
    cursor = source.start(start.step_count)

    def first_batch() -> Any:
        return eqx.filter_eval_shape(source.next, cursor, start.step_count)[0]

    shapes, step = record.shapes(trainer, first_batch), start.step_count
    rows = Rows.empty(start.best_loss, shapes, step, every, most_rows)
    end, scores = jnp.minimum(goal, rows.end), None
    if monitor.validation is not None:
        per = monitor.validation.every
        # A score is of the parameters after a step, a row of those before one.
        scores = Rows.empty(start.best_loss, {}, step + 1, per, most_rows)
        end = jnp.minimum(end, scores.end - 1)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        progress, watched, cursor, rows, scores = carry
        batch, cursor = source.next(cursor, progress.step_count)
        there = trainer._at(progress)
        new, outcome = advance(there, batch, by_validation=monitor.validates)
        values = record.values(progress.params, new.params, outcome)
        rows = rows.put(progress.step_count, outcome.loss, values)
        if watched is not None:
            new, watched = monitor.look(trainer._at(new), outcome, watched)
            if scores is not None:
                scores = scores.put(new.step_count, watched.score, {})
        return new, watched, cursor, rows, scores

    def goes_on(carry: tuple[Any, ...]) -> Array:
        progress, watched, *_ = carry
        within = (progress.step_count < end) & ~progress.stopped
        return within if watched is None else within & ~watched.is_over

    carry = (start, watched, cursor, rows, scores)
    progress, watched, _, rows, scores = lax.while_loop(goes_on, body, carry)
    return Chunk(progress, watched, rows, scores)


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
        there = trainer._at(scored_anew(trainer._progress, False))
        progress, outcome = advance(there, batch)
        return progress, StepInfo(
            outcome.loss,
            tree_norm(outcome.grads),
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

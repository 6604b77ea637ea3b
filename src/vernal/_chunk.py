"""The compiled part of a fit: a chunk of steps, in one program of fixed capacity."""

from typing import Any

import equinox as eqx
import jax.lax as lax
from jaxtyping import Array, Int

from ._data import Minibatches, Whole
from ._record import Record, Rows
from ._step import Progress, advance


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

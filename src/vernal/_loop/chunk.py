"""The compiled parts of a fit: a chunk of steps, in one program, and a single step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._data import Minibatches, Whole
from .._devices import AbstractPlacement
from .._program import program
from .._step import (
    AbstractTrainer,
    Progress,
    advance,
    with_comparable_best,
    with_progress,
)
from .monitor import Monitor, MonitorState
from .record import Record
from .rows import Rows


class Chunk(NamedTuple):
    """What a chunk of steps comes to."""

    progress: Progress
    watched: MonitorState | None
    rows: Rows
    scores: Rows | None
    has_accepted: Bool[Array, ""] | Bool[Array, " members"]

    @property
    def moving(self) -> "Moving":
        """What the next chunk goes on from."""
        return Moving(self.progress, self.watched)


class Moving(NamedTuple):
    """What a chunk changes."""

    progress: Progress
    watched: MonitorState | None


class Task(NamedTuple):
    """What a chunk is given beside that: it stays as it is.

    The goal is an array, and the rows are as many as there is room for, so that one
    program serves whatever the number of steps.
    """

    trainer: AbstractTrainer
    """Without its progress."""
    source: Whole[Any] | Minibatches
    monitor: Monitor
    record: Record
    goal: Int[Array, ""]
    every: Int[Array, ""]
    most_rows: int


class Ended(NamedTuple):
    """Where a chunk ended, in arrays of its own: the progress may be donated."""

    step_count: Int[Array, ""]
    is_over: Bool[Array, ""]
    has_accepted: Bool[Array, ""]

    @classmethod
    def of(cls, chunk: Chunk) -> "Ended":
        over = is_over(*chunk.moving)
        count = jnp.copy(chunk.progress.step_count)
        return cls(count, jnp.copy(over), chunk.has_accepted)


def chunk_of_one(
    task: Task, moving: Moving, place: AbstractPlacement
) -> tuple[Chunk, Ended]:
    """Takes steps up to the count `goal`, or until it stops or the rows are full."""
    trainer, source, monitor, record = task[:4]
    start = with_comparable_best(moving.progress, monitor.validates)
    step = start.step_count

    def take(
        progress: Progress, watched: MonitorState | None, batch: Any, is_due: Array
    ) -> Taken:
        if isinstance(source, Minibatches):
            batch = place.pin_batch(batch)
        taken = take_one(
            with_progress(trainer, progress), watched, batch, is_due, monitor, record
        )
        return place.pin(taken)

    def first_batch() -> Any:
        cursor = source.start(step)
        return eqx.filter_eval_shape(source.next, cursor, step)[0]

    shapes = record.shapes(with_progress(trainer, start), first_batch)
    rows = Rows.empty(start.best_loss, shapes, step, task.every, task.most_rows)
    scores = monitor.room(start.best_loss, step, task.most_rows)
    none_yet = jnp.zeros_like(start.stopped)
    chunk = Chunk(start, moving.watched, rows, scores, none_yet)
    chunk = run_loop(take, source, monitor, task.goal, step, chunk)
    # The next chunk is the same program if it finds everything where this one did.
    chunk = place.pin(chunk)
    return chunk, Ended.of(chunk)


class Taken(NamedTuple):
    """What a step comes to."""

    progress: Progress
    watched: MonitorState | None
    loss: Array
    values: dict[str, Array]
    accepted: Bool[Array, ""]


def take_one(
    trainer: AbstractTrainer,
    watched: MonitorState | None,
    batch: Any,
    is_due: Bool[Array, ""],
    monitor: Monitor,
    record: Record,
) -> Taken:
    """Takes one step of a trainer, and looks at it."""
    old = trainer.params
    new, outcome = advance(trainer, batch, by_validation=monitor.validates)
    values = record.values(old, new.params, outcome)
    if watched is not None:
        new, watched = monitor.look(
            with_progress(trainer, new), outcome, watched, is_due
        )
    return Taken(new, watched, outcome.loss, values, outcome.accepted)


def is_over(
    progress: Progress, watched: MonitorState | None
) -> Bool[Array, ""] | Bool[Array, " members"]:
    """Whether there are no more steps to be taken, of each member if there are many."""
    if watched is None:
        return progress.stopped
    return progress.stopped | watched.is_over


def run_loop(
    take: Callable[..., Taken],
    source: Whole[Any] | Minibatches,
    monitor: Monitor,
    goal: Int[Array, ""],
    step: Int[Array, ""],
    start: Chunk,
) -> Chunk:
    """Takes steps, of one trainer or of many at once, until all are over.

    **Arguments:**

    - `take`: takes one step.
    - `source`, `monitor`: of the fit.
    - `goal`: how many steps there will be.
    - `step`: how many there have been.
    - `start`: where to start from, with empty rows.
    """
    end = jnp.minimum(goal, start.rows.end)
    if start.scores is not None:
        # A score is of the parameters after a step, a row of those before one.
        end = jnp.minimum(end, start.scores.end - 1)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        chunk, cursor, step = carry
        batch, cursor = source.next(cursor, step)
        is_due = monitor.is_due(step + 1)
        taken = take(chunk.progress, chunk.watched, batch, is_due)
        rows, scores = chunk.rows.put(step, taken.loss, taken.values), chunk.scores
        if scores is not None and taken.watched is not None:
            scores = scores.put(step + 1, taken.watched.score, {})
        has_accepted = chunk.has_accepted | taken.accepted
        chunk = Chunk(taken.progress, taken.watched, rows, scores, has_accepted)
        return chunk, cursor, step + 1

    def goes_on(carry: tuple[Any, ...]) -> Array:
        chunk, _, step = carry
        return (step < end) & ~jnp.all(is_over(chunk.progress, chunk.watched))

    chunk, _, _ = lax.while_loop(goes_on, body, (start, source.start(step), step))
    return chunk


run_chunk = program(chunk_of_one)

# The same where what it goes on from is not needed any more: there the memory is used
# again, and what it was is gone.
run_chunk_in_place = program(chunk_of_one, donate="all-except-first")

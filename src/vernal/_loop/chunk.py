"""A chunk of a fit: many steps in one program."""

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


class LoopState(NamedTuple):
    """What the steps of a fit change."""

    progress: Progress
    monitor_state: MonitorState | None

    @property
    def is_over(self) -> Bool[Array, "*members"]:
        """Whether there are no more steps to take, for each member of many."""
        if self.monitor_state is None:
            return self.progress.stopped
        return self.progress.stopped | self.monitor_state.is_over


class Chunk(NamedTuple):
    """The result of a chunk of steps."""

    state: LoopState
    rows: Rows
    scores: Rows | None
    has_accepted: Bool[Array, "*members"]


class Task(NamedTuple):
    """What a chunk reads and does not change.

    The goal is an array, and the number of rows does not depend on it, so that one
    program serves any number of steps.
    """

    trainer: AbstractTrainer
    """Without its progress."""
    source: Whole[Any] | Minibatches
    monitor: Monitor
    record: Record
    goal: Int[Array, ""]
    every: Int[Array, ""]
    most_rows: int

    def shapes(self, progress: Progress, step: Int[Array, ""]) -> dict[str, Any]:
        """Returns the shapes of what is recorded of a step."""
        source = self.source
        batch = lambda: eqx.filter_eval_shape(source.next, source.start(step), step)[0]
        return self.record.shapes(with_progress(self.trainer, progress), batch)

    def begin(
        self, state: LoopState, shapes: dict[str, Any], step: Int[Array, ""]
    ) -> Chunk:
        """Returns a chunk without steps: its rows are empty."""
        like, most = state.progress.best_loss, self.most_rows
        rows = Rows.empty(like, shapes, step, self.every, most)
        scores = self.monitor.room(like, step, most)
        return Chunk(state, rows, scores, jnp.zeros_like(state.progress.stopped))


class Ended(NamedTuple):
    """Where a chunk ended, in arrays of its own: the progress may be donated."""

    step_count: Int[Array, "*members"]
    is_over: Bool[Array, "*members"]
    has_accepted: Bool[Array, "*members"]

    @classmethod
    def of(cls, chunk: Chunk) -> "Ended":
        is_over, count = chunk.state.is_over, chunk.state.progress.step_count
        return cls(jnp.copy(count), jnp.copy(is_over), chunk.has_accepted)


class Taken(NamedTuple):
    """The result of one step."""

    state: LoopState
    loss: Array
    values: dict[str, Array]
    accepted: Bool[Array, "*members"]


def chunk_of_one(
    task: Task, state: LoopState, place: AbstractPlacement
) -> tuple[Chunk, Ended]:
    """Takes steps up to the count `goal`, or until it stops or the rows are full."""
    start = with_comparable_best(state.progress, task.monitor.validates)
    step = start.step_count

    def take(state: LoopState, batch: Any, is_due: Array) -> Taken:
        if isinstance(task.source, Minibatches):
            batch = place.pin_batch(batch)
        return place.pin(take_one(task, state, batch, is_due))

    state = state._replace(progress=start)
    chunk = run_loop(
        take, task, task.begin(state, task.shapes(start, step), step), step
    )
    # The next chunk is the same program if it finds everything where this one did.
    chunk = place.pin(chunk)
    return chunk, Ended.of(chunk)


def take_one(
    task: Task, state: LoopState, batch: Any, is_due: Bool[Array, ""]
) -> Taken:
    """Takes one step of one trainer, and monitors it."""
    trainer, monitor = with_progress(task.trainer, state.progress), task.monitor
    old, monitor_state = trainer.params, state.monitor_state
    new, outcome = advance(trainer, batch, by_validation=monitor.validates)
    values = task.record.values(old, new.params, outcome)
    if monitor_state is not None:
        after = with_progress(trainer, new)
        new, monitor_state = monitor.look(after, outcome, monitor_state, is_due)
    state = LoopState(new, monitor_state)
    return Taken(state, outcome.loss, values, outcome.accepted)


def run_loop(
    take: Callable[[LoopState, Any, Array], Taken],
    task: Task,
    start: Chunk,
    step: Int[Array, ""],
) -> Chunk:
    """Takes steps, of one trainer or of many at once, until all are over.

    `take(state, batch, is_due)` takes one step. `start` has empty rows, and `step` is
    the number of steps taken before.
    """
    source, end = task.source, jnp.minimum(task.goal, start.rows.end)
    if start.scores is not None:
        # A score is of the parameters after a step, a row of those before one.
        end = jnp.minimum(end, start.scores.end - 1)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        chunk, cursor, step = carry
        batch, cursor = source.next(cursor, step)
        taken = take(chunk.state, batch, task.monitor.is_due(step + 1))
        rows, scores = chunk.rows.put(step, taken.loss, taken.values), chunk.scores
        monitor_state = taken.state.monitor_state
        if scores is not None and monitor_state is not None:
            scores = scores.put(step + 1, monitor_state.score, {})
        has_accepted = chunk.has_accepted | taken.accepted
        return Chunk(taken.state, rows, scores, has_accepted), cursor, step + 1

    def goes_on(carry: tuple[Any, ...]) -> Array:
        chunk, _, step = carry
        return (step < end) & ~jnp.all(chunk.state.is_over)

    chunk, _, _ = lax.while_loop(goes_on, body, (start, source.start(step), step))
    return chunk


run_chunk = program(chunk_of_one)

# Uses the memory of the state again, whose arrays are gone afterwards.
run_chunk_in_place = program(chunk_of_one, donate="all-except-first")

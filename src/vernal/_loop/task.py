"""Many steps in one loop: what it reads, what it changes, and what it returns."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._data import Minibatches, Whole, batch_shapes
from .._step import (
    AbstractTrainer,
    Outcome,
    Progress,
    advance,
    warn_of_sums,
    with_progress,
)
from .monitor import Monitor, MonitorState
from .record import Record
from .rows import Rows

Guard = Literal["always", "bad steps", "never"]


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
    state: LoopState
    rows: Rows
    scores: Rows | None
    has_accepted: Bool[Array, "*members"]
    needs_guard: Bool[Array, "*members"]
    """Whether the next step has to be guarded, and this program has no guard."""


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
    guard: Guard = "always"
    """Which steps are guarded. A bad one that is not ends the chunk before it."""
    is_on_one_cpu: bool = False
    """Whether all arrays are there, so that small ones need not be shared."""

    def shapes(self, progress: Progress, step: Int[Array, ""]) -> dict[str, Any]:
        """Looks at the loss; returns the shapes of what is recorded of a step."""
        trainer = with_progress(self.trainer, progress)
        batch = batch_shapes(self.source, step)
        validation = self.monitor.validation
        warn_of_sums(trainer, batch, validation and validation.batch)
        return self.record.shapes(trainer, lambda: batch)

    def begin(
        self, state: LoopState, shapes: dict[str, Any], step: Int[Array, ""]
    ) -> Chunk:
        """Returns a chunk without steps: its rows are empty."""
        like, most = state.progress.best_loss, self.most_rows
        rows = Rows.empty(like, shapes, step, self.every, most)
        scores, no = None, state.progress.stopped & False
        if (validation := self.monitor.validation) is not None:
            scores = Rows.empty(like, {}, step + 1, validation.every, most)
        return Chunk(state, rows, scores, no, no)

    def end(self, start: Chunk) -> Int[Array, ""]:
        """Returns the step to stop before: the goal, or where a row is missing."""
        end = jnp.minimum(self.goal, start.rows.end)
        if start.scores is not None:
            # A score is of the parameters after a step, a row of those before one.
            end = jnp.minimum(end, start.scores.end - 1)
        return end


class Ended(NamedTuple):
    """Where a chunk ended, in arrays of its own: the progress may be donated."""

    step_count: Int[Array, "*members"]
    is_over: Bool[Array, "*members"]
    has_accepted: Bool[Array, "*members"]
    needs_guard: Bool[Array, "*members"]

    @classmethod
    def of(cls, chunk: Chunk) -> "Ended":
        is_over, count = chunk.state.is_over, chunk.state.progress.step_count
        flags = chunk.has_accepted, chunk.needs_guard
        return cls(jnp.copy(count), jnp.copy(is_over), *flags)


class Taken(NamedTuple):
    state: LoopState
    loss: Array
    values: dict[str, Array]
    accepted: Bool[Array, "*members"]


def take_one(
    task: Task,
    state: LoopState,
    batch: Any,
    is_due: Bool[Array, ""],
    members: str | None = None,
) -> Taken:
    """Takes one step of one trainer, or of one of many, and monitors it."""
    trainer = with_progress(task.trainer, state.progress)
    ranks = task.monitor.validation is None
    new, outcome = advance(trainer, batch, ranks=ranks, members=members)
    return monitored(task, state, new, outcome, is_due)


def monitored(
    task: Task,
    state: LoopState,
    new: Progress,
    outcome: Outcome,
    is_due: Bool[Array, ""],
) -> Taken:
    """Records a step that led from `state` to a new progress, and monitors it."""
    values = task.record.values(state.progress.params, new.params, outcome)
    monitor_state = state.monitor_state
    if monitor_state is not None:
        after = with_progress(task.trainer, new)
        new, monitor_state = task.monitor.look(after, outcome, monitor_state, is_due)
    state = LoopState(new, monitor_state)
    return Taken(state, outcome.loss, values, outcome.accepted)


def recorded(chunk: Chunk, step: Int[Array, ""], taken: Taken) -> Chunk:
    """Returns a chunk with one step more."""
    rows, scores = chunk.rows.put(step, taken.loss, taken.values), chunk.scores
    monitor_state = taken.state.monitor_state
    if scores is not None and monitor_state is not None:
        scores = scores.put(step + 1, monitor_state.score, {})
    has_accepted = chunk.has_accepted | taken.accepted
    return Chunk(taken.state, rows, scores, has_accepted, chunk.needs_guard)


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
    source, end = task.source, task.end(start)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        chunk, cursor, step = carry
        batch, cursor = source.next(cursor, step)
        taken = take(chunk.state, batch, task.monitor.is_due(step + 1))
        return recorded(chunk, step, taken), cursor, step + 1

    def goes_on(carry: tuple[Any, ...]) -> Array:
        chunk, _, step = carry
        return (step < end) & ~jnp.all(chunk.state.is_over)

    chunk, _, _ = lax.while_loop(goes_on, body, (start, source.start(step), step))
    return chunk

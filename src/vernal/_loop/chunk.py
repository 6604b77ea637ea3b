"""A chunk of a fit: many steps in one program."""

from typing import Any

from jaxtyping import Array

from .._data import Minibatches
from .._devices import AbstractPlacement
from .._program import program
from .blocks import bare_step, run_blocks
from .small import run_small_loop
from .task import Chunk, Ended, LoopState, Taken, Task, run_loop, take_one


def chunk_of_one(
    task: Task, state: LoopState, place: AbstractPlacement
) -> tuple[Chunk, Ended]:
    """Takes steps up to the count `goal`, or until it stops or the rows are full."""
    start, step = state.progress, state.progress.step_count

    def take(state: LoopState, batch: Any, is_due: Array) -> Taken:
        if isinstance(task.source, Minibatches):
            batch = place.pin_batch(batch)
        return place.pin(take_one(task, state, batch, is_due))

    begun = task.begin(state, task.shapes(start, step), step)
    is_split = place.mesh is not None
    chunk = None if is_split else run_small_loop(take, task, begun, step)
    if chunk is None:
        bare = None if is_split else bare_step(task, state, step)
        chunk = (
            run_loop(take, task, begun, step)
            if bare is None
            else run_blocks(bare, take, task, begun, step)
        )
    # The next chunk is the same program if it finds everything where this one did.
    chunk = place.pin(chunk)
    return chunk, Ended.of(chunk)


run_chunk = program(chunk_of_one)

# Uses the memory of the state again, whose arrays are gone afterwards.
run_chunk_in_place = program(chunk_of_one, in_place=True)

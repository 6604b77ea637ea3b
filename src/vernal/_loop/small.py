"""Steps over small arrays, in a loop that is compiled as one function."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Int

from .._data import batch_shapes
from .._program import MOST_BYTES, as_one_function
from .task import Chunk, LoopState, Taken, Task, run_loop

# How many bytes the state and a batch may have. Of a model that is larger the loop is
# hardly ever small, and its loss would be traced twice to find that out.
MOST_READ = MOST_BYTES // 16


def run_small_loop(
    take: Callable[[LoopState, Any, Array], Taken],
    task: Task,
    start: Chunk,
    step: Int[Array, ""],
) -> Chunk | None:
    """Does what `run_loop` does, or returns `None` if the arrays are too large."""
    if not task.is_on_one_cpu or _read(task, start, step) > MOST_READ:
        return None
    loop = lambda start, step: run_loop(take, task, start, step)
    return as_one_function(loop, start, step)


def _read(task: Task, start: Chunk, step: Int[Array, ""]) -> int:
    """Counts the bytes of the state and of a batch."""
    batch = batch_shapes(task.source, step)
    is_array = lambda x: isinstance(x, jax.Array | jax.ShapeDtypeStruct)
    arrays = filter(is_array, jax.tree.leaves((start.state, batch)))
    return sum(x.size * x.dtype.itemsize for x in arrays)

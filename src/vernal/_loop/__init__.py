"""Many steps in one compiled program."""

from .chunk import (
    Chunk as Chunk,
    Ended as Ended,
    LoopState as LoopState,
    Taken as Taken,
    Task as Task,
    run_chunk as run_chunk,
    run_chunk_in_place as run_chunk_in_place,
    run_loop as run_loop,
    take_one as take_one,
)
from .monitor import Monitor as Monitor, MonitorState as MonitorState
from .record import (
    COLUMNS as COLUMNS,
    GRAD_NORM as GRAD_NORM,
    LackingMetricError as LackingMetricError,
    Record as Record,
)
from .rows import MOST_ROWS as MOST_ROWS, Rows as Rows
from .single_step import StepInfo as StepInfo, run_step as run_step
from .unroll import unroll as unroll

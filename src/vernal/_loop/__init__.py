"""Many steps in one compiled program."""

from .chunk import (
    Chunk,
    Ended,
    LoopState,
    Taken,
    Task,
    run_chunk,
    run_chunk_in_place,
    run_loop,
    take_one,
)
from .monitor import Monitor, MonitorState
from .record import COLUMNS, GRAD_NORM, LackingMetricError, Record
from .rows import MOST_ROWS, Rows
from .single_step import StepInfo, run_step
from .unroll import unroll

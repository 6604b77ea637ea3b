"""Many steps in one compiled program."""

from .chunk import (
    Chunk,
    Ended,
    Moving,
    StepInfo,
    Taken,
    Task,
    is_over,
    run_chunk,
    run_chunk_in_place,
    run_loop,
    run_step,
    take_one,
)
from .monitor import Monitor, MonitorState
from .record import COLUMNS, GRAD_NORM, MOST_ROWS, LackingMetricError, Record, Rows

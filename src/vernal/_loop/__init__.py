"""Many steps in one compiled program."""

from .chunk import run_chunk, run_chunk_in_place
from .monitor import Monitor, MonitorState
from .record import COLUMNS, GRAD_NORM, LackingMetricError, Record
from .rows import MOST_ROWS, Rows
from .single_step import StepInfo, run_step
from .small import run_small_loop
from .task import Chunk, Ended, Guard, LoopState, Taken, Task, run_loop, take_one
from .unroll import unroll

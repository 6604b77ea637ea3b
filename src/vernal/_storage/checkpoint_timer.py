"""When a checkpoint is due."""

import datetime
import time


class CheckpointTimer:
    """Counts the steps, or the time, since the last checkpoint."""

    def __init__(self, every: int | datetime.timedelta):
        self._every, self.last_step = every, 0
        self._last_time = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether it is time for the next checkpoint."""
        if isinstance(self._every, datetime.timedelta):
            since = time.monotonic() - self._last_time
            return since >= self._every.total_seconds()
        return step // self._every > self.last_step // self._every

    def restart(self, step: int) -> None:
        """Counts from now, when a checkpoint of this step is written."""
        self.last_step, self._last_time = step, time.monotonic()

"""How many steps a chunk of a fit has."""

# How many seconds a chunk should take: short enough for a progress bar and for Ctrl-C.
# A chunk of a large model takes longer: it begins with copies of it, in new memory.
_SECONDS, _MOST_SECONDS = 0.5, 2.0
_LEAST_RATIO = 20
_MAX_GROWTH = 100


class Pace:
    """Finds the number of steps of the next chunk from the times of those before."""

    def __init__(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._overhead: float | None = None

    def next(self, steps: int, seconds: float) -> int:
        """Returns the number of steps, after a chunk that took so many seconds."""
        added = seconds - self._seconds
        if steps >= 2 * self._steps > 0 and added > 0:
            per_step = added / (steps - self._steps)
            self._overhead = max(seconds - steps * per_step, 0.0)
        self._steps, self._seconds = steps, seconds
        overhead = self._overhead or 0.0
        goal = min(max(_SECONDS, _LEAST_RATIO * overhead), _MOST_SECONDS)
        growth = (goal - overhead) / max(seconds - overhead, 1e-6)
        if self._overhead is None and 2 * seconds <= _MOST_SECONDS:
            growth = max(growth, 2)  # it is measured by two chunks of different size
        # However little a step seems to take beside the rest, which varies.
        growth = min(growth, _MOST_SECONDS / max(seconds, 1e-6), _MAX_GROWTH)
        return max(1, int(steps * growth))

"""How many steps a chunk of a fit has."""

from collections.abc import Hashable

# How many seconds a chunk should take: short enough for a progress bar and for Ctrl-C.
# A chunk of a large model takes longer: it begins with copies of it, in new memory.
_SECONDS, _MOST_SECONDS = 0.5, 2.0
_LEAST_RATIO = 20
_MAX_GROWTH = 100

# How many seconds a step took in the last chunk of each kind of fit.
_known: dict[Hashable, float] = {}
_MOST_KINDS = 512


class Pace:
    """Finds the number of steps of the next chunk from the times of those before.

    It goes on from those of the last fit of the same kind, unless that is `None`.
    """

    def __init__(self, kind: Hashable = None) -> None:
        self._kind = kind
        self._steps, self._seconds = 0, 0.0
        self._overhead: float | None = None

    def first(self) -> int:
        """Returns the number of steps of the first chunk.

        It is one where nothing is known: it may be slow, and has to be compiled. Else
        it takes half as long as the next, which tells its overhead.
        """
        per_step = _known.get(self._kind, _SECONDS)
        return max(1, int(_SECONDS / 2 / max(per_step, 1e-6)))

    def next(self, steps: int, seconds: float) -> int:
        """Returns the number of steps, after a chunk that took so many seconds."""
        if self._kind is not None:
            if len(_known) >= _MOST_KINDS:
                _known.clear()
            _known[self._kind] = seconds / steps
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

"""Which compiled programs are kept, and which have to go."""

import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

V = TypeVar("V")

# Programs of one kind differ in the closure or the class that they were made for. Each
# takes some megabytes, and JAX never lets go of a class, so that nothing tells whether
# it is still of use. Hence the last ones are kept.
MOST_OF_A_KIND = 24

# Those that were dropped and then needed again are kept beside these.
MOST_MISSED = 128

_MOST_DROPPED = 4_096


class Shelves(Generic[V]):
    """Keeps the values of each kind that were used last.

    What was dropped and comes back is used in turns with many others. It goes to a
    shelf of its own, where those that are used once cannot drive it out.
    """

    def __init__(self, on_drop: Callable[[Any, V], None]):
        """**Arguments:**

        - `on_drop`: called with each key and value that has to go.
        """
        self._on_drop = on_drop
        self._values: dict[Hashable, V] = {}
        self._shelf_of: dict[Hashable, dict[Hashable, None]] = {}
        self._shelves: dict[Hashable, dict[Hashable, None]] = {}
        self._missed: dict[Hashable, None] = {}
        # Their hashes, which keep nothing alive.
        self._dropped: dict[int, None] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        """Returns a value, which counts as used now."""
        value = self._values.get(key)
        if value is not None:
            shelf = self._shelf_of.get(key)
            if shelf and next(reversed(shelf), key) is not key:
                with self._lock:
                    if key in shelf:
                        shelf[key] = shelf.pop(key)
        return value

    def put(self, key: Hashable, value: V, kind: Hashable) -> V:
        """Keeps a value, and drops the one of its kind that was used longest ago.

        **Returns:**

        The value that is kept: another one if another thread was faster.
        """
        with self._lock:
            if key in self._values:
                return self._values[key]
            if hash(key) in self._dropped:
                shelf, most = self._missed, MOST_MISSED
            else:
                shelf, most = self._shelves.setdefault(kind, {}), MOST_OF_A_KIND
            shelf[key] = None
            self._values[key], self._shelf_of[key] = value, shelf
            old = list(shelf)[: max(len(shelf) - most, 0)]
            gone = [(each, self._take_off(each)) for each in old]
        for each in gone:
            self._on_drop(*each)
        return value

    def _take_off(self, key: Hashable) -> V:
        del self._shelf_of.pop(key)[key]
        self._dropped[hash(key)] = None
        if len(self._dropped) > _MOST_DROPPED:
            del self._dropped[next(iter(self._dropped))]
        return self._values.pop(key)

    def values(self) -> list[V]:
        """Returns all that is kept."""
        return list(self._values.values())

    def clear(self) -> None:
        """Drops everything."""
        with self._lock:
            gone = list(self._values.items())
            for held in self._values, self._shelf_of, self._shelves, self._missed:
                held.clear()
            self._dropped.clear()
        for each in gone:
            self._on_drop(*each)

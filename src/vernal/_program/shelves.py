"""Which compiled programs are kept, and which are dropped."""

import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

V = TypeVar("V")

# Programs of one kind differ in the closure or the class that they were made for. Each
# takes a few megabytes. JAX keeps every class alive, so it is not known whether a
# program is still needed: the programs used last are kept.
MOST_OF_A_KIND = 24

# Classes may have a new name each time, so that each is its own kind.
MOST_KINDS = 32

# Programs that were dropped and then needed again are kept on a shelf of their own.
MOST_MISSED = 128

_MOST_DROPPED = 4_096

_MISSED = object()


class Shelves(Generic[V]):
    """Keeps the values that were used last: some of each kind, of some kinds.

    A value that is needed again after it was dropped is used in turn with many others.
    It goes to a separate shelf, where values that are used once cannot displace it.
    """

    def __init__(self, on_drop: Callable[[Any, V], None]):
        """`on_drop` is called with each key and value that is dropped."""
        self._on_drop = on_drop
        self._kinds: dict[Hashable, Hashable] = {}
        self._shelves: dict[Hashable, dict[Hashable, V]] = {}
        # Their hashes, which keep nothing alive.
        self._dropped: dict[int, None] = {}
        # Garbage may be collected while it is held, and finalisers may call anything.
        self._lock = threading.RLock()

    def get(self, key: Hashable) -> V | None:
        """Returns a value, if it is kept, which counts as a use of it."""
        with self._lock:
            if key not in self._kinds:
                return None
            shelf = self._shelf(self._kinds[key])
            value = shelf[key] = shelf.pop(key)
            return value

    def _shelf(self, kind: Hashable) -> dict[Hashable, V]:
        shelf = self._shelves[kind] = self._shelves.pop(kind, {})
        return shelf

    def put(self, key: Hashable, value: V, kind: Hashable) -> V:
        """Keeps a value. Drops the one of its kind, or the kind, used longest ago.

        Returns the value that is kept: another one if another thread was faster.
        """
        with self._lock:
            if (kept := self.get(key)) is not None:
                return kept
            if hash(key) in self._dropped:
                kind = _MISSED
            shelf, old = self._shelf(kind), []
            shelf[key], self._kinds[key] = value, kind
            kinds = [each for each in self._shelves if each is not _MISSED]
            if len(shelf) > (MOST_MISSED if kind is _MISSED else MOST_OF_A_KIND):
                old = [next(iter(shelf))]
            elif len(kinds) > MOST_KINDS:
                old = list(self._shelves[kinds[0]])
            gone = [(each, self._take_off(each)) for each in old]
        for each in gone:
            self._on_drop(*each)
        return value

    def _take_off(self, key: Hashable) -> V:
        self._dropped[hash(key)] = None
        if len(self._dropped) > _MOST_DROPPED:
            del self._dropped[next(iter(self._dropped))]
        kind = self._kinds.pop(key)
        value = self._shelves[kind].pop(key)
        if not self._shelves[kind]:
            del self._shelves[kind]
        return value

    def items(self) -> list[tuple[Any, V]]:
        """Returns all that is kept, with its keys."""
        with self._lock:
            return [x for shelf in self._shelves.values() for x in shelf.items()]

    def clear(self) -> None:
        with self._lock:
            gone = self.items()
            for held in self._kinds, self._shelves, self._dropped:
                held.clear()
        for each in gone:
            self._on_drop(*each)

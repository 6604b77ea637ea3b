"""What objects held when they were looked at, and whether they still do."""

import hashlib
import operator
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .equality import Hashed, Same

# NumPy arrays up to this size are compared as a whole, larger ones by a sample of
# elements, evenly spread.
MOST_BYTES = 2**20
_SAMPLE = 4_096

# So many slots that programs write to are known.
_MOST_KEPT = 1_024

# Raised where an object changes while it is looked at.
_GONE = (KeyError, IndexError, AttributeError, RuntimeError, ValueError)

Look = Callable[[Any], tuple[Any, ...]]
"""Returns what an object holds."""

Names = Callable[[Any], Sequence[Hashable]]
"""Returns the names under which an object holds it."""

Slot = tuple[int, Hashable]
"""Where a value is read: the id of what holds it, and its name there."""


class Watch(NamedTuple):
    """What one object held when it was looked at, to be compared by identity."""

    look: Look
    owner: Any
    names: Sequence[Hashable]
    values: tuple[Any, ...]
    names_of: Names
    """Returns the names that there are now."""

    def changed(self) -> Iterator[Slot]:
        """Yields the slots that have another value now."""
        try:
            now, names = self.look(self.owner), self.names_of(self.owner)
        except _GONE:
            return
        if len(now) != len(names):
            # A list, for instance, whose elements have no lasting names.
            yield id(self.owner), None
            return
        old = dict(zip(self.names, self.values, strict=True))
        for name, value in zip(names, now, strict=True):
            if name not in old or old[name] is not value:
                yield id(self.owner), name


class Reads(NamedTuple):
    """What was found: `key` compares it by value, `watches` by identity."""

    key: Hashed
    watches: list[Watch]

    def is_current(self) -> bool:
        """Whether nothing of what was read has changed."""
        # It runs before every call of a program: each function call counts.
        try:
            for look, owner, _, values, _ in self.watches:
                now = look(owner)
                if len(now) != len(values) or not all(map(operator.is_, now, values)):
                    return False
        except _GONE:
            return False
        return True


class Kept:
    """The slots that programs write to while they are made or run.

    A counter or a list of what was traced is not something a program is made from.
    """

    def __init__(self) -> None:
        self._owners: dict[Slot, Any] = {}
        self._lock = threading.RLock()

    def __contains__(self, slot: Slot) -> bool:
        return slot in self._owners

    def add(self, watch: Watch) -> None:
        changed = list(watch.changed())
        with self._lock:
            # The owner is held, so that no other object takes its id.
            self._owners.update(dict.fromkeys(changed, watch.owner))
            while len(self._owners) > _MOST_KEPT:
                del self._owners[next(iter(self._owners))]

    def clear(self) -> None:
        with self._lock:
            self._owners.clear()


kept = Kept()


class Only(Same):
    """As `Same`, but it does not keep its object alive where that can be avoided."""

    __slots__ = ()

    def __init__(self, obj: Any):
        try:
            super().__init__(weakref.ref(obj))
        except TypeError:
            super().__init__(obj)
        self._hash = id(obj)


# What objects of some kinds hold.


def _bytes(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array; of a large one, those of a sample."""
    if isinstance(array, np.ma.MaskedArray):
        parts = np.asarray(array.data), np.ma.getmaskarray(array)
        return np.concatenate([_bytes(part) for part in parts])
    if array.nbytes > MOST_BYTES:
        array = array.flat[:: array.size // _SAMPLE + 1]
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.size == other.size and bool((one == other).all())


_seen: weakref.WeakValueDictionary[bytes, np.ndarray] = weakref.WeakValueDictionary()


def look_at_array(array: np.ndarray) -> Look:
    """Returns how to look at the content of an array: a digest, while it is as now."""
    seen = _bytes(array).copy()
    digest = hashlib.blake2b(seen.tobytes()).digest()
    # Many programs may read one array.
    seen = _seen.setdefault(digest, seen)
    return lambda array: (digest if _is_same(_bytes(array), seen) else None,)


def watches_of_names(scope: dict[str, Any], names: Iterable[str]) -> Iterator[Watch]:
    """Yields watches of names in a namespace, and of names that may be added to it."""
    present = [name for name in names if name in scope]
    absent = frozenset(names).difference(present)
    if present:
        pick = operator.itemgetter(*present)
        look = pick if len(present) > 1 else lambda scope: (pick(scope),)
        yield Watch(look, scope, present, look(scope), lambda _: present)
    if absent:
        # A name, such as that of a builtin, may be defined later.
        look = lambda scope: (absent.isdisjoint(scope),)
        yield Watch(look, scope, ("absent",), (True,), lambda _: ("absent",))


def without(hidden: set[Hashable], look: Look, names_of: Names) -> tuple[Look, Names]:
    """Returns how to look at what an object holds, except under hidden names."""

    def pairs(owner: Any) -> Iterator[tuple[Hashable, Any]]:
        both = zip(names_of(owner), look(owner), strict=True)
        return ((name, value) for name, value in both if name not in hidden)

    return (
        lambda owner: tuple([value for _, value in pairs(owner)]),
        lambda owner: [name for name, _ in pairs(owner)],
    )


def keys_and_values(held: Any) -> tuple[Any, ...]:
    return (*held, *held.values())


def made_of(fn: types.FunctionType) -> tuple[Any, ...]:
    # An empty dictionary of attributes may be filled.
    return fn.__code__, fn.__defaults__, fn.__kwdefaults__, not fn.__dict__

"""What is known of objects, found by their identity."""

import weakref
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class OfObjects(Generic[V]):
    """Values by the identity of an object, each as long as that object lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], V]] = {}

    def get(self, obj: Any) -> V | None:
        known = self._known.get(id(obj))
        return None if known is None or known[0]() is not obj else known[1]

    def put(self, obj: Any, value: V) -> V:
        place = id(obj)
        gone = weakref.ref(obj, lambda _: self._known.pop(place, None))
        self._known[place] = gone, value
        return value

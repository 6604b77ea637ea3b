"""Objects compared by value, as strictly as a compiled program needs."""

import dataclasses
import dis
import functools
import hashlib
import operator
import types
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from .._pickling import is_library, packed

# Python's `==` is too generous for what decides a compilation: `1 == 1.0 == True`,
# `-0.0 == 0.0`, and `nan` differs from itself.


class Same:
    """Compares by identity. Holds its object, so that no other takes its id."""

    __slots__ = ("_hash", "obj")

    def __init__(self, obj: Any):
        self.obj, self._hash = obj, id(obj)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.obj is other.obj

    def __hash__(self) -> int:
        return self._hash


class Hashed:
    """A value whose hash is computed once, since it may be large."""

    __slots__ = ("_hash", "value")

    def __init__(self, value: Hashable):
        self.value: Hashable = value
        self._hash = hash(value)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Hashed)
            and self._hash == other._hash
            and self.value == other.value
        )

    def __hash__(self) -> int:
        return self._hash


_ATOMS = frozenset(
    (bool, int, float, complex, str, bytes, type(None), type(...), types.CodeType)
)


def is_atom(obj: Any) -> bool:
    """Whether an object is a plain value: it holds no other and never changes."""
    return type(obj) in _ATOMS or isinstance(obj, np.generic | np.dtype)


def value_key(obj: Any) -> Hashable:
    """Returns a key, equal for two objects only if each can replace the other."""
    match obj:
        case np.ndarray() if type(obj) is np.ndarray and not obj.dtype.hasobject:
            digest = hashlib.blake2b(obj.tobytes()).digest()
            return type(obj), obj.shape, obj.dtype, digest
        case np.generic():
            return type(obj), obj.dtype, obj.tobytes()
        case float():
            return type(obj), obj.hex()
        case complex():
            return type(obj), obj.real.hex(), obj.imag.hex()
        case tuple():
            return type(obj), tuple(map(value_key, obj))
        case frozenset() | set():
            return type(obj), frozenset(map(value_key, obj))
    try:
        hash(obj)
    except TypeError:
        return Same(obj)
    if _is_users_dataclass(obj):
        if type(obj).__setattr__ is object.__setattr__:
            return Same(obj)  # equal ones may differ later
        return type(obj), obj, strict_key(obj)
    return type(obj), obj


def _is_users_dataclass(obj: Any) -> bool:
    return dataclasses.is_dataclass(obj) and not (
        isinstance(obj, type) or is_library(type(obj))
    )


def strict_key(obj: Any) -> Hashable:
    """Returns a key for what `==` is too generous to tell apart in static data.

    It is the same for other objects of one class, which are left to `==`.
    """
    return content_key(obj, _strict_key_of_one)


def _strict_key_of_one(obj: Any) -> Hashable:
    kind = type(obj)
    if is_atom(obj):
        return value_key(obj)
    if _is_users_dataclass(obj):
        # Fields may be left out of `==`, not set, or lead back here.
        values = (getattr(obj, field.name, None) for field in dataclasses.fields(obj))
        return kind, tuple(value_key(x) if is_atom(x) else None for x in values)
    return kind


class StaticData(Hashed):
    """The static data in the structure of a tree, whose own `==` is too generous."""

    __slots__ = ("_structure",)

    def __init__(self, structure: Any):
        super().__init__(_static_key(structure))
        self._structure = structure

    def __repr__(self) -> str:
        return "StaticData"

    def __reduce__(self) -> Any:
        return StaticData, (packed(self._structure),)


def _static_key(structure: Any) -> Hashable:
    data = structure.node_data()
    if data is None:
        return None
    return strict_key(data[1]), tuple(map(_static_key, structure.children()))


def content_key(obj: Any, of_one: Callable[[Any], Hashable] = value_key) -> Hashable:
    """Returns a key of what is in tuples, lists and dictionaries, from that of each.

    It is for those that nobody else can change, as `copied` makes them.
    """
    kind = type(obj)
    if kind in (tuple, list, dict):
        items = obj.items() if kind is dict else obj
        return kind, tuple(content_key(item, of_one) for item in items)
    return of_one(obj)


def copied(obj: Any) -> Any:
    """Copies the containers in an object, so that it stays what its key says.

    An object without any that can change is returned as it is.
    """
    kind = type(obj)
    if kind in (list, set):
        return kind(map(copied, obj))
    if kind is dict:
        return {key: copied(value) for key, value in obj.items()}
    if kind is tuple:
        copies = tuple(map(copied, obj))
        return obj if all(map(operator.is_, copies, obj)) else copies
    return obj


@functools.lru_cache(maxsize=4096)
def names_written(code: types.CodeType) -> frozenset[str]:
    """Returns the free variables that a code object writes to."""
    written = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("STORE_DEREF", "DELETE_DEREF")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            written |= names_written(constant)
    return frozenset(written & set(code.co_freevars))

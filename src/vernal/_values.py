"""Objects compared by value, as strictly as a compiled program needs."""

import dis
import functools
import hashlib
import types
from collections.abc import Hashable
from typing import Any

import numpy as np

# Comparing values. Python's `==` is too generous for what decides a compilation:
# `1 == 1.0 == True`, `-0.0 == 0.0`, and `nan` differs from itself.


class Same:
    """Equal to itself alone. Holds its object, so that no other can take its id."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any):
        self.obj = obj

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.obj is other.obj

    def __hash__(self) -> int:
        return id(self.obj)


def value_key(obj: Any) -> Hashable:
    """A key equal for two objects only if they can stand in for one another."""
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
    return type(obj), obj


@functools.lru_cache(maxsize=4096)
def names_used(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals a code object reads, and the free variables it rebinds."""
    read, rebound, written = set(), set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            written.add(instruction.argval)
        elif instruction.opname in ("STORE_DEREF", "DELETE_DEREF"):
            rebound.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_read, inner_rebound = names_used(constant)
            read |= inner_read
            rebound |= inner_rebound
    return frozenset(read - written), frozenset(rebound & set(code.co_freevars))


# Libraries whose functions and objects do not change while a program runs.
_SETTLED = ("builtins", "jax", "jaxlib", "numpy", "equinox", "optax", "vernal", "math")


def _is_settled(module: str | None) -> bool:
    return (module or "").split(".")[0] in _SETTLED


def may_change(value: Any) -> bool:
    """Whether a value may change its meaning and yet be the same to a comparison."""
    if isinstance(value, list | dict | set | bytearray):
        return True
    if isinstance(value, type | types.ModuleType | types.FunctionType):
        return False
    own = type(value)
    return own.__eq__ is object.__eq__ and not _is_settled(own.__module__)


def globals_key(fn: types.FunctionType, seen: frozenset[int] = frozenset()) -> Hashable:
    """A key of the globals that a function reads, by way of its helpers too."""
    # A notebook's cell run again makes an equal function over the same globals, in
    # which a number may have changed. Compiled code has the old one baked in.
    scope = fn.__globals__
    seen = seen | {id(fn)}
    read, _ = names_used(fn.__code__)
    found = {name: scope[name] for name in read if name in scope}
    if any(map(may_change, found.values())):
        return Same(fn)
    keys = ((name, _global_key(value, seen)) for name, value in found.items())
    return Same(scope), frozenset(keys)


def _global_key(value: Any, seen: frozenset[int]) -> Hashable:
    plain = (bool, int, float, complex, str, type(None), np.ndarray)
    if type(value) in plain:
        return value_key(value)
    if type(value) is not types.FunctionType or _is_settled(value.__module__):
        return Same(value)
    return Same(value), None if id(value) in seen else globals_key(value, seen)

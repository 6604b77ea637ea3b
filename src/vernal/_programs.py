"""Compiled programs, of the code as it is now."""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import equinox as eqx
import jax
import numpy as np

from ._reads import reads
from ._values import Hashed, is_atom, value_key
from ._watch import Reads, Slot, kept

P = ParamSpec("P")
R = TypeVar("R")

# As Equinox has them: what is none of these is static.
_ARRAYS = (jax.Array, np.ndarray, np.generic)
_array_types: set[type] = set()

# JAX has caches of its own for the functions within a program (the body of a loop,
# helpers that are compiled by themselves), which know a function by its identity. They
# heed this: where code has changed, programs are made under another number.
_generation = jax.make_user_context(0)

# The number of slots whose last values are known.
_MOST_SLOTS = 2**14

_MOST_RECORDS = 512


class _Changes:
    """Counts how often anything was seen to change that a program is made from."""

    def __init__(self) -> None:
        self.count = 0
        self._last: dict[Slot, tuple[Any, Any]] = {}

    def look(self, found: Reads) -> None:
        is_new = False
        for watch in found.watches:
            owner = _mark(watch.owner)
            for slot, value in watch.slots():
                mark, last = _mark(value), self._last.get(slot)
                self._last[slot] = owner, mark
                # The id may have been that of another owner, which is gone.
                if last is not None and _is_one(last[0], owner):
                    is_new |= not _is_one(last[1], mark)
        if len(self._last) > _MOST_SLOTS:
            self._last, is_new = {}, True
        self.count += is_new

    def forget(self) -> None:
        self._last.clear()
        self.count += 1


def _mark(value: Any) -> Any:
    """What tells a value from another one, without keeping it alive."""
    if is_atom(value):
        return value_key(value)
    try:
        return weakref.ref(value)
    except TypeError:
        return id(value)


def _is_one(mark: Any, other: Any) -> bool:
    return mark is other or (type(mark) is not weakref.ref and mark == other)


_changes = _Changes()


def _statics(leaves: list[Any]) -> tuple[Any, ...]:
    """Picks the leaves that are no arrays."""
    if _array_types.issuperset(map(type, leaves)):
        return ()
    # To ask each is dear: `jax.Array` is an abstract class.
    _array_types.update({type(x) for x in leaves if isinstance(x, _ARRAYS)})
    return tuple(x for x in leaves if type(x) not in _array_types)


class _Call(NamedTuple):
    """The arguments of a call but for their arrays."""

    structure: Any
    statics: tuple[Any, ...]
    types: tuple[type, ...]
    """Of the static ones: to Python, `1` and `True` are one."""

    def joined(self, arrays: list[Any]) -> Any:
        """Puts the arguments together again."""
        rest = iter(self.statics)
        leaves = [next(rest) if x is None else x for x in arrays]
        return self.structure.unflatten(leaves)


@jax.tree_util.register_static
class Version:
    """A call, and the code of one moment: what a program is compiled for."""

    __slots__ = ("__weakref__", "call", "generation", "is_traced")

    def __init__(self, call: _Call):
        self.call = call
        self.generation, self.is_traced = _changes.count, False

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What JAX looks at its functions in, to trace them for this version."""
        return _generation(self.generation)


class _Record:
    """What the code of a call reads, and the version that this makes."""

    __slots__ = ("call", "found", "version")

    def __init__(self, call: _Call):
        self.call = call
        self._look()

    def _look(self, is_again: bool = False) -> None:
        self.found = self._read()
        key = Hashed((self.call, self.found.key))
        version = _versions.get(key)
        if version is None:
            # Also where names were added or removed, which no slot tells.
            _changes.count += is_again
            version = _versions[key] = Version(self.call)
        self.version = version

    def _read(self) -> Reads:
        found = reads(self.call.structure, *self.call.statics)
        _changes.look(found)
        return found

    def now(self) -> Version:
        """Returns the version of the code as it is now."""
        if not self.found.is_current():
            self._look(is_again=True)
        return self.version

    def settle(self) -> None:
        """Sets aside what a program wrote to while it was made, or in its callbacks."""
        jax.effects_barrier()
        if self.found.is_current():
            return
        for watch in self.found.watches:
            kept.add(watch)
        self.found = self._read()
        _versions[Hashed((self.call, self.found.key))] = self.version

    @classmethod
    def of(cls, structure: Any, statics: tuple[Any, ...]) -> "_Record":
        """Returns the record of a call, which may be a new one."""
        call = _Call(structure, statics, tuple(map(type, statics)))
        record = _records.get(call)
        if record is None:
            record = _records[call] = cls(call)
            if len(_records) > _MOST_RECORDS:
                del _records[next(iter(_records))]
        return record


# Records hold what was read, and so are few. Versions live as long as their programs.
_records: dict[_Call, _Record] = {}
_versions: weakref.WeakValueDictionary[Hashed, Version] = weakref.WeakValueDictionary()


def version_of(tree: Any) -> Version:
    """Returns the version of the code of a tree as it is now: static, to JAX."""
    leaves, structure = jax.tree.flatten(tree)
    return _Record.of(structure, _statics(leaves)).now()


def program(
    fn: Callable[P, R], donate: Literal["none", "all-except-first"] = "none"
) -> Callable[P, R]:
    """Compiles a function: for arrays as `equinox.filter_jit` does, and anew where
    what the code of its arguments reads has changed.
    """

    def enter(first: list[Any], rest: list[Any], version: Version) -> R:
        version.is_traced = True
        call: Callable[..., R] = fn
        return call(*version.call.joined([*first, *rest]))

    enter.__name__, enter.__qualname__ = fn.__name__, fn.__qualname__
    jitted: Any = eqx.filter_jit(enter, donate=donate)
    _jitted.append(jitted)

    def run(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        statics = _statics(leaves)
        if statics:
            leaves = [x if type(x) in _array_types else None for x in leaves]
        record = _Record.of(structure, statics)
        version = record.now()
        first: list[Any] = []
        if donate != "none":
            count = structure.children()[0].num_leaves
            first, leaves = leaves[:count], leaves[count:]
        if version.generation:
            with version.context():
                result = jitted(first, leaves, version)
        else:
            result = jitted(first, leaves, version)
        if version.is_traced:
            version.is_traced = False
            record.settle()
        return result

    wrapped: Any = functools.wraps(fn)(run)
    return wrapped


_jitted: list[Any] = []


def forget() -> None:
    """Drops every program that vernal has compiled, so that each is made anew.

    A program follows the code that it was made from: where that has changed, the next
    call compiles anew. This is for what cannot be seen to change: a file that a model
    reads, an attribute by a computed name, a library that was loaded again.

    It drops the compiled steps, fits, solves, matrices and products, and what is known
    of the code behind them. Functions that you have compiled yourself are traced anew
    where a model or a loss calls them. Programs of your own around vernal, such as a
    `jax.jit` of `trainer.step`, are left alone: `jax.clear_caches()` drops those.
    """
    for jitted in _jitted:
        jitted._cached.clear_cache()
    _records.clear()
    _versions.clear()
    kept.clear()
    _changes.forget()

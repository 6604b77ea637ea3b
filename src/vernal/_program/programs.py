"""Compiled programs, of the code as it is now."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, cast

import equinox as eqx
import jax
import numpy as np

from .._closure import (
    Hashed,
    Reads,
    Same,
    Skeleton,
    Slot,
    is_atom,
    kept,
    reads,
    value_key,
)
from .host import calls_host, with_host_errors
from .in_order import options_in_order
from .shelves import Shelves

P = ParamSpec("P")
R = TypeVar("R")

# As in Equinox: everything else is static.
_ARRAYS = (jax.Array, np.ndarray, np.generic)
_array_types: set[type] = set()

# JAX has its own caches for the functions within a program (the body of a loop, helpers
# that are compiled by themselves), and finds a function in them by its identity and by
# this number. Where code has changed, programs are made under another number.
_generation = jax.make_user_context(0)

# How many slots are remembered with their last values.
_MOST_SLOTS = 2**14

_MOST_RECORDS = 512


class _Changes:
    """Counts how often a change was seen in what programs are made from."""

    def __init__(self) -> None:
        self.count = 0
        self._last: dict[Slot, tuple[Any, Any]] = {}

    def look(self, found: Reads) -> None:
        is_new = False
        for watch in found.watches:
            owner = _mark(watch.owner)
            for name, value in zip(watch.names, watch.values, strict=True):
                slot = id(watch.owner), name
                mark, last = _mark(value), self._last.get(slot)
                self._last[slot] = owner, mark
                # The id may have been that of another owner, which no longer exists.
                if last is not None and _is_one(last[0], owner):
                    is_new |= not _is_one(last[1], mark)
        if len(self._last) > _MOST_SLOTS:
            self._last, is_new = {}, True
        self.count += is_new

    def forget(self) -> None:
        self._last.clear()
        self.count += 1


def _mark(value: Any) -> Any:
    """Returns a mark that identifies a value without keeping it alive."""
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
    """Picks the leaves that are not arrays."""
    if _array_types.issuperset(map(type, leaves)):
        return ()
    # `isinstance` is slow for `jax.Array`, which is an abstract class.
    _array_types.update({type(x) for x in leaves if isinstance(x, _ARRAYS)})
    return tuple(_hashable(x) for x in leaves if type(x) not in _array_types)


def _hashable(leaf: Any) -> Any:
    """Has a leaf without a hash, such as a set, compared by its identity."""
    try:
        hash(leaf)
    except TypeError:
        return Same(leaf)
    return leaf


def _own(leaf: Any) -> Any:
    return leaf.obj if type(leaf) is Same else leaf


class _Call(NamedTuple):
    """The arguments of a call without their arrays."""

    structure: Any
    statics: tuple[Any, ...]
    types: tuple[type, ...]
    """Of the static ones, since `1 == True`."""

    def joined(self, arrays: list[Any]) -> Any:
        """Puts the arguments together; `arrays` has `None` for each static one."""
        rest = map(_own, self.statics)
        leaves = [next(rest) if x is None else x for x in arrays]
        return self.structure.unflatten(leaves)


@jax.tree_util.register_static
class Version:
    """A call, and its code at one time: what a program is compiled for."""

    def __init__(self, call: _Call, hashed: int):
        """`hashed` is the hash: equal for versions of the same code."""
        self.call, self._hash = call, hashed
        self.generation = _changes.count
        self.is_traced = self.has_callbacks = False

    def __hash__(self) -> int:
        return self._hash

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which JAX finds what it traced for this version."""
        return _generation(self.generation)


@jax.tree_util.register_static
class _Statics:
    """The leaves of a result that are not arrays."""

    def __init__(self, tree: Any):
        self.tree = tree


class _Record:
    """What the code of a call reads, and the version that follows from it."""

    def __init__(self, call: _Call):
        self.call = call
        self._look()

    def _look(self, is_again: bool = False) -> None:
        self.found = self._read()
        key = Hashed((self.call, self.found.key))
        with _lock:
            version = _versions.get(key)
            if version is None:
                # Slots do not show where names were added or removed.
                _changes.count += is_again
                version = _versions[key] = Version(self.call, hash(key))
        self.version = version

    def _read(self) -> Reads:
        found = reads(self.call.structure, *map(_own, self.call.statics))
        _changes.look(found)
        return found

    def now(self) -> Version:
        """Returns the version of the code as it is now."""
        if not self.found.is_current():
            self._look(is_again=True)
        return self.version

    def settle(self) -> None:
        """Marks what a program wrote to while it was made, or in its callbacks."""
        jax.effects_barrier()
        if self.found.is_current():
            return
        for watch in self.found.watches:
            kept.add(watch)
        self.found = self._read()
        _versions[Hashed((self.call, self.found.key))] = self.version

    @classmethod
    def of(cls, structure: Any, statics: tuple[Any, ...]) -> "_Record":
        """Returns the record of a call, a new one if there is none."""
        call = _Call(structure, statics, tuple(map(type, statics)))
        record = _records.get(call)
        if record is None:
            record = cls(call)
            with _lock:
                _records[call] = record
                while len(_records) > _MOST_RECORDS:
                    del _records[next(iter(_records))]
        return record


# Held only while what threads share is changed.
_lock = threading.RLock()

# Records keep alive what was read, so only some are kept. Versions live as long as
# their programs.
_records: dict[_Call, _Record] = {}
_versions: weakref.WeakValueDictionary[Hashed, Version] = weakref.WeakValueDictionary()


def version_of(tree: Any) -> Version:
    """Returns the version of a tree's code as it is now: static, for JAX."""
    return version_of_flat(*jax.tree.flatten(tree))


def version_of_flat(leaves: list[Any], structure: Any) -> Version:
    """Returns it of a tree that was taken apart already."""
    return _Record.of(structure, _statics(leaves)).now()


def hash_of_code(tree: Any) -> int:
    """Returns a hash of all that the code of a tree reads, and is, as it is now."""
    leaves, structure = jax.tree.flatten(tree)
    record = _Record.of(structure, _statics(leaves))
    record.now()
    return hash(record.found.key)


class Program(Generic[P, R]):
    """A compiled function, which `program` makes."""

    def __init__(self, fn: Callable[P, R], in_place: bool, in_order: bool):
        self._fn, self._in_place, self._in_order = fn, in_place, in_order
        self._compiled: Shelves[Any] = Shelves(_drop)
        functools.update_wrapper(self, fn)
        _programs.append(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        record, first, rest = self._taken_apart(args)
        version = record.now()
        jitted = self._of(version)
        # In a context JAX finds more slowly what it compiled.
        context = version.context if version.generation else contextlib.nullcontext
        with context():
            waits = lambda: version.is_traced or version.has_callbacks
            result, statics = with_host_errors(waits, jitted, first, rest)
            if version.is_traced:
                version.is_traced = False
                version.has_callbacks |= calls_host(jitted.trace(first, rest).jaxpr)
                record.settle()
        return result if statics is None else eqx.combine(result, statics.tree)

    def _of(self, version: Version) -> Any:
        """Returns what is compiled for a version; JAX compiles it for each shape."""
        return self._compiled.get(version) or self._compiled.put(
            version, self._jitted(version), _kind(version.call)
        )

    def _jitted(self, version: Version) -> Any:
        # One function for each version, since JAX drops what it compiled for a function
        # only as a whole. JAX keeps the function alive, so it must not keep the version
        # alive.
        called: Callable[..., R] = self._fn
        made_for = weakref.ref(version)

        def enter(first: list[Any], rest: list[Any]) -> tuple[R, _Statics | None]:
            version = cast(Version, made_for())
            version.is_traced = True
            result = called(*version.call.joined([*first, *rest]))
            arrays, statics = eqx.partition(result, eqx.is_array)
            has_statics = bool(jax.tree.leaves(statics))
            return arrays, _Statics(statics) if has_statics else None

        enter.__name__, enter.__qualname__ = self._fn.__name__, self._fn.__qualname__
        donated = (1,) if self._in_place else ()
        options = options_in_order() if self._in_order else None
        return jax.jit(enter, donate_argnums=donated, compiler_options=options)

    def _taken_apart(self, args: Any) -> tuple[_Record, list[Any], list[Any]]:
        """Returns the record of a call, the arrays that are kept, and the other ones.

        Those of the first argument are kept where all others are donated.
        """
        leaves, structure = jax.tree.flatten(args)
        statics = _statics(leaves)
        if statics:
            leaves = [x if type(x) in _array_types else None for x in leaves]
        count = structure.children()[0].num_leaves if self._in_place else 0
        return _Record.of(structure, statics), leaves[:count], leaves[count:]

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Traces the function without running it, to look at what is compiled."""
        record, first, rest = self._taken_apart(args)
        return self._of(record.now()).lower(first, rest)

    def forget(self) -> None:
        self._compiled.clear()


def _drop(version: Version, jitted: Any) -> None:
    """Drops what was compiled for a version, and the records of what its code reads."""
    jitted.clear_cache()
    with _lock:
        for call, record in list(_records.items()):
            if record.version is version:
                del _records[call]


def _kind(call: _Call) -> frozenset[str]:
    """Returns the names of the classes and functions of a call.

    They stay the same when a notebook cell or a function defines them again.
    """
    names: set[str] = set()
    todo = [call.structure, *call.statics]
    while todo:
        part = todo.pop()
        if isinstance(part, jax.tree_util.PyTreeDef):
            data = part.node_data()
            if data is not None:
                todo += [data[0], data[1], *part.children()]
        elif isinstance(part, tuple):
            todo += part
        elif isinstance(part, Skeleton):
            names |= part.function_names
        else:
            names.add(getattr(part, "__qualname__", type(part).__qualname__))
    return frozenset(names)


def program(
    fn: Callable[P, R], in_place: bool = False, in_order: bool = False
) -> Program[P, R]:
    """Compiles a function as `equinox.filter_jit` does, and again whenever something
    has changed that the code of its arguments reads.

    The compiled function takes positional arguments only. With `in_place` it may
    overwrite all but the first of them. What is `in_order` has the same bits at each
    call on a CPU, too: see `options_in_order`.
    """
    return Program(fn, in_place, in_order)


_programs: list[Program[Any, Any]] = []


def forget() -> None:
    """Drops every program that vernal has compiled, so that each is compiled again.

    Programs follow your code: where it has changed, the next call compiles again. Call
    this after a change that vernal cannot see: in a file that a model reads, in an
    attribute whose name is computed, in a library that was reloaded.

    It drops the compiled steps, fits, solves, matrices and products, and what is known
    of the code behind them. Functions that you have compiled yourself are traced again
    where a model or a loss calls them. Your own programs around vernal, such as a
    `jax.jit` of `trainer.step`, are kept: `jax.clear_caches()` drops those.
    """
    with _lock:
        _records.clear()
    for each in _programs:
        each.forget()
    _versions.clear()
    kept.clear()
    _changes.forget()

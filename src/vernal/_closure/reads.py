"""What code reads beside its arguments: found by a walk, and watched."""

import collections
import dis
import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from .._boundary import warn
from .._pickling import (
    content_of,
    is_library,
    is_library_file,
    is_library_module,
    is_of_python,
    module_of,
)
from .equality import Hashed, StaticData, is_atom, value_key
from .skeleton import Group, Skeleton, Static, all_parts
from .watch import (
    MOST_BYTES,
    Look,
    Names,
    Only,
    Reads,
    Watch,
    kept,
    keys_and_values,
    look_at_array,
    made_of,
    watches_of_names,
    without,
)

# A walk ends after this many objects. A container of more elements than this is not
# entered: it is known by its identity and its length.
_MOST_OBJECTS = 20_000
_MOST_ELEMENTS = 1_024

_TOO_MANY = (
    "Beside its arguments the code of a fit reads more than "
    f"{_MOST_OBJECTS:,} objects. Later changes of some of them go unseen: compiled "
    "programs keep what they had. Call `vn.forget()` after such a change. A list of "
    f"more than {_MOST_ELEMENTS:,} elements, or an array, is one object."
)

# Libraries whose objects change by themselves and configure no computation.
_RESTLESS = frozenset(
    (
        *("asyncio", "concurrent", "contextvars", "io", "logging", "matplotlib"),
        *("multiprocessing", "random", "re", "subprocess", "threading", "tqdm"),
        "weakref",
    )
)

_CACHED = type(functools.lru_cache(lambda: None))


def reads(*roots: Any) -> Reads:
    """Finds all that objects of any kind, and their code, read, and its values now."""
    return _Walk().run(roots)


def scope_key(fn: types.FunctionType) -> Hashable:
    """Returns a key of what a function and its helpers read from their globals."""
    if is_library_file(fn.__code__.co_filename):
        return None
    walk = _Walk()
    walk.code(fn.__code__, fn.__globals__)
    return walk.run(()).key


class _Walk:
    """One walk: what an object is becomes a token; what it holds is walked to next."""

    def __init__(self) -> None:
        self.tokens: list[Hashable] = []
        self.watches: list[Watch] = []
        self.todo: collections.deque[Any] = collections.deque()
        self.met: dict[int, int] = {}
        # Objects made on the way must outlive the walk, or their ids are reused.
        self.alive: list[Any] = []
        self.words: set[str] = set()
        self.scopes: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
        self.modules: list[dict[str, Any]] = []

    def run(self, roots: Iterable[Any]) -> Reads:
        self.todo.extend(roots)
        seen = -1
        while self.todo and len(self.met) < _MOST_OBJECTS:
            self.see(self.todo.popleft())
            if not self.todo and seen != (seen := len(self.words) + len(self.modules)):
                # Of a module, only the attributes that some code has a word for count,
                # also where the module has none of that name yet.
                for scope in self.modules:
                    self.names(scope, sorted({*self.words, "__getattr__"}))
        if self.todo:
            warn(_TOO_MANY)
        for scope, names in self.scopes.values():
            self.watches += watches_of_names(scope, names)
        return Reads(Hashed(tuple(self.tokens)), self.watches)

    # What to walk to next.

    def names(self, scope: dict[str, Any], names: Iterable[str]) -> None:
        """Walks to those names of a namespace that no code has read before."""
        _, known = self.scopes.setdefault(id(scope), (scope, {}))
        new = [n for n in names if n not in known and (id(scope), n) not in kept]
        known.update(dict.fromkeys(new))
        present = tuple(name for name in new if name in scope)
        self.tokens.append(present)
        self.todo.extend(scope[name] for name in present)

    def hold(
        self,
        look: Look,
        owner: Any,
        names: Sequence[Hashable] | Names,
        is_walked: Callable[[Any, Any], bool] = lambda name, value: True,
    ) -> None:
        """Watches what an object holds, except what is kept there, and walks to it.

        `names` are those of what `look` returns, or a function of the owner if there
        may be new ones. `is_walked` says whether to walk to the value of a name.
        """
        if (id(owner), None) in kept:
            self.tokens.append("kept")
            return
        names_of: Names = names if callable(names) else lambda _: names
        hidden = {name for name in names_of(owner) if (id(owner), name) in kept}
        if hidden:
            self.tokens.append("kept")
            look, names_of = without(hidden, look, names_of)
        found, values = (*names_of(owner),), look(owner)
        self.tokens.append(found)
        self.watches.append(Watch(look, owner, found, values, names_of))
        pairs = zip(found, values, strict=True)
        self.todo.extend(value for name, value in pairs if is_walked(name, value))

    # What an object is.

    def see(self, obj: Any) -> None:
        kind = type(obj)
        if is_atom(obj):
            self.tokens.append(value_key(obj))
        elif (place := self.met.get(id(obj))) is not None:
            self.tokens.append(("again", place))
        else:
            self.met[id(obj)] = len(self.met)
            self.alive.append(obj)
            self.see_first(obj, kind)

    def see_first(self, obj: Any, kind: type) -> None:
        if issubclass(kind, np.ndarray):
            self.array(obj)
        elif kind is types.FunctionType:
            self.function(obj)
        elif issubclass(kind, type):
            self.kind(obj)
        elif issubclass(kind, types.ModuleType):
            self.module(obj)
        elif kind is jtu.PyTreeDef:
            self.structure(obj)
        elif kind is StaticData:
            self.tokens.append(obj)  # of a structure, which is walked to as well
        elif kind is Skeleton:
            self.skeleton(obj)
        elif (parts := _parts(obj)) is not None:
            self.tokens.append((kind, len(parts)))
            self.todo.extend(parts)
        elif issubclass(kind, dict | types.MappingProxyType):
            self.elements(obj, keys_and_values)
        elif issubclass(kind, eqx.Module):
            # Before tuples: an optimiser is one of its two methods.
            self.instance(obj)
        elif issubclass(kind, list | tuple | set | frozenset | collections.deque):
            self.elements(obj, tuple)
        else:
            self.instance(obj)

    def array(self, array: np.ndarray) -> None:
        if array.dtype.hasobject:
            self.tokens.append(Only(array))
            if array.dtype == object and array.size <= _MOST_ELEMENTS:
                self.hold(lambda held: (*held.flat,), array, range(array.size))
            return
        is_whole = array.nbytes <= MOST_BYTES
        mark = (array.shape, array.dtype) if is_whole else Only(array)
        self.tokens.append((mark, type(array)))
        self.hold(look_at_array(array), array, ("content",))

    def elements(self, obj: Any, look: Look) -> None:
        kind, count = type(obj), len(obj)
        self.tokens.append(kind)
        if count > _MOST_ELEMENTS:
            self.tokens.append(Only(obj))
            self.hold(lambda held: (len(held) == count,), obj, ("length",))
        elif issubclass(kind, tuple):
            self.tokens.append(count)
            self.todo.extend(obj)
        else:
            if issubclass(kind, set | frozenset) and (id(obj), None) not in kept:
                # Equal sets may have different orders.
                self.tokens.append(frozenset(map(value_key, obj)))
            self.hold(look, obj, range(len(look(obj))))
        if not is_library(kind):
            self.todo.append(kind)
            self.attributes(obj)

    def function(self, fn: types.FunctionType) -> None:
        is_library = is_library_file(fn.__code__.co_filename)
        self.tokens.append((fn.__code__, len(fn.__closure__ or ())))
        if is_library and not (fn.__closure__ or fn.__dict__):
            return
        names = "code", "defaults", "kwdefaults", "is plain"
        self.hold(made_of, fn, names)
        self.todo.append(fn.__dict__ or None)
        for cell in fn.__closure__ or ():
            # A cell may be empty.
            self.hold(content_of, cell, ("content",)[: len(content_of(cell))])
        if not is_library:
            self.code(fn.__code__, fn.__globals__)

    def code(self, code: types.CodeType, scope: dict[str, Any]) -> None:
        """Walks to what the code of a user's function reads by name."""
        read, words, imported = _names_in(code)
        self.words |= words
        self.names(scope, read)
        # The name of a relative import does not say which package it starts from.
        parts = (scope.get("__package__") or "").split(".")
        packages = [".".join(parts[: i + 1]) for i in range(len(parts))]
        for name in imported:
            for full in (name, *(f"{p}.{name}".rstrip(".") for p in packages)):
                if (module := sys.modules.get(full)) is not None:
                    self.todo.append(module)

    def kind(self, kind: type) -> None:
        self.tokens.append(Only(kind))
        if is_library(kind):
            return
        look = lambda kind: (kind.__mro__, *keys_and_values(vars(kind)))
        names = lambda kind: ("", *_names_twice(vars(kind)))
        self.hold(look, kind, names, _is_member)
        self.todo.append(type(kind))

    def module(self, module: types.ModuleType) -> None:
        self.tokens.append(Only(module))
        if not is_library_module(module.__name__, module):
            self.modules.append(vars(module))

    def structure(self, structure: Any) -> None:
        """Walks to the classes and the static values of a pytree."""
        data = structure.node_data()
        self.tokens.append((jtu.PyTreeDef, structure.num_leaves, data is None))
        if data is not None:
            # The keys of a dictionary are a list, a new one each time.
            self.todo.extend(tuple(x) if type(x) is list else x for x in data)
            self.todo.extend(structure.children())

    def skeleton(self, skeleton: Skeleton) -> None:
        """Walks to the functions and the objects that a closure has captured."""
        plan = skeleton.plan
        self.tokens.append((Skeleton, len(plan.shells)))
        for shell in plan.shells:
            if not is_library_file(shell.code.co_filename):
                self.code(shell.code, shell.scope)
        for part in all_parts(plan):
            if isinstance(part, Group) and isinstance(part.key, tuple):
                # Of a node, the class and the static values.
                self.todo.extend(x for x in part.key if type(x) is jtu.PyTreeDef)
            # A cell that a function writes to holds its state.
            elif isinstance(part, Static) and type(part.value) is not types.CellType:
                self.todo.append(part.value)

    def instance(self, obj: Any) -> None:
        kind = type(obj)
        package = module_of(kind).split(".")[0]
        if package in _RESTLESS:
            self.tokens.append(Only(obj))
        elif package in ("jax", "jaxlib") or kind is _CACHED:
            # Functions that are compiled, or have their own rules for derivatives.
            wrapped = getattr(obj, "__wrapped__", None)
            self.tokens.append(Only(obj) if wrapped is None else kind)
            self.todo.append(wrapped)
            if wrapped is not None:
                self.attributes(obj)
        else:
            self.tokens.append(kind if _is_plain(kind) else Only(obj))
            if not is_library(kind):
                self.todo.append(kind)
            if not self.attributes(obj):
                # A sentinel, such as `object()`, is known by its identity.
                is_mark = kind.__eq__ is object.__eq__
                self.tokens.append(Only(obj) if is_mark else value_key(obj))

    def attributes(self, obj: Any) -> bool:
        """Watches the attributes of an object and walks to them; whether it has any."""
        # Not `getattr`, which may call the user's code.
        try:
            found = object.__getattribute__(obj, "__dict__")
        except AttributeError:
            found = None
        if type(found) is dict:
            # One that is empty may be filled.
            self.hold(keys_and_values, found, _names_twice)
        slots = _slots(type(obj))
        if slots:
            look = lambda obj: tuple([getattr(obj, name, None) for name in slots])
            self.hold(look, obj, slots)
        return bool(found or slots)


_CONTAINERS = dict | list | tuple | set | frozenset | collections.deque | np.ndarray
_VIEWS = tuple(map(type, ({}.keys(), {}.values(), {}.items())))


def _parts(obj: Any) -> tuple[Any, ...] | None:
    """Returns the parts of an object that never changes, `None` for other objects."""
    kind = type(obj)
    if kind is types.MethodType:
        return obj.__func__, obj.__self__
    if kind is types.BuiltinMethodType and isinstance(obj.__self__, _CONTAINERS):
        return obj.__name__, obj.__self__
    if kind in _VIEWS:
        return (obj.mapping,)
    if kind in (staticmethod, classmethod):
        return (obj.__func__,)
    if kind is property:
        return (obj.fget,)
    if issubclass(kind, functools.partial):
        return obj.func, obj.args, obj.keywords, vars(obj) or None
    return None


def _names_twice(held: Mapping[str, Any]) -> tuple[Hashable, ...]:
    """Returns the names of what `keys_and_values` returns."""
    return (*(("name", name) for name in held), *held)


def _is_member(name: Any, value: Any) -> bool:
    """Whether a name of a class's namespace is code or configuration."""
    if not name or isinstance(name, tuple):
        return not name
    if not (name.startswith("__") and name.endswith("__")):
        return name != "_abc_impl"
    return hasattr(type(value), "__get__")


def _is_plain(kind: type) -> bool:
    """Whether the attributes of an object are all that it holds."""
    if kind is types.SimpleNamespace or issubclass(kind, eqx.Module):
        return True
    return all(map(is_of_python, kind.__mro__[:-1]))


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    return tuple(
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(value, types.MemberDescriptorType)
        and is_of_python(base)
        and not name.startswith("__")
    )


def words_in(code: types.CodeType) -> frozenset[str]:
    """Returns all names in code, those of attributes among them."""
    return _names_in(code)[1]


@functools.lru_cache(maxsize=4096)
def _names_in(
    code: types.CodeType,
) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """Returns the globals that code reads, all names in it, and its imports."""
    read, written, words, imported = set(), set(), set(code.co_names), set()
    for instruction in dis.get_instructions(code):
        match instruction.opname:
            case "LOAD_GLOBAL" | "LOAD_NAME" | "LOAD_FROM_DICT_OR_GLOBALS":
                read.add(instruction.argval)
            case "STORE_GLOBAL" | "DELETE_GLOBAL":
                written.add(instruction.argval)
            case "IMPORT_NAME":
                imported.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, str):
            # `getattr(settings, "rate")`.
            words.add(constant)
        elif isinstance(constant, types.CodeType):
            inner, inner_words, inner_imported = _names_in(constant)
            read |= set(inner)
            words |= inner_words
            imported |= inner_imported
    return tuple(sorted(read - written)), frozenset(words), frozenset(imported)

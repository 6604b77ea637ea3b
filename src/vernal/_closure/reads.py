"""What code reads from outside of its arguments: found by a walk, and watched."""

import collections
import dis
import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from .._pickling import (
    content_of,
    is_library,
    is_library_file,
    is_library_module,
    module_of,
)
from .equality import Hashed, is_atom, value_key
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
    values_of,
    watches_of_names,
    without,
)

# A walk ends after so many objects, and does not enter a container of more elements
# than this: it is known by its identity and its length.
_MOST_OBJECTS = 20_000
_MOST_ELEMENTS = 1_024

# Libraries whose objects change by themselves, and configure no computation.
_RESTLESS = frozenset(
    (
        *("asyncio", "concurrent", "contextvars", "io", "logging", "matplotlib"),
        *("multiprocessing", "random", "re", "subprocess", "threading", "tqdm"),
        "weakref",
    )
)

_CACHED = type(functools.lru_cache(lambda: None))


def reads(*roots: Any) -> Reads:
    """Finds all that some objects and their code read, and its values now.

    **Arguments:**

    - `roots`: functions, classes, structures of pytrees, objects of any kind.
    """
    return _Walk().run(roots)


def scope_key(fn: types.FunctionType) -> Hashable:
    """A key of what a function reads from its globals, by way of its helpers too."""
    if is_library_file(fn.__code__.co_filename):
        return None
    walk = _Walk()
    walk.code(fn.__code__, fn.__globals__)
    return walk.run(()).key


class _Walk:
    """One walk. What an object is becomes a token, what it holds is looked at next."""

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
                # Attributes of a module count where any code has a word for them,
                # also those that it may have later.
                for scope in self.modules:
                    self.names(scope, sorted({*self.words, "__getattr__"}))
        for scope, names in self.scopes.values():
            self.watches += watches_of_names(scope, names)
        return Reads(Hashed(tuple(self.tokens)), self.watches)

    # What is looked at next.

    def names(self, scope: dict[str, Any], names: Iterable[str]) -> None:
        """Walks on to names of a namespace, those that no code has read before."""
        _, known = self.scopes.setdefault(id(scope), (scope, {}))
        new = [n for n in names if n not in known and (id(scope), n) not in kept]
        known.update(dict.fromkeys(new))
        there = tuple(name for name in new if name in scope)
        self.tokens.append(there)
        self.todo.extend(scope[name] for name in there)

    def hold(
        self,
        look: Look,
        owner: Any,
        names: Sequence[Hashable] | Names,
        is_walked: Callable[[Any, Any], bool] = lambda name, value: True,
    ) -> None:
        """Watches what an object holds, but for what is kept there, and walks on.

        **Arguments:**

        - `look`, `names`: what it holds, and under which names; a function of the
            object if there may be new ones.
        - `owner`: the object.
        - `is_walked`: whether to walk on to a name and its value.
        """
        if (id(owner), None) in kept:
            self.tokens.append("kept")
            return
        names_of = names if callable(names) else None
        every = all_names = names(owner) if callable(names) else names
        hidden = {name for name in all_names if (id(owner), name) in kept}
        if hidden:
            self.tokens.append("kept")
            look, names_of = without(hidden, look, names_of or (lambda _: every))
            all_names = names_of(owner)
        self.tokens.append((*all_names,))
        values = look(owner)
        self.watches.append(Watch(look, owner, all_names, values, names_of))
        pairs = zip(all_names, values, strict=True)
        self.todo.extend(value for name, value in pairs if is_walked(name, value))

    # What is seen.

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
        look, digest = look_at_array(array)
        self.hold(look, array, ("content",), lambda name, value: False)
        is_whole = array.nbytes <= MOST_BYTES
        mark = (array.shape, array.dtype) if is_whole else Only(array)
        is_kept = (id(array), "content") in kept
        self.tokens.append((mark, type(array), None if is_kept else digest))

    def elements(self, obj: Any, look: Look) -> None:
        kind, count = type(obj), len(obj)
        self.tokens.append(kind)
        if count > _MOST_ELEMENTS:
            self.tokens.append(Only(obj))
            self.hold(lambda held: (len(held) == count,), obj, ("length",))
        elif issubclass(kind, tuple):
            self.tokens.append(count)
            self.todo.extend(obj)
        elif issubclass(kind, set | frozenset):
            # Their order is not one of values.
            if (id(obj), None) not in kept:
                self.tokens.append(frozenset(map(value_key, obj)))
            self.hold(look, obj, range(count))
        else:
            self.hold(look, obj, range(len(look(obj))))
        if not is_library(kind):
            self.todo.append(kind)
            self.attributes(obj)

    def function(self, fn: types.FunctionType) -> None:
        is_library = is_library_file(fn.__code__.co_filename)
        self.tokens.append((fn.__code__, len(fn.__closure__ or ())))
        if is_library and not (fn.__closure__ or fn.__dict__):
            return
        self.hold(made_of, fn, ("code", "defaults", "kwdefaults"), _is_content)
        self.todo.append(fn.__dict__ or None)
        for cell in fn.__closure__ or ():
            # There may be nothing in it yet.
            self.hold(content_of, cell, ("content",)[: len(content_of(cell))])
        if not is_library:
            self.code(fn.__code__, fn.__globals__)

    def code(self, code: types.CodeType, scope: dict[str, Any]) -> None:
        """What the code of a user's function reads by name."""
        read, words, imported = _names_in(code)
        self.words |= words
        self.names(scope, read)
        # The name of a relative import does not say from which of the packages.
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
        look = lambda kind: (kind.__mro__, *vars(kind).values())
        self.hold(look, kind, lambda kind: ("", *vars(kind)), _is_member)
        self.todo.append(type(kind))

    def module(self, module: types.ModuleType) -> None:
        self.tokens.append(Only(module))
        if not is_library_module(module.__name__, module):
            self.modules.append(vars(module))

    def structure(self, structure: Any) -> None:
        """The classes and the static values of a pytree."""
        data = structure.node_data()
        self.tokens.append((jtu.PyTreeDef, structure.num_leaves, data is None))
        if data is not None:
            # The keys of a dictionary are a list that was made for us.
            self.todo.extend(tuple(x) if type(x) is list else x for x in data)
            self.todo.extend(structure.children())

    def skeleton(self, skeleton: Skeleton) -> None:
        """The functions and the objects that are captured in a closure."""
        plan = skeleton.plan
        self.tokens.append((Skeleton, len(plan.shells)))
        for shell in plan.shells:
            if not is_library_file(shell.code.co_filename):
                self.code(shell.code, shell.scope)
        for part in all_parts(plan):
            if isinstance(part, Group) and isinstance(part.key, tuple):
                # The class and the static values of a node, where it is one.
                found = [key for key in part.key if type(key) is jtu.PyTreeDef]
                self.todo.extend(found)
            # A cell that a function writes to holds its state.
            elif isinstance(part, Static) and type(part.value) is not types.CellType:
                self.todo.append(part.value)

    def instance(self, obj: Any) -> None:
        kind = type(obj)
        package = module_of(kind).split(".")[0]
        if package in _RESTLESS:
            self.tokens.append(Only(obj))
        elif package in ("jax", "jaxlib") or kind is _CACHED:
            # Functions that are compiled, or have rules of their own for derivatives.
            wrapped = getattr(obj, "__wrapped__", None)
            self.tokens.append(Only(obj) if wrapped is None else kind)
            self.todo.append(wrapped)
            if wrapped is not None and kind.__name__.startswith("custom_"):
                self.attributes(obj)
        else:
            self.tokens.append(kind if _is_plain(kind) else Only(obj))
            if not is_library(kind):
                self.todo.append(kind)
            if not self.attributes(obj):
                # A mark, such as `object()`, is known by its identity.
                is_mark = kind.__eq__ is object.__eq__
                self.tokens.append(Only(obj) if is_mark else value_key(obj))

    def attributes(self, obj: Any) -> bool:
        """Watches and walks the attributes of an object; whether it has any."""
        # Not `getattr`, which may call code of the user's.
        try:
            there = object.__getattribute__(obj, "__dict__")
        except AttributeError:
            there = None
        if type(there) is dict and (there or not is_library(type(obj))):
            self.hold(values_of, there, tuple)
        slots = _slots(type(obj))
        if slots:
            look = lambda obj: tuple([getattr(obj, name, None) for name in slots])
            self.hold(look, obj, slots)
        return bool(there or slots)


def _parts(obj: Any) -> tuple[Any, ...] | None:
    """What an object that never changes is made of, `None` if it is not known."""
    kind = type(obj)
    if kind is types.MethodType:
        return obj.__func__, obj.__self__
    if kind in (staticmethod, classmethod):
        return (obj.__func__,)
    if kind is property:
        return (obj.fget,)
    if issubclass(kind, functools.partial):
        return obj.func, obj.args, obj.keywords, vars(obj) or None
    return None


def _is_content(name: str, value: Any) -> bool:
    return name != "code"


def _is_member(name: str, value: Any) -> bool:
    """Whether a name of a class's namespace is code or configuration."""
    if not name:
        return True
    if not (name.startswith("__") and name.endswith("__")):
        return name != "_abc_impl"
    return hasattr(type(value), "__get__")


def _is_plain(kind: type) -> bool:
    """Whether an object of a class is no more than its attributes."""
    if kind is types.SimpleNamespace or issubclass(kind, eqx.Module):
        return True
    heap = 1 << 9
    return all(base.__flags__ & heap for base in kind.__mro__[:-1])


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    return tuple(
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(value, types.MemberDescriptorType)
        and base.__flags__ & (1 << 9)
        and not name.startswith("__")
    )


@functools.lru_cache(maxsize=4096)
def _names_in(
    code: types.CodeType,
) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """The globals that a code object reads, all of its names, and its imports."""
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

"""Functions as values: a closure split into array leaves and a comparable skeleton."""

import dataclasses
import dis
import functools
import hashlib
import types
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array

# Comparing values. Python's `==` is too generous for what decides a compilation:
# `1 == 1.0 == True`, `-0.0 == 0.0`, and `nan` differs from itself.


class _Same:
    """Equal to itself alone. Holds its object, so that no other can take its id."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any):
        self.obj = obj

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.obj is other.obj

    def __hash__(self) -> int:
        return id(self.obj)


def _value_key(obj: Any) -> Hashable:
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
            return type(obj), tuple(map(_value_key, obj))
        case frozenset() | set():
            return type(obj), frozenset(map(_value_key, obj))
    try:
        hash(obj)
    except TypeError:
        return _Same(obj)
    return type(obj), obj


@functools.lru_cache(maxsize=4096)
def _names_used(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
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
            inner_read, inner_rebound = _names_used(constant)
            read |= inner_read
            rebound |= inner_rebound
    return frozenset(read - written), frozenset(rebound & set(code.co_freevars))


def _globals_key(fn: types.FunctionType) -> Hashable:
    # A notebook's cell run again makes an equal function over the same globals, in
    # which a number may have changed. Compiled code has the old one baked in.
    scope = fn.__globals__
    read, _ = _names_used(fn.__code__)
    plain = (bool, int, float, complex, str, type(None))
    return _Same(scope), frozenset(
        (name, _value_key(value) if type(value) in plain else _Same(value))
        for name in read
        if (value := scope.get(name, scope)) is not scope
    )


# The parts of a skeleton. Each knows how to build its object again.


class _Part(Protocol):
    def build(self, site: "_Site") -> Any: ...


@dataclasses.dataclass(slots=True)
class _Site:
    """What the parts of one skeleton are built from."""

    leaves: tuple[Any, ...]
    functions: list[types.FunctionType]


@dataclasses.dataclass(frozen=True, slots=True)
class _Leaf:
    index: int

    def build(self, site: _Site) -> Any:
        return site.leaves[self.index]


@dataclasses.dataclass(frozen=True, slots=True)
class _Static:
    key: Hashable
    value: Any = dataclasses.field(compare=False)

    def build(self, site: _Site) -> Any:
        return self.value


@dataclasses.dataclass(frozen=True, slots=True)
class _Function:
    index: int

    def build(self, site: _Site) -> Any:
        return site.functions[self.index]


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """Anything made by one call on its parts: a container, a method, a partial."""

    key: Hashable
    parts: tuple[_Part, ...]
    make: Callable[[list[Any]], Any] = dataclasses.field(compare=False)

    def build(self, site: _Site) -> Any:
        return self.make([part.build(site) for part in self.parts])


@dataclasses.dataclass(frozen=True, slots=True)
class _Shell:
    """A function without its contents: built first, so that cells may hold it."""

    key: Hashable
    cells: tuple[int, ...]
    defaults: _Part
    kwdefaults: _Part
    attributes: _Part
    code: types.CodeType = dataclasses.field(compare=False)
    scope: dict[str, Any] = dataclasses.field(compare=False)
    metadata: dict[str, Any] = dataclasses.field(compare=False)

    def open(self, cells: list[types.CellType]) -> types.FunctionType:
        closure = tuple(cells[i] for i in self.cells)
        fn = types.FunctionType(self.code, self.scope, closure=closure)
        for name, value in self.metadata.items():
            setattr(fn, name, value)
        return fn

    def fill(self, fn: types.FunctionType, site: _Site) -> None:
        fn.__defaults__ = self.defaults.build(site)
        fn.__kwdefaults__ = self.kwdefaults.build(site)
        fn.__dict__.update(self.attributes.build(site))


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    root: _Part
    shells: tuple[_Shell, ...]
    cells: tuple[_Part | None, ...]


class Skeleton:
    """All of a closure but its arrays: hashable, compared by value, interned."""

    __slots__ = ("__weakref__", "_hash", "plan")

    def __init__(self, plan: _Plan, hashed: int):
        self.plan = plan
        self._hash = hashed

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Skeleton) or self._hash != other._hash:
            return False
        return self.plan == other.plan

    def __copy__(self) -> "Skeleton":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Skeleton":
        return self

    @property
    def function_names(self) -> frozenset[str]:
        """The qualified names of the functions with something in them."""
        return frozenset(s.metadata["__qualname__"] for s in self.plan.shells)

    def __repr__(self) -> str:
        return f"Skeleton({', '.join(sorted(self.function_names))})"


_interned: weakref.WeakValueDictionary[_Plan, Skeleton] = weakref.WeakValueDictionary()


class _Encoder:
    """One walk over an object. Shared cells and functions are met once."""

    def __init__(self, rates: frozenset[str]):
        self.rates = rates
        self.leaves: list[Array] = []
        self.shells: list[_Shell | None] = []
        self.cells: list[_Part | None] = []
        self.function_index: dict[int, int] = {}
        self.cell_index: dict[int, int] = {}
        self.met: dict[int, _Part] = {}
        # Objects made on the way must outlive the walk, or their ids are reused.
        self.alive: list[Any] = []
        self.open: set[int] = set()

    def leaf(self, array: Array) -> _Part:
        self.leaves.append(array)
        return _Leaf(len(self.leaves) - 1)

    def walk(self, obj: Any, name: str | None = None) -> _Part:
        if isinstance(obj, jax.Array):
            return self.leaf(obj)
        if name in self.rates and isinstance(obj, float | np.floating):
            # Of a Python float this makes a weakly typed array, which takes the dtype
            # of what it multiplies. Integers may be counts, and stay.
            return self.leaf(jnp.asarray(obj))
        if isinstance(obj, str | int | float | type | types.ModuleType | None):
            return _Static(_value_key(obj), obj)
        if type(obj) is types.FunctionType:
            return self.function(obj)
        if type(obj) is np.ndarray:
            # A copy, which stays what it was compared as.
            return _Static(_value_key(obj), obj.copy())
        if id(obj) in self.open:
            return _Static(_Same(obj), obj)
        if (part := self.met.get(id(obj))) is not None:
            # E.g. the module that the methods `init` and `update` are both bound to.
            return part
        self.alive.append(obj)
        self.open.add(id(obj))
        part = self.met[id(obj)] = self.group(obj)
        self.open.remove(id(obj))
        return part

    def parts(self, objs: Iterable[Any]) -> tuple[_Part, ...]:
        return tuple(self.walk(obj) for obj in objs)

    def group(self, obj: Any) -> _Part:
        kind = type(obj)
        if kind is tuple:
            return _Group(kind, self.parts(obj), tuple)
        if kind is list and obj:
            return _Group(kind, self.parts(obj), list)
        if kind is list:
            # An empty list configures nothing: it is there to be appended to, and
            # whoever waits for what is appended holds this very one.
            return _Static(_Same(obj), obj)
        if kind is set:
            return _Group((kind, _value_key(obj)), (), lambda _, v=frozenset(obj): {*v})
        if kind is dict:
            return self.dictionary(obj)
        if kind is types.MethodType:
            parts = self.parts((obj.__func__, obj.__self__))
            return _Group(kind, parts, lambda built: types.MethodType(*built))
        if kind in (functools.partial, jtu.Partial):
            parts = self.parts((obj.func, obj.args, obj.keywords))
            return _Group(kind, parts, lambda b: kind(b[0], *b[1], **b[2]))
        return self.node(obj)

    def dictionary(self, obj: dict[Any, Any]) -> _Part:
        keys = tuple(obj)
        names = (key if isinstance(key, str) else None for key in keys)
        parts = tuple(map(self.walk, obj.values(), names))
        return _Group(
            (dict, tuple(map(_value_key, keys))),
            parts,
            lambda built: dict(zip(keys, built, strict=True)),
        )

    def node(self, obj: Any) -> _Part:
        children, treedef = jtu.tree_flatten(obj, is_leaf=lambda x: x is not obj)
        if jtu.treedef_is_leaf(treedef):
            return _Static(_value_key(obj), obj)
        node = treedef.node_data()
        try:
            # A treedef compares its static data by `==`, which is too generous.
            key = treedef, _value_key(node and node[1])
            hash(key)
        except TypeError:
            return _Static(_Same(obj), obj)
        return _Group(key, self.parts(children), treedef.unflatten)

    def function(self, fn: types.FunctionType) -> _Part:
        key = (
            fn.__code__,
            _globals_key(fn),
            fn.__name__,
            fn.__qualname__,
            fn.__module__,
            fn.__doc__,
        )
        contents = fn.__closure__, fn.__defaults__, fn.__kwdefaults__, fn.__dict__
        if not any(contents):
            return _Static(key, fn)
        if (index := self.function_index.get(id(fn))) is not None:
            return _Function(index)
        index = self.function_index[id(fn)] = len(self.shells)
        self.shells.append(None)
        self.alive.append(fn)
        _, rebound = _names_used(fn.__code__)
        cells = tuple(
            self.cell(cell, name, name in rebound)
            for name, cell in zip(
                fn.__code__.co_freevars, fn.__closure__ or (), strict=True
            )
        )
        self.shells[index] = _Shell(
            key,
            cells,
            self.walk(fn.__defaults__),
            self.walk(fn.__kwdefaults__),
            self.walk(fn.__dict__),
            fn.__code__,
            fn.__globals__,
            _metadata(fn),
        )
        return _Function(index)

    def cell(self, cell: types.CellType, name: str, rebound: bool) -> int:
        index = self.cell_index.get(id(cell))
        met = index is not None
        if index is None:
            index = self.cell_index[id(cell)] = len(self.cells)
            self.cells.append(None)
        if rebound:
            # The function writes to it (`nonlocal`): state, not configuration.
            self.cells[index] = _Static(_Same(cell), cell)
        elif not met:
            try:
                part = self.walk(cell.cell_contents, name)
            except ValueError:
                return index
            self.cells[index] = self.cells[index] or part
        return index


def _metadata(fn: types.FunctionType) -> dict[str, Any]:
    names = ["__name__", "__qualname__", "__module__", "__doc__"]
    # Where annotations are lazy, asking for them may fail; their maker can be kept.
    lazy = hasattr(fn, "__annotate__")
    names.append("__annotate__" if lazy else "__annotations__")
    return {name: getattr(fn, name) for name in names}


class Closure(eqx.Module):
    """An object made of functions, as a pytree of the arrays that they captured.

    Two closures built by the same code from equal values have equal skeletons, so
    that one compiled program serves both, whatever is in their leaves.
    """

    leaves: tuple[Array, ...]
    skeleton: Skeleton = eqx.field(static=True)

    @classmethod
    def encode(cls, obj: Any, rates: frozenset[str] = frozenset()) -> "Closure":
        """Separates an object into its arrays and the rest.

        **Arguments:**

        - `obj`: functions, bound methods, partials, containers, pytrees and any mix
            of them. What is none of these is kept as it is: compared by type and
            value if it can be hashed, by identity if it cannot.
        - `rates`: names. A float in a variable or under a dictionary key of such a
            name becomes a leaf as well.

        **Returns:**

        The closure, which [`decode`][vernal._closures.Closure.decode] turns back.
        """
        encoder = _Encoder(rates)
        root = encoder.walk(obj)
        shells = cast(tuple[_Shell, ...], tuple(encoder.shells))
        plan = _Plan(root, shells, tuple(encoder.cells))
        skeleton = _interned.get(plan)
        if skeleton is None:
            skeleton = _interned[plan] = Skeleton(plan, hash(plan))
        return cls(tuple(encoder.leaves), skeleton)

    def decode(self) -> Any:
        """Builds the object again, around the leaves as they are now.

        **Returns:**

        An object that behaves as the encoded one. Cells that functions shared are
        shared again.
        """
        plan = self.skeleton.plan
        cells = [
            part.value
            if isinstance(part, _Static) and isinstance(part.value, types.CellType)
            else types.CellType()
            for part in plan.cells
        ]
        functions = [shell.open(cells) for shell in plan.shells]
        site = _Site(self.leaves, functions)
        for shell, fn in zip(plan.shells, functions, strict=True):
            shell.fill(fn, site)
        for cell, part in zip(cells, plan.cells, strict=True):
            if part is not None and not (
                isinstance(part, _Static) and part.value is cell
            ):
                cell.cell_contents = part.build(site)
        return plan.root.build(site)

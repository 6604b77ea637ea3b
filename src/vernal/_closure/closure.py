"""Functions as values: a closure split into array leaves and a comparable skeleton."""

import enum
import functools
import pickle
import types
from collections.abc import Hashable, Iterable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array

from .._pickling import (
    PlainMethods,
    Portable,
    build,
    content_of,
    is_named,
    metadata,
)
from .equality import Hashed, Same, content_key, copied, names_written, value_key
from .reads import reads, scope_key
from .skeleton import (
    Function,
    Group,
    Leaf,
    Part,
    Plan,
    Shell,
    Skeleton,
    Static,
    interned,
)


class _Encoder:
    """One walk over an object, in which shared cells and functions are met once."""

    def __init__(self, rates: frozenset[str], within: tuple[str, ...] | None):
        self.rates = self.all_rates = rates
        self.within = within
        self.leaves: list[Array] = []
        self.shells: list[Shell | None] = []
        self.cells: list[Part | None] = []
        self.cell_index: dict[int, int] = {}
        self.met: dict[int, Part] = {}
        # Objects made on the way must outlive the walk, or their ids are reused.
        self.alive: list[Any] = []
        self.open: set[int] = set()

    def leaf(self, array: Array) -> Part:
        self.leaves.append(array)
        return Leaf(len(self.leaves) - 1)

    def walk(self, obj: Any, name: str | None = None) -> Part:
        if isinstance(obj, jax.Array):
            return self.leaf(obj)
        if name in self.rates and isinstance(obj, float | np.floating):
            # A Python float becomes a weakly typed array, which takes the dtype of what
            # it multiplies. Integers may be counts, and stay.
            return self.leaf(jnp.asarray(obj))
        if isinstance(obj, str | int | float | type | types.ModuleType | None):
            return Static(value_key(obj), obj)
        if type(obj) is np.ndarray:
            # A copy, which stays what it was compared as.
            return Static(value_key(obj), obj.copy())
        if id(obj) in self.open:
            return Static(Same(obj), obj)
        if (part := self.met.get(id(obj))) is not None:
            # E.g. the module that the methods `init` and `update` are both bound to.
            return part
        if type(obj) is types.FunctionType:
            return self.function(obj)
        self.alive.append(obj)
        self.open.add(id(obj))
        part = self.met[id(obj)] = self.group(obj, name)
        self.open.remove(id(obj))
        return part

    def parts(self, objs: Iterable[Any]) -> tuple[Part, ...]:
        return tuple(self.walk(obj) for obj in objs)

    def group(self, obj: Any, name: str | None) -> Part:
        kind = type(obj)
        if kind is tuple or (kind is list and obj):
            return Group(kind, self.parts(obj), kind)
        if kind is list:
            # An empty list configures nothing: it is there to be appended to by those
            # who hold this very list.
            return Static(Same(obj), obj)
        if kind is set:
            items = frozenset(obj)
            return Group((kind, value_key(obj)), (), lambda parts: {*items})
        if kind is dict:
            return self.dictionary(obj, name)
        if kind is types.MethodType:
            parts = self.parts((obj.__func__, obj.__self__))
            return Group(kind, parts, lambda parts: types.MethodType(*parts))
        if kind in (functools.partial, jtu.Partial):
            make = lambda parts: kind(parts[0], *parts[1], **parts[2])
            return Group(kind, self.parts((obj.func, obj.args, obj.keywords)), make)
        return self.node(obj)

    def dictionary(self, obj: dict[Any, Any], name: str | None) -> Part:
        keys = tuple(obj)
        names = (key if isinstance(key, str) else None for key in keys)
        if name in self.rates:
            # A dictionary of rates: each is one, whatever its own name.
            names = (name for _ in keys)
        parts = tuple(map(self.walk, obj.values(), names))
        make = lambda parts: dict(zip(keys, parts, strict=True))
        return Group((dict, tuple(map(value_key, keys))), parts, make)

    def node(self, obj: Any) -> Part:
        if isinstance(obj, Leaf):
            # It marks an array in what was pickled.
            return obj
        children, treedef = jtu.tree_flatten(obj, is_leaf=lambda x: x is not obj)
        if treedef == jtu.tree_structure(0):
            if _is_what_it_holds(obj):
                kind, held = type(obj), self.dictionary(vars(obj), None)
                return Group(kind, (held,), lambda parts: build(kind, *parts))
            # Equal objects may read different values.
            return Static((value_key(obj), reads(obj).key), obj)
        try:
            key = _own_structure(treedef)
            hash(key)
        except (TypeError, RecursionError):
            return Static(Same(obj), obj)
        return Group(key, self.parts(children), key[0].unflatten)

    def function(self, fn: types.FunctionType) -> Part:
        key = (
            fn.__code__,
            Same(fn.__globals__),
            scope_key(fn),
            fn.__name__,
            fn.__qualname__,
            fn.__module__,
            fn.__doc__,
        )
        contents = fn.__closure__, fn.__defaults__, fn.__kwdefaults__, fn.__dict__
        if not any(contents):
            return Static(key, fn)
        index = len(self.shells)
        part = self.met[id(fn)] = Function(index)
        self.shells.append(None)
        self.alive.append(fn)
        met = len(self.leaves)
        outer_rates, package = self.rates, fn.__globals__.get("__name__", "")
        is_within = self.within is None or package.split(".")[0] in self.within
        self.rates = self.all_rates if is_within else frozenset()
        written, names = names_written(fn.__code__), fn.__code__.co_freevars
        cells = tuple(
            self.cell(cell, name, name in written)
            for name, cell in zip(names, fn.__closure__ or (), strict=True)
        )
        self.shells[index] = Shell(
            key,
            cells,
            self.walk(fn.__defaults__),
            self.walk(fn.__kwdefaults__),
            self.walk(fn.__dict__),
            fn.__code__,
            fn.__globals__,
            metadata(fn),
            fn if is_named(fn) and len(self.leaves) == met else None,
        )
        self.rates = outer_rates
        return part

    def cell(self, cell: types.CellType, name: str, is_written: bool) -> int:
        is_new = id(cell) not in self.cell_index
        index = self.cell_index.setdefault(id(cell), len(self.cells))
        if is_new:
            self.cells.append(None)
        if is_written and not self.rates:
            # State, not configuration. Where there are rates the function is Optax's,
            # which writes to a variable to change the type of a number.
            self.cells[index] = Static(Same(cell), cell)
        elif is_new:
            for content in content_of(cell):
                part = self.walk(content, name)
                # A function within may have written to it.
                self.cells[index] = self.cells[index] or part
        return index


def _is_what_it_holds(obj: Any) -> bool:
    """Whether it is an object of a class of Optax, as the one within `MultiSteps`.

    Members of an enumeration are known by their identity.
    """
    kind = type(obj)
    is_of_optax = kind.__module__.split(".")[0] == "optax"
    is_plain = kind.__eq__ is object.__eq__ and hasattr(obj, "__dict__")
    return is_of_optax and is_plain and not isinstance(obj, enum.Enum)


def _own_structure(treedef: Any) -> tuple[Any, Hashable]:
    """Returns the structure of a node, whose containers nobody else can change.

    The key beside it compares static data strictly: a structure does it by `==`.
    """
    kind, data = treedef.node_data() or (None, None)
    own = copied(data)
    if own is not data:
        of = jtu.default_registry, (kind, own), treedef.children()
        new = jtu.PyTreeDef.from_node_data_and_children(*of)
        if new == treedef:  # of a module that is a tuple JAX makes another node
            return new, content_key(own)
    return treedef, value_key(data)


class Closure(Portable, PlainMethods, eqx.Module):
    """An object made of functions, as a pytree of the arrays that they captured.

    Two closures built by the same code from equal values have equal skeletons, so
    that one compiled program serves both, whatever is in their leaves.
    """

    # A tuple of arrays, or what JAX puts in its place in the structure of a tree.
    leaves: Any
    skeleton: Skeleton = eqx.field(static=True)

    @classmethod
    def encode(
        cls,
        obj: Any,
        rates: frozenset[str] = frozenset(),
        within: tuple[str, ...] | None = None,
    ) -> "Closure":
        """Separates functions, containers and pytrees into their arrays and the rest.

        A float in a variable or under a key that is named in `rates`, or in a
        dictionary of that name, becomes a leaf too, and variables that functions write
        to are taken by value. This holds in functions of the packages `within` alone,
        if these are given: others may look at a rate in Python.
        """
        encoder = _Encoder(rates, within)
        root = encoder.walk(obj)
        shells = cast(tuple[Shell, ...], tuple(encoder.shells))
        plan = Plan(root, shells, tuple(encoder.cells))
        key = Hashed(plan)
        skeleton = interned.get(key)
        if skeleton is None:
            recipe = _encoded_again, rates, within
            skeleton = interned[key] = Skeleton(plan, recipe)
        return cls(tuple(encoder.leaves), skeleton)

    def decode(self) -> Any:
        """Builds the object again, around the leaves as they are now.

        Functions that shared a variable share it again.
        """
        return self.skeleton.plan.build(self.leaves)


def _encoded_again(
    obj: Any, rates: frozenset[str], within: tuple[str, ...] | None
) -> Skeleton:
    closure = Closure.encode(obj, rates, within)
    if closure.leaves:
        raise pickle.UnpicklingError(
            f"What was pickled with {closure.skeleton!r} has an array here that it had "
            "not there. Pickles are for processes of one environment; to keep a "
            "trainer, use `vernal.save`."
        )
    return closure.skeleton

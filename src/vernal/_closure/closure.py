"""Functions as values: a closure split into array leaves and a comparable skeleton."""

import copy
import functools
import pickle
import types
from collections.abc import Iterable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array

from .._pickling import is_named, metadata
from .equality import Hashed, Same, names_rebound, value_key
from .reads import reads, scope_key
from .skeleton import (
    Function,
    Group,
    Hollow,
    Leaf,
    Part,
    Plan,
    Shell,
    Skeleton,
    Static,
    all_parts,
    interned,
)


class _Encoder:
    """One walk over an object. Shared cells and functions are met once."""

    def __init__(self, rates: frozenset[str], within: tuple[str, ...] | None):
        self.rates = self.all_rates = rates
        self.within = within
        self.leaves: list[Array] = []
        self.shells: list[Shell | None] = []
        self.cells: list[Part | None] = []
        self.function_index: dict[int, int] = {}
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
            # Of a Python float this makes a weakly typed array, which takes the dtype
            # of what it multiplies. Integers may be counts, and stay.
            return self.leaf(jnp.asarray(obj))
        if isinstance(obj, str | int | float | type | types.ModuleType | None):
            return Static(value_key(obj), obj)
        if type(obj) is types.FunctionType:
            return self.function(obj)
        if type(obj) is np.ndarray:
            # A copy, which stays what it was compared as.
            return Static(value_key(obj), obj.copy())
        if id(obj) in self.open:
            return Static(Same(obj), obj)
        if (part := self.met.get(id(obj))) is not None:
            # E.g. the module that the methods `init` and `update` are both bound to.
            return part
        self.alive.append(obj)
        self.open.add(id(obj))
        part = self.met[id(obj)] = self.group(obj, name)
        self.open.remove(id(obj))
        return part

    def parts(self, objs: Iterable[Any]) -> tuple[Part, ...]:
        return tuple(self.walk(obj) for obj in objs)

    def group(self, obj: Any, name: str | None = None) -> Part:
        kind = type(obj)
        if kind is tuple:
            return Group(kind, self.parts(obj), tuple)
        if kind is list and obj:
            return Group(kind, self.parts(obj), list)
        if kind is list:
            # An empty list configures nothing: it is there to be appended to, and
            # whoever waits for what is appended holds this very one.
            return Static(Same(obj), obj)
        if kind is set:
            make = functools.partial(_as_set, frozenset(obj))
            return Group((kind, value_key(obj)), (), make)
        if kind is dict:
            return self.dictionary(obj, name)
        if kind is types.MethodType:
            parts = self.parts((obj.__func__, obj.__self__))
            return Group(kind, parts, _as_method)
        if kind in (functools.partial, jtu.Partial):
            parts = self.parts((obj.func, obj.args, obj.keywords))
            return Group(kind, parts, functools.partial(_as_partial, kind))
        return self.node(obj)

    def dictionary(self, obj: dict[Any, Any], name: str | None) -> Part:
        keys = tuple(obj)
        names = (key if isinstance(key, str) else None for key in keys)
        if name in self.rates:
            # A dictionary of rates: each is one, whatever its own name.
            names = (name for _ in keys)
        parts = tuple(map(self.walk, obj.values(), names))
        return Group(
            (dict, tuple(map(value_key, keys))),
            parts,
            functools.partial(_as_dict, keys),
        )

    def node(self, obj: Any) -> Part:
        if isinstance(obj, Leaf):
            # The mark of one, in what was pickled.
            return obj
        children, treedef = jtu.tree_flatten(obj, is_leaf=lambda x: x is not obj)
        if jtu.treedef_is_leaf(treedef):
            # What is equal to another object may hold something else.
            return Static((value_key(obj), reads(obj).key), obj)
        node = treedef.node_data()
        try:
            # A treedef compares its static data by `==`, which is too generous.
            key = treedef, value_key(node and node[1])
            hash(key)
        except TypeError:
            return Static(Same(obj), obj)
        return Group(key, self.parts(children), Hollow(treedef))

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
        if (index := self.function_index.get(id(fn))) is not None:
            return Function(index)
        index = self.function_index[id(fn)] = len(self.shells)
        self.shells.append(None)
        self.alive.append(fn)
        rebound = names_rebound(fn.__code__)
        met = len(self.leaves)
        outer_rates, package = self.rates, fn.__globals__.get("__name__", "")
        is_within = self.within is None or package.split(".")[0] in self.within
        self.rates = self.all_rates if is_within else frozenset()
        cells = tuple(
            self.cell(cell, name, name in rebound)
            for name, cell in zip(
                fn.__code__.co_freevars, fn.__closure__ or (), strict=True
            )
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
        return Function(index)

    def cell(self, cell: types.CellType, name: str, rebound: bool) -> int:
        index = self.cell_index.get(id(cell))
        met = index is not None
        if index is None:
            index = self.cell_index[id(cell)] = len(self.cells)
            self.cells.append(None)
        if rebound and not self.rates:
            # The function writes to it (`nonlocal`): state, not configuration. Where
            # there are rates it is Optax's, which does so to change a number's type.
            self.cells[index] = Static(Same(cell), cell)
        elif not met:
            try:
                part = self.walk(cell.cell_contents, name)
            except ValueError:
                return index
            self.cells[index] = self.cells[index] or part
        return index


def _as_set(items: frozenset[Any], parts: list[Any]) -> set[Any]:
    return {*items}


def _as_dict(keys: tuple[Any, ...], parts: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, parts, strict=True))


def _as_method(parts: list[Any]) -> types.MethodType:
    return types.MethodType(*parts)


def _as_partial(kind: Any, parts: list[Any]) -> Any:
    return kind(parts[0], *parts[1], **parts[2])


class Closure(eqx.Module):
    """An object made of functions, as a pytree of the arrays that they captured.

    Two closures built by the same code from equal values have equal skeletons, so
    that one compiled program serves both, whatever is in their leaves.
    """

    # A tuple of arrays; within the structure of a tree, what stands for it.
    leaves: Any
    skeleton: Skeleton = eqx.field(static=True)

    @classmethod
    def encode(
        cls,
        obj: Any,
        rates: frozenset[str] = frozenset(),
        within: tuple[str, ...] | None = None,
    ) -> "Closure":
        """Separates an object into its arrays and the rest.

        **Arguments:**

        - `obj`: functions, bound methods, partials, containers, pytrees and any mix
            of them. What is none of these is kept as it is: compared by type and
            value if it can be hashed, by identity if it cannot.
        - `rates`: names. A float in a variable or under a dictionary key of such a
            name becomes a leaf as well, and so does each in a dictionary of that name.
            For transformations: what they rebind by `nonlocal` is taken by value.
        - `within`: packages. Where given, `rates` holds in their functions alone: what
            others do with a rate, nobody knows; they may look at it in Python.

        **Returns:**

        The closure, which `decode` turns back.
        """
        encoder = _Encoder(rates, within)
        skeleton = _skeleton(encoder, obj)
        return cls(tuple(encoder.leaves), skeleton)

    def decode(self) -> Any:
        """Builds the object again, around the leaves as they are now.

        **Returns:**

        An object that behaves as the encoded one. Cells that functions shared are
        shared again.
        """
        return self.skeleton.plan.build(self.leaves)

    def __copy__(self) -> "Closure":
        return Closure(self.leaves, self.skeleton)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Closure":
        return Closure(copy.deepcopy(self.leaves, memo), self.skeleton)

    def __reduce__(self) -> Any:
        return Closure, (self.leaves, self.skeleton)


def _skeleton(encoder: _Encoder, obj: Any) -> Skeleton:
    root = encoder.walk(obj)
    shells = cast(tuple[Shell, ...], tuple(encoder.shells))
    plan = Plan(root, shells, tuple(encoder.cells))
    key = Hashed(plan)
    skeleton = interned.get(key)
    if skeleton is None:
        recipe = _encoded_anew, (plan, encoder.all_rates, encoder.within)
        skeleton = interned[key] = Skeleton(plan, hash(key), recipe)
    return skeleton


def _encoded_anew(
    plan: Plan, rates: frozenset[str], within: tuple[str, ...] | None
) -> Skeleton:
    """Builds the object of a pickle, with marks for the leaves, and encodes it here."""
    marks = {part.index: part for part in all_parts(plan) if isinstance(part, Leaf)}
    encoder = _Encoder(rates, within)
    skeleton = _skeleton(encoder, plan.build(marks))
    if encoder.leaves:
        raise pickle.UnpicklingError(
            f"What was pickled with {skeleton!r} has an array here that it had not "
            "there. Pickles are for processes of one environment; to keep a trainer, "
            "use `vernal.save`."
        )
    return skeleton

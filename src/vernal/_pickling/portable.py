"""Equinox modules, and what they hold, in a form that pickle accepts."""

import copy
import copyreg
import functools
import importlib
import operator
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._boundary import is_wide, is_x64_on
from .code import Stand, by_code, by_name, content_of, is_named, new_cell
from .library import is_of_python, module_of

T = TypeVar("T")


class Portable:
    """A mixin for `equinox.Module`: pickled and copied modules stay immutable.

    Pickle makes a module without calling its class. Equinox takes such a module for one
    that is still being initialised: it stays mutable, and is never freed.
    """

    def __copy__(self: T) -> T:
        return build(type(self), vars(self))

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        return jax.tree.map(lambda leaf: copy.deepcopy(leaf, memo), self)

    def __reduce__(self) -> Any:
        leaves = jax.tree.leaves(self)
        is_float64 = any(is_wide(x.dtype) for x in leaves if isinstance(x, jax.Array))
        return _loaded, (type(self), _Packing().fields(vars(self)), is_float64)


def _loaded(kind: type, fields: Mapping[str, Any], is_float64: bool) -> Any:
    if is_float64 and not is_x64_on():
        raise ValueError(
            f"The `{kind.__name__}` was pickled while `jax_enable_x64` was on, and in "
            "this process it is off: JAX would round it to 32 bits. Turn it on here "
            'too: by `jax.config.update("jax_enable_x64", True)` at the start of each '
            "process (the `initializer` of a pool), or by `JAX_ENABLE_X64=1` in its "
            "environment."
        )
    return build(kind, fields)


def build(kind: type, fields: Mapping[str, Any]) -> Any:
    """Makes an object from its fields, without `__init__`."""
    new = object.__new__(kind)
    # Not `vars`, which is slower for modules of Equinox.
    object.__getattribute__(new, "__dict__").update(fields)
    return new


def packed(obj: Any) -> Any:
    """Returns what to pickle in place of an object: itself, if pickle accepts it.

    Functions and tree structures within it are referred to by name or by their code, or
    taken apart. Modules are built again from their fields.
    """
    return _Packing().of(obj)


class _Packing:
    """One walk. An object that is met twice is loaded as one object."""

    def __init__(self) -> None:
        self.met: dict[int, Any] = {}
        # Objects made on the way must outlive the walk, or their ids are reused.
        self.alive: list[Any] = []

    def fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self.of(value) for name, value in fields.items()}

    def of(self, obj: Any) -> Any:
        if isinstance(obj, jax.Array | str | int | float | type | None):
            return obj
        if id(obj) in self.met:
            return self.met[id(obj)]
        self.alive.append(obj)
        # Cycles are left to the pickler.
        self.met[id(obj)] = obj
        new = self.met[id(obj)] = self.first(obj)
        return new

    def first(self, obj: Any) -> Any:
        match obj:
            case types.FunctionType():
                return obj if is_named(obj) else self.function(obj)
            case types.ModuleType():
                return Stand(importlib.import_module, obj.__name__)
            case types.MethodType():
                parts = self.of(obj.__func__), self.of(obj.__self__)
                return Stand(_method, *parts)
            case functools.partial():
                parts = obj.func, obj.args, obj.keywords
                return Stand(_partial, type(obj), *map(self.of, parts))
            case jtu.PyTreeDef():
                tree = obj.unflatten([...] * obj.num_leaves)
                return Stand(jtu.tree_structure, self.of(tree))
        if callable(obj) and _is_transformed(obj):
            return by_name(obj)
        if isinstance(obj, eqx.Module) and "__func__" in (fields := vars(obj)):
            # Equinox's bound method. Its other fields come from the function.
            parts = self.of(fields["__func__"]), self.of(fields["__self__"])
            return Stand(type(obj), *parts)
        if _is_simple(type(obj)):
            return self.simple(obj)
        return self.node(obj)

    def simple(self, obj: Any) -> Any:
        fields = self.fields(vars(obj))
        if isinstance(obj, eqx.Module):
            return Stand(build, type(obj), fields)
        if not fields and not jtu.tree_leaves(obj):
            # An empty node may be compared by identity, as Equinox's sentinel is.
            return Stand(_empty_node, type(obj))
        # Others keep their identity if nothing in them has to be replaced.
        is_same = all(map(operator.is_, fields.values(), vars(obj).values()))
        return obj if is_same else Stand(build, type(obj), fields)

    def function(self, fn: types.FunctionType) -> Stand:
        closure = fn.__closure__ or ()
        cells = [self.met.setdefault(id(cell), Stand(new_cell)) for cell in closure]
        stand = self.met[id(fn)] = by_code(fn, tuple(cells))
        contents = [tuple(map(self.of, content_of(cell))) for cell in closure]
        others = map(self.of, (fn.__defaults__, fn.__kwdefaults__))
        stand.state = contents, *others, self.fields(vars(fn))
        return stand

    def node(self, obj: Any) -> Any:
        """Takes one node of a tree apart: a container, or a registered class."""
        kind = type(obj)
        if kind is dict:
            # In its own order, and also with keys that cannot be sorted.
            new = self.fields(obj)
            return obj if all(new[key] is obj[key] for key in obj) else new
        if kind.__reduce__ is not object.__reduce__ and kind is not OrderedDict:
            return obj
        children, structure = jtu.tree_flatten(obj, is_leaf=lambda x: x is not obj)
        if jtu.treedef_is_leaf(structure):
            return obj
        new = [self.of(child) for child in children]
        is_same = all(map(operator.is_, new, children))
        return obj if is_same else structure.unflatten(new)


def _is_simple(kind: type) -> bool:
    """Whether an object is all in its `__dict__`, and pickle has no hooks for it."""
    return (
        kind.__reduce__ is object.__reduce__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__getstate__ is object.__getstate__
        and kind not in copyreg.dispatch_table
        and not any(hasattr(kind, name) for name in _OF_PICKLE)
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
        and all(map(is_of_python, kind.__mro__[:-1]))
        and kind.__dictoffset__ != 0
    )


_OF_PICKLE = ("__setstate__", "__getnewargs__", "__getnewargs_ex__")


def _empty_node(kind: type) -> Any:
    return jtu.tree_map(lambda leaf: leaf, build(kind, {}))


def _is_transformed(fn: Any) -> bool:
    """Whether JAX or Equinox has transformed a function of a module.

    Pickle takes it for the function that it wraps, since both have one name.
    """
    package = module_of(type(fn)).split(".")[0]
    is_one = package in ("jax", "jaxlib", "equinox") and is_named(fn)
    return is_one and fn.__module__ != "__main__"


def _method(fn: Any, owner: Any) -> types.MethodType:
    return types.MethodType(fn, owner)


def _partial(kind: Any, fn: Any, args: Any, keywords: Any) -> Any:
    return kind(fn, *args, **keywords)

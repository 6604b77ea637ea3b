"""What a compiled program is made for, in words, place by place."""

import dataclasses
import functools
import itertools
import re
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
import optax

from .._boundary import dotted
from .._closure import Closure, scope_key
from .._optimiser import Transform
from .._pickling import content_of
from .._step import ModelTemplate
from .trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Place:
    """Where something is: in a tree, or in a variable of a function."""

    path: str = ""
    name: str = ""
    owner: str = ""
    """The function that `name` is a variable of."""

    def within(self, key: str) -> "Place":
        """Returns the place of a part."""
        if not self.owner:
            return Place(".".join(filter(None, (self.path, key))))
        # The transformations within an `optax.chain`.
        name = f"part {key}" if self.name == "content" else f"{self.name}.{key}"
        return dataclasses.replace(self, name=name)

    def line(self, text: str, separator: str = " ") -> str:
        """Returns a line about this place."""
        name = f"{self.name} of `{self.owner}`" if self.owner else self.name
        text = separator.join(filter(None, (name, text)))
        return ": ".join(filter(None, (self.path, text)))


@dataclasses.dataclass(frozen=True)
class Described:
    """What is at one place."""

    place: Place
    key: Any
    """Equal for what is the same."""
    text: Callable[[], str]
    """Says what it is. Called only for what differs."""
    parts: dict[Any, "Described"] = dataclasses.field(default_factory=dict)
    rest: Any = None
    """A key of all that is here, also of what has no name."""
    array: Any = None


def describe(tree: Any) -> Described:
    """Describes all that decides whether a jitted function compiles."""
    return _tree(tree, Place())


# A tree: JAX compares what is static by `==`.


def _tree(tree: Any, place: Place) -> Described:
    text = functools.partial(_tree_text, tree)
    if isinstance(tree, Transform):
        return _tree(tree.closure, place)
    if isinstance(tree, _ModelLeaf):
        is_static = tree.kind == "static"
        value = Closure.encode(tree.value) if is_static else tree.value
        return Described(place, tree.kind, text, {"": _tree(value, place)})
    if eqx.is_array(tree):
        return Described(place, "array", text, array=tree)
    if _is_leaf(tree):
        return Described(place, tree, text)
    parts, structure = {}, jtu.tree_structure(tree)
    if isinstance(tree, Closure):
        parts[""] = _captured(tree.decode(), place, {})
    elif isinstance(tree, ModelTemplate):
        parts[""] = _tree(_marked(tree), place)
    else:
        for name, value in _static_fields(tree):
            where = dataclasses.replace(place.within(name), name="static,")
            parts[name] = Described(where, value, functools.partial(_text, value))
        if not isinstance(tree, eqx.Module | dict | list | tuple | None):
            where, data = Place(place.path, "its structure"), structure.node_data()[1]
            parts[""] = Described(where, data, functools.partial(_text, data))
        for keys, child in _one_level(tree):
            parts[keys] = _tree(child, place.within(_shown(keys, tree)))
    return Described(place, type(tree), text, parts, structure)


def _shown(keys: Any, parent: Any) -> str:
    """Returns the name of a child, or of a trainer's what a user knows it by."""
    name = dotted(keys)
    shown = {"_progress": "", "_template": "model"}
    return shown.get(name, name) if isinstance(parent, Trainer) else name


def _tree_text(tree: Any) -> str:
    if isinstance(tree, _ModelLeaf):
        return tree.kind
    if eqx.is_array(tree):
        return f"an array ({abstract(tree)})"
    if tree is not None and not _is_leaf(tree):
        return f"a {_text(type(tree))}"
    is_number = isinstance(tree, int | float | complex)
    return f"the static {_text(tree)}" if is_number else _text(tree)


@dataclasses.dataclass
class _ModelLeaf:
    """Stands for a leaf of a trainer's model."""

    kind: str
    value: Any = None


def _marked(parts: ModelTemplate) -> Any:
    """Returns a model that says of each leaf what a trainer makes of it."""
    values = {
        "trained": itertools.repeat(None),
        "frozen": iter(parts.frozen),
        "other": iter(parts.others.decode()),
    }
    leaves = [
        _ModelLeaf("static" if kind == "other" else kind, next(values[kind]))
        for kind in parts.kinds
    ]
    return parts.structure.unflatten(leaves)


def _one_level(tree: Any) -> list[tuple[Any, Any]]:
    return jtu.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]


def _is_leaf(tree: Any) -> bool:
    return jtu.all_leaves([tree])


def _static_fields(tree: Any) -> list[tuple[str, Any]]:
    fields = dataclasses.fields(tree) if isinstance(tree, eqx.Module) else ()
    names = [field.name for field in fields if field.metadata.get("static")]
    return [(name, vars(tree)[name]) for name in names if name in vars(tree)]


# What functions have captured: closures compare it by value.


def _captured(value: Any, place: Place, met: dict[int, Any]) -> Described:
    value = _unwrapped(value)
    text = functools.partial(_captured_text, value)
    if isinstance(value, jax.Array):
        return Described(place, "array", text, array=value)
    if id(value) in met:
        # What functions share is described once.
        return Described(place, "met before", text)
    if _is_transformation(value):
        # They share most variables, and those of `update` have the better names.
        update, init = (_captured(fn, place, met) for fn in reversed(value))
        return _merged(update, init)
    if isinstance(value, types.FunctionType):
        contents, key, rest = _variables(value, met), value.__code__, scope_key(value)
        within = functools.partial(Place, place.path, owner=_public_name(value))
    elif contents := _contents(value):
        within, key, rest = place.within, (type(value), *contents), None
    else:
        return Described(place, Closure.encode(value).skeleton, text)
    met[id(value)] = value
    parts = {name: _captured(x, within(name), met) for name, x in contents.items()}
    return Described(place, key, text, parts, rest)


def _merged(one: Described, other: Described) -> Described:
    """Returns one description, with the parts that only the other has."""
    both = one.parts.keys() & other.parts.keys()
    merged = {name: _merged(one.parts[name], other.parts[name]) for name in both}
    return dataclasses.replace(one, parts={**one.parts, **other.parts, **merged})


def _variables(fn: types.FunctionType, met: dict[int, Any]) -> dict[str, Any]:
    """Returns what a function has captured, its defaults and its attributes."""
    code, defaults = fn.__code__, fn.__defaults__ or ()
    found: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        # A cell may be empty.
        for content in content_of(cell) if id(cell) not in met else ():
            found[_IN_CHAIN.get(name, name)] = content
        met[id(cell)] = cell
    arguments = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    found.update(zip(arguments, defaults, strict=True))
    return {**found, **(fn.__kwdefaults__ or {}), **vars(fn)}


# Where an `optax.chain` has its transformations.
_IN_CHAIN = {"init_fns": "content", "update_fns": "content"}


def _contents(value: Any) -> dict[str, Any]:
    """Returns what is within a captured container or node, by name."""
    match value:
        case types.MethodType():
            return {"__func__": value.__func__, "__self__": value.__self__}
        case functools.partial():
            arguments = {**dict(enumerate(value.args)), **value.keywords}
        case dict():
            arguments = value
        case list() | tuple() if type(value) in (list, tuple):
            # JAX cannot flatten a list that contains itself.
            arguments = dict(enumerate(value))
        case _ if _is_leaf(value):
            return {}
        case _:
            children = {dotted(keys): child for keys, child in _one_level(value)}
            return dict(_static_fields(value)) | children
    return {str(name): part for name, part in arguments.items()}


def _unwrapped(value: Any) -> Any:
    """Returns what stands in Optax's wrapper, which does nothing by itself."""
    if getattr(value, "__qualname__", "").startswith("with_extra_args_support."):
        return _unwrapped(value.__closure__[0].cell_contents)
    return value


def _is_transformation(value: Any) -> bool:
    # Those of vernal have fields instead of the two functions.
    is_of_optax = isinstance(value, optax.GradientTransformation)
    return is_of_optax and not isinstance(value, eqx.Module)


def _captured_text(value: Any, depth: int = 4) -> str:
    value = _unwrapped(value)
    if isinstance(value, jax.Array):
        return f"an array ({abstract(value)})"
    if _is_transformation(value):
        return _captured_text(value.update)
    if depth and (parts := _contents(value)):
        texts = (_captured_text(part, depth - 1) for part in parts.values())
        return f"({', '.join(texts)})"
    return _text(value)


# Words for values.


def _text(value: Any) -> str:
    """Returns a short text of a value, on one line."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"`{_public_name(value)}`"
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))
    return text if len(text) <= 60 else f"{text[:59]}…"


def _public_name(fn: Any) -> str:
    """Returns its own name, or that of the library's function which made it."""
    maker, *inner = fn.__qualname__.split(".<locals>.")
    package = (getattr(fn, "__module__", None) or "").split(".")[0]
    is_known = package in ("optax", "vernal", "jax")
    return maker if is_known or not inner else inner[-1]


def abstract(array: Any) -> Any:
    """Returns the type that JAX compiles for, with the dtypes that JAX has."""
    try:
        return jax.typeof(np.ma.getdata(array) if np.ma.isMA(array) else array)
    except TypeError:
        return array

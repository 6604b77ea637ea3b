"""What a compiled program is made for, in words."""

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
import optax

from .._boundary import dotted, unaddressed
from .._closure import Closure
from .._optimiser import Transform
from .._pickling import content_of
from .._step import ModelTemplate
from .trainer import Trainer


@dataclasses.dataclass(eq=False)
class Described:
    """What a value is, and what is within it, which may be described or not."""

    key: Any
    """Equal for what is the same."""
    text: Callable[[], str]
    """Says what it is. Called only for what differs."""
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    static: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields that JAX compares as a whole, by `==`."""
    function: str = ""
    """The name of the function that has the parts as variables."""

    def __repr__(self) -> str:
        return self.text()


# What users know the fields of a trainer by.
_PUBLIC = {
    "_progress": "",
    "_template": "model",
    "_bounds": "bounds",
    "_bijections": "bijections",
    "_priors": "priors",
}


def word(text: str, content: Any = None) -> Described:
    """Describes by one word, such as "frozen"."""
    return Described(text, lambda: text, {"": content})


def describe(tree: Any) -> Described:
    """Describes a tree, of which JAX compares what is static by `==`."""
    if isinstance(tree, Described):
        return tree
    if eqx.is_array(tree):
        return word(f"an array ({abstract(tree)})")
    if tree is None or (parts := _children(tree)) is None:
        is_number = isinstance(tree, int | float | complex)
        return Described(tree, lambda: "the static " * is_number + short_text(tree))
    match tree:
        case Trainer():
            # What users know the fields by.
            parts = {_PUBLIC.get(name, name): part for name, part in parts.items()}
            ties = getattr(parts["model"], "ties", None)
            parts["ties"] = None if ties is None else ties.sources
        case Transform():
            parts = {"": tree.closure}
        case ModelTemplate():
            return Described(ModelTemplate, lambda: "", {"": _marked(tree)})
    text = lambda: f"a {short_text(type(tree))}"
    return Described(type(tree), text, parts, _static(tree))


def describe_content(value: Any, met: dict[int, Described]) -> Any:
    """Describes all that a function has captured, which closures compare by value.

    Arrays remain, and what was `met` before is described once.
    """
    value = _unwrapped(value)
    if isinstance(value, jax.Array):
        return value
    if id(value) in met:
        return met[id(value)]
    contents = _contents(value)
    # It holds the value, so that no other takes its id.
    new = met[id(value)] = Described(value, lambda: short_text(value))
    if isinstance(value, types.FunctionType) or _is_transformation(value):
        functions = value if isinstance(value, tuple) else (value,)
        new.function = _public_name(functions[-1])
        new.key = [getattr(fn, "__code__", None) for fn in functions]
        new.text = lambda: f"`{new.function}`"
    elif contents:
        new.key = type(value), *contents
        new.text = lambda: f"({', '.join(map(_inner_text, new.parts.values()))})"
    else:
        new.key = Closure.encode(value).skeleton
    new.parts |= {name: describe_content(x, met) for name, x in contents.items()}
    return new


def _inner_text(part: Any) -> str:
    part = describe(part)
    return "(…)" if part.parts and not part.function else part.text()


# What is within.


def _marked(parts: ModelTemplate) -> Any:
    """Returns a model that says of each leaf what a trainer makes of it."""
    contents = {
        "trained": itertools.repeat(None),
        "frozen": iter(parts.frozen),
        "other": map(Closure.encode, parts.others.decode()),
    }
    return parts.structure.unflatten(
        word("static" if kind == "other" else kind, next(contents[kind]))
        for kind in parts.kinds
    )


def _children(tree: Any) -> dict[str, Any] | None:
    """Returns what is within a node, by name, and `None` for a leaf."""
    flat, _ = jtu.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    is_leaf = len(flat) == 1 and flat[0][1] is tree
    return None if is_leaf else {dotted(keys): child for keys, child in flat}


def _static(tree: Any) -> dict[str, Any]:
    if isinstance(tree, eqx.Module):
        fields, held = dataclasses.fields(tree), vars(tree)
        names = [field.name for field in fields if field.metadata.get("static")]
        return {name: held[name] for name in names if name in held}
    if isinstance(tree, dict | list | tuple | None):
        return {}
    node = jtu.tree_structure(tree, is_leaf=lambda x: x is not tree).node_data()
    return {"": node and node[1]}


def _contents(value: Any) -> dict[str, Any]:
    """Returns what is within a function, a container or a node, by name."""
    match value:
        case types.FunctionType():
            return _variables(value)
        case types.MethodType():
            return {"__func__": value.__func__, "__self__": value.__self__}
        case functools.partial():
            contents = {**dict(enumerate(value.args)), **value.keywords}
        case _ if _is_transformation(value):
            # The two share most variables, and those of `update` have better names.
            contents = _contents(value.init) | _contents(value.update)
            if "update_fns" in contents:
                pairs = contents.pop("init_fns"), contents.pop("update_fns")
                contents["content"] = [*map(optax.GradientTransformation, *pairs)]
        case dict():
            contents = value
        case list() | tuple() if type(value) in (list, tuple):
            # JAX cannot flatten a list that contains itself.
            contents = dict(enumerate(value))
        case _ if (children := _children(value)) is None:
            return {}
        case _:
            contents = children | _static(value)
    return {str(name): part for name, part in contents.items()}


def _variables(fn: types.FunctionType) -> dict[str, Any]:
    """Returns what a function has captured, its defaults and its attributes."""
    code, defaults = fn.__code__, fn.__defaults__ or ()
    # A cell may be empty.
    cells = zip(code.co_freevars, map(content_of, fn.__closure__ or ()), strict=True)
    found = {name: content[0] for name, content in cells if content}
    arguments = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    found |= zip(arguments, defaults, strict=True)
    return found | (fn.__kwdefaults__ or {}) | vars(fn)


def _unwrapped(value: Any) -> Any:
    """Returns what stands in Optax's wrapper, which does nothing by itself."""
    fn = value.update if _is_transformation(value) else value
    if getattr(fn, "__qualname__", "").startswith("with_extra_args_support."):
        return _unwrapped(fn.__closure__[0].cell_contents)
    return value


def _is_transformation(value: Any) -> bool:
    # Those of vernal have fields instead of the two functions.
    is_of_optax = isinstance(value, optax.GradientTransformation)
    return is_of_optax and not isinstance(value, eqx.Module)


# Words.


def short_text(value: Any) -> str:
    """Returns a short text of a value, on one line."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"`{_public_name(value)}`"
    line = " ".join(unaddressed(repr(value)).split())
    return line if len(line) <= 60 else f"{line[:59]}…"


def _public_name(fn: Any) -> str:
    """Returns its own name, or that of the library's function which made it."""
    maker, *inner = fn.__qualname__.split(".<locals>.")
    package = (getattr(fn, "__module__", None) or "").split(".")[0]
    return inner[-1] if inner and package not in ("optax", "vernal", "jax") else maker


def abstract(array: Any) -> Any:
    """Returns the type that JAX compiles for, with the dtypes that JAX has."""
    try:
        return jax.typeof(np.ma.getdata(array) if np.ma.isMA(array) else array)
    except TypeError:
        return types.SimpleNamespace(shape=array.shape, dtype=array.dtype)

"""Why a compiled function was compiled again: `explain_retrace`."""

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
import optax

from .._boundary import dotted, unaddressed
from .._closure import Closure, strict_key
from .._optimiser import Transform
from .._pickling import content_of
from .._step import ModelTemplate
from .trainer import Trainer

_NOTHING = (
    "Nothing differs: a compiled function takes both without compiling again. If it "
    "did compile, look at its other arguments, and whether the function itself, or "
    "what it is a method of, was defined again."
)


_REST = (
    "something differs that has no name: a value that its code reads, or a variable "
    "that it writes to"
)


def explain_retrace(old: Any, new: Any) -> str:
    """Says why a jitted function that was called with `old` compiles again for `new`.

    ```python
    print(vn.explain_retrace(trainer, other))
    # optimiser.transforms.0: b1 of `scale_by_adam` was 0.9, is 0.8
    # params.power: shape was (), is (3,)
    ```

    Arrays are compared by what is compiled for: shape, dtype, weak type, sharding.
    Everything else is static, as it is to `equinox.filter_jit`, and compared by value:
    fields, functions, Python numbers, the structure. Values of arrays, learning rates
    among them, never matter. (Nor do those of floats in a batch that is given to `fit`,
    which makes arrays of them.)

    **Arguments:**

    - `old`, `new`: two pytrees: trainers, models, batches, or tuples of all arguments.

    **Returns:**

    A line for each difference, with the path that leads to it; or a sentence that
    starts with "Nothing differs".
    """
    lines = dict.fromkeys(_line(*found) for found in _differences(old, new, set()))
    if not lines and jax.tree.structure(old) != jax.tree.structure(new):
        # A trainer compares the static fields of its model more strictly than JAX.
        strictly = _differences(old, new, set(), is_strict=True)
        lines = dict.fromkeys(_line(*found) for found in strictly)
    return "\n".join(lines) or _NOTHING


def _line(steps: tuple[tuple[str, str], ...], text: str) -> str:
    path, variable, owner = [], [], ""
    for name, function in steps:
        if function:
            variable, owner = [name], function
        elif name:
            (variable if owner else path).append(name)
    if owner:
        # The transformations within an `optax.chain`.
        name = ".".join(variable).replace("content.", "part ")
        text = f"{name} of `{owner}`{text}"
    return ": ".join(filter(None, (".".join(path), text.lstrip(": "))))


def _differences(
    old: Any, new: Any, met: set[Any], is_strict: bool = False
) -> Iterator[tuple[Any, str]]:
    """Yields the differences of two trees that were not `met` yet, outer ones first.

    A difference is a pair of the steps that lead there, and a text. A step is a name,
    and the function that has a variable of that name, if there is one.
    """
    if old is new:
        return
    if eqx.is_array(old) and eqx.is_array(new):
        yield from (((), text) for text in _array_differences(old, new))
        return
    if isinstance(old, Closure) and isinstance(new, Closure):
        yield from _closure_differences(old, new)
        return
    one, other = _describe(old), _describe(new)
    if not _is_same(one.key, other.key):
        yield (), _said(one.text(), other.text())
        if one.text() != other.text():
            return
    if one is old and one.parts:
        # What two functions share is compared once.
        if (one, other) in met:
            return
        met.add((one, other))
    for name in one.static | other.static:
        before, after = one.static.get(name, _ABSENT), other.static.get(name, _ABSENT)
        is_one = _is_same(before, after)
        if is_one and is_strict:
            # To a trainer, `1` is not `True`.
            is_one = strict_key(before) == strict_key(after)
        if not is_one:
            what = " static," if name else " its structure"
            texts = _short_text(before), _short_text(after)
            yield ((name, ""),), what + _said(*texts)
    for name in one.parts | other.parts:
        before, after = one.parts.get(name, _ABSENT), other.parts.get(name, _ABSENT)
        for steps, text in _differences(before, after, met, is_strict):
            yield ((name, one.function), *steps), text


def _closure_differences(old: Closure, new: Closure) -> Iterator[tuple[Any, str]]:
    is_same = old.skeleton == new.skeleton
    leaves = zip(old.leaves, new.leaves, strict=False)
    if is_same and not any(_array_differences(*pair) for pair in leaves):
        return
    before, after = (_describe_content(x.decode(), {}) for x in (old, new))
    yield from list(_differences(before, after, set())) or [((), _REST)]


def _said(old: str, new: str) -> str:
    if old == new:
        return f" is another {new.removeprefix('the ').removeprefix('a ')} than before"
    return f" was {old}, is {new}"


def _is_same(old: Any, new: Any) -> bool:
    """Whether two static values are one to JAX, which compares them by `==`."""
    try:
        return old is new or bool(old == new)
    except (TypeError, ValueError):
        return False


def _array_differences(old: Any, new: Any) -> list[str]:
    """Returns how two arrays differ in what a program is compiled for."""
    arrays = _abstract(old), _abstract(new)
    is_placed = lambda array: getattr(array, "committed", False)
    # `None` is left to JAX.
    one, other = (x.sharding if is_placed(x) else None for x in (old, new))
    if arrays[0] == arrays[1] and (
        one.is_equivalent_to(other, old.ndim) if one and other else one is other
    ):
        return []
    texts = []
    for name in ("shape", "dtype", "weak_type"):
        before, after = (str(getattr(array, name, False)) for array in arrays)
        if before != after:
            texts.append(f": {name.replace('_', ' ')}{_said(before, after)}")
    places = (str(place or "left to JAX") for place in (one, other))
    return texts or [f": sharding{_said(*places)}"]


@dataclasses.dataclass(eq=False)
class _Described:
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


def _word(text: str, content: Any = None) -> _Described:
    """Describes by one word, such as "frozen"."""
    return _Described(text, lambda: text, {"": content})


_ABSENT = _word("absent")


def _describe(tree: Any) -> _Described:
    """Describes a tree, of which JAX compares what is static by `==`."""
    if isinstance(tree, _Described):
        return tree
    if eqx.is_array(tree):
        return _word(f"an array ({_abstract(tree)})")
    if tree is None or (parts := _children(tree)) is None:
        is_number = isinstance(tree, int | float | complex)
        return _Described(tree, lambda: "the static " * is_number + _short_text(tree))
    match tree:
        case Trainer():
            # What users know the fields by.
            parts = {_PUBLIC.get(name, name): part for name, part in parts.items()}
            ties = getattr(parts["model"], "ties", None)
            parts["ties"] = None if ties is None else ties.sources
        case Transform():
            parts = {"": tree.closure}
        case ModelTemplate():
            return _Described(ModelTemplate, lambda: "", {"": _marked(tree)})
    text = lambda: f"a {_short_text(type(tree))}"
    return _Described(type(tree), text, parts, _static(tree))


def _describe_content(value: Any, met: dict[int, _Described]) -> Any:
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
    new = met[id(value)] = _Described(value, lambda: _short_text(value))
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
    new.parts |= {name: _describe_content(x, met) for name, x in contents.items()}
    return new


def _inner_text(part: Any) -> str:
    part = _describe(part)
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
        _word("static" if kind == "other" else kind, next(contents[kind]))
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


def _short_text(value: Any) -> str:
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


def _abstract(array: Any) -> Any:
    """Returns the type that JAX compiles for, with the dtypes that JAX has."""
    try:
        return jax.typeof(np.ma.getdata(array) if np.ma.isMA(array) else array)
    except TypeError:
        return types.SimpleNamespace(shape=array.shape, dtype=array.dtype)

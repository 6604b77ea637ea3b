"""Why a compiled function was compiled again: `explain_retrace`."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._boundary import dotted
from .._closure import Closure
from .._optimiser import Transform
from .._step import ModelTemplate
from .differences import (
    abstract,
    array_differences,
    closure_differences,
    is_same,
    said,
    value_text,
)
from .trainer import Trainer

_NOTHING = (
    "Nothing differs: a compiled function takes both without compiling again. If it "
    "did compile, look at its other arguments, and whether the function itself, or "
    "what it is a method of, was defined anew."
)


def explain_retrace(old: Any, new: Any) -> str:
    """Tells why a jitted function that was called with `old` compiles again for `new`.

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
    lines = dict.fromkeys(
        f"{path}: {text}" if path else text for path, text in _differences(old, new, "")
    )
    if not lines and not is_same(*map(jtu.tree_structure, (old, new))):
        return "Something static differs, in a place that has no name."
    return "\n".join(lines) or _NOTHING


Found = Iterator[tuple[str, str]]
"""Paths, and what differs there."""


def _differences(old: Any, new: Any, path: str) -> Found:
    if eqx.is_array(old) and eqx.is_array(new):
        yield from ((path, text) for text in array_differences(old, new))
    elif type(old) is type(new) is ModelTemplate:
        yield from _models(old, new, path)
    elif type(old) is type(new) is Closure:
        yield from ((path, text) for text in closure_differences(old, new))
    elif type(old) is type(new) is Transform:
        yield from _differences(old.closure, new.closure, path)
    elif _is_leaf(old) or _is_leaf(new):
        if eqx.is_array(old) or eqx.is_array(new) or not is_same(old, new):
            yield path, said("", _text(old), _text(new))
    else:
        yield from _nodes(old, new, path)


def _is_leaf(tree: Any) -> bool:
    # A node without children is one node too.
    structure = _one_level(tree)[1]
    return structure.num_nodes == structure.num_leaves == 1


def _one_level(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return jtu.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)


def _text(value: Any) -> str:
    if eqx.is_array(value):
        return f"an array ({abstract(value)})"
    if value is None or not _is_leaf(value):
        return "None" if value is None else f"a {value_text(type(value))}"
    is_number = isinstance(value, int | float | complex)
    return f"the static {value_text(value)}" if is_number else value_text(value)


def _nodes(old: Any, new: Any, path: str) -> Found:
    """Compares two containers, field by field."""
    if type(old) is not type(new):
        yield path, said("", _text(old), _text(new))
        if type(old).__qualname__ != type(new).__qualname__:
            return
    (before, structure), (after, other) = _one_level(old), _one_level(new)
    found = False
    for where, text in (*_static(old, new, path), *_absent(before, after, path)):
        found = True
        yield where, text
    if not is_same(structure, other) and not found and type(old) is type(new):
        yield path, _restructured(structure, other)
    later = dict(after)
    for keys, child in before:
        if keys in later:
            yield from _differences(child, later[keys], _longer(path, keys, old))


def _restructured(old: Any, new: Any) -> str:
    def text(structure: Any) -> str:
        _, what = structure.node_data() or (None, structure)
        return value_text(what)

    return said("its structure", text(old), text(new))


def _longer(path: str, keys: tuple[Any, ...], parent: Any) -> str:
    name = dotted(keys)
    if isinstance(parent, Trainer):
        # What a user knows these by.
        name = {"_progress": "", "_template": "model"}.get(name, name)
    return ".".join(filter(None, (path, name)))


def _absent(before: Any, after: Any, path: str) -> Found:
    ours, theirs = dict(before), dict(after)
    for keys in [*ours, *theirs]:
        if keys not in theirs:
            yield _longer(path, keys, None), said("", _text(ours[keys]), "absent")
        elif keys not in ours:
            yield _longer(path, keys, None), said("", "absent", _text(theirs[keys]))


def _static(old: Any, new: Any, path: str) -> Found:
    """Compares the fields that are no part of the tree."""
    for name in _static_names(old) + _static_names(new):
        own, other = vars(old).get(name, _ABSENT), vars(new).get(name, _ABSENT)
        if is_same(own, other):
            continue
        where = ".".join(filter(None, (path, name)))
        found = ()
        if isinstance(own, jtu.PyTreeDef) and isinstance(other, jtu.PyTreeDef):
            found = tuple(_structures(own, other, where))
        text = said("static,", value_text(own), value_text(other))
        yield from found or ((where, text),)


def _static_names(tree: Any) -> tuple[str, ...]:
    if not isinstance(tree, eqx.Module):
        return ()
    fields = dataclasses.fields(tree)
    return tuple(field.name for field in fields if field.metadata.get("static"))


class _Mark:
    """Stands for a leaf, or for what is not there."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


_ABSENT, _LEAF = _Mark("absent"), _Mark("a leaf")


def _structures(old: Any, new: Any, path: str) -> Found:
    """Compares two structures, as trees whose leaves are the same."""
    yield from _differences(_marked(old), _marked(new), path)


def _marked(structure: Any) -> Any:
    return structure.unflatten([_LEAF] * structure.num_leaves)


# A trainer's model, in parts.


def _models(old: ModelTemplate, new: ModelTemplate, path: str) -> Found:
    """Compares two models in all but their trained parameters."""
    found = False
    for where, text in (*_of_structure(old, new, path), *_of_leaves(old, new, path)):
        found = True
        yield where, text
    if not found and not is_same(old.others.skeleton, new.others.skeleton):
        yield path, "something in what is not trained differs"


def _of_structure(old: ModelTemplate, new: ModelTemplate, path: str) -> Found:
    if not is_same(old.structure, new.structure):
        found = tuple(_structures(old.structure, new.structure, path))
        yield from found or ((path, _restructured(old.structure, new.structure)),)


def _of_leaves(old: ModelTemplate, new: ModelTemplate, path: str) -> Found:
    before, after = _leaves(old), _leaves(new)
    for keys, (kind, index) in before.items():
        if keys not in after:
            continue
        where = _longer(path, keys, None)
        later, place = after[keys]
        if kind != later:
            yield where, said("", kind, later)
        elif kind == "frozen":
            yield from _differences(old.frozen[index], new.frozen[place], where)
        elif kind == "static":
            at = index, place
            for text in closure_differences(old.others, new.others, at):
                yield where, text


def _leaves(parts: ModelTemplate) -> dict[tuple[Any, ...], tuple[str, int]]:
    """What becomes of each leaf, and its place among those of its kind."""
    flat, _ = jtu.tree_flatten_with_path(_marked(parts.structure))
    count: Counter[str] = Counter()
    found = {}
    for (keys, _), kind in zip(flat, parts.kinds, strict=True):
        found[keys] = ("static" if kind == "other" else kind, count[kind])
        count[kind] += 1
    return found

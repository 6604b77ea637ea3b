"""What tells two arrays, values or closures apart, to a compiled program, in words."""

import re
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import PyTreeDef

from .._closure import Closure, Function, Group, Leaf, Part, Plan, Same, Shell, Static
from .._optimiser import AbstractTransform

# Arrays and values.


def array_differences(old: Any, new: Any) -> Iterator[str]:
    """Says how two arrays differ in what a program is compiled for."""
    before, after = abstract(old), abstract(new)
    found = False
    for name in ("shape", "dtype", "weak_type"):
        own, other = getattr(before, name, False), getattr(after, name, False)
        if own != other:
            found = True
            yield said(name.replace("_", " "), str(own), str(other))
    if not found and (before != after or not _are_together(old, new)):
        yield said("sharding", _place(old), _place(new))


def abstract(array: Any) -> Any:
    """What JAX compiles for: the dtypes that it does not have, e.g., are others'."""
    if isinstance(array, np.ma.MaskedArray):
        array = array.data
    try:
        return jax.typeof(array)
    except TypeError:
        return array


def _is_committed(array: Any) -> bool:
    return isinstance(array, jax.Array) and getattr(array, "committed", False)


def _are_together(old: Any, new: Any) -> bool:
    if isinstance(old, Tracer) or isinstance(new, Tracer):
        return True
    if not (_is_committed(old) and _is_committed(new)):
        return _is_committed(old) == _is_committed(new)
    return old.sharding.is_equivalent_to(new.sharding, old.ndim)


def _place(array: Any) -> str:
    return str(array.sharding) if _is_committed(array) else "left to JAX"


def is_same(old: Any, new: Any) -> bool:
    """Whether two static values are one to JAX, which asks for `==`."""
    try:
        return old is new or bool(old == new)
    except (TypeError, ValueError):
        return False


def said(name: str, old: str, new: str) -> str:
    """One difference in words."""
    if old == new:
        what = new.removeprefix("the ").removeprefix("a ")
        return f"{name} is another {what} than before".lstrip()
    return f"{name} was {old}, is {new}".lstrip()


def value_text(value: Any) -> str:
    """A short text of a value, on one line."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"`{_function_name(value)}`"
    if isinstance(value, types.CellType):
        return "a variable that its function writes to"
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))
    return text if len(text) <= 60 else f"{text[:59]}…"


def _function_name(fn: Any) -> str:
    """The public name: of what another function made, that other's, if a library's."""
    maker, *inner = fn.__qualname__.split(".<locals>.")
    package = (getattr(fn, "__module__", None) or "").split(".")[0]
    is_known = package in ("optax", "vernal", "jax")
    return maker if is_known or not inner else inner[-1]


# Closures.


def closure_differences(
    old: Closure, new: Closure, items: tuple[int, int] | None = None
) -> Iterator[str]:
    """Says how two closures differ, in the names of their variables.

    **Arguments:**

    - `old`, `new`: the two.
    - `items`: where each is of a tuple, which of its items to compare.
    """
    root, other = old.skeleton.plan.root, new.skeleton.plan.root
    if items is not None and isinstance(root, Group) and isinstance(other, Group):
        root, other = root.parts[items[0]], other.parts[items[1]]
    # What `init` and `update` share is told once, and `update` has the better names.
    for is_brief in (True, False):
        found = list(_Walk(old, new, is_brief).parts(root, other, ("", "")))
        if found:
            yield from found
            return
    if items is None and old.skeleton != new.skeleton:
        yield "something in its functions differs"


Name = tuple[str, str]
"""Of a variable, and of the function that it is a variable of."""


_AROUND = "with_extra_args_support"
_IN_CHAIN = ("init_fns", "update_fns")


class _Walk:
    """One walk over two closures at once. Each pair of variables is met once."""

    def __init__(self, old: Closure, new: Closure, is_brief: bool):
        self.leaves: tuple[Any, Any] = (old.leaves, new.leaves)
        self.plans: tuple[Plan, Plan] = (old.skeleton.plan, new.skeleton.plan)
        self.is_brief = is_brief
        self.met: set[tuple[str, int, int]] = set()

    def first(self, kind: str, old: int, new: int) -> bool:
        is_first = (kind, old, new) not in self.met
        self.met.add((kind, old, new))
        return is_first

    def parts(self, old: Part | None, new: Part | None, name: Name) -> Iterator[str]:
        match old, new:
            case Leaf(), Leaf():
                arrays = self.leaves[0][old.index], self.leaves[1][new.index]
                for text in array_differences(*arrays):
                    yield _said_of(name, text)
            case Function(), Function():
                if self.first("function", old.index, new.index):
                    yield from self.functions(old, new, name)
            case Group(), Group():
                yield from self.groups(old, new, name)
            case Static(), Static() if old.key == new.key:
                return
            case _:
                yield self.change(old, new, name)

    def change(self, old: Part | None, new: Part | None, name: Name) -> str:
        return said(_of(name), self.text(0, old), self.text(1, new))

    def text(self, which: int, part: Part | None) -> str:
        match part:
            case Leaf():
                return f"an array ({abstract(self.leaves[which][part.index])})"
            case Function():
                return self.function_text(which, part)
            case Static():
                value = part.value
                return value_text(value.obj if isinstance(value, Same) else value)
            case Group() if _is_transformation(part):
                return self.text(which, part.parts[1])
            case Group():
                return f"({', '.join(self.text(which, p) for p in part.parts)})"
        return "nothing"

    def function_text(self, which: int, part: Function) -> str:
        plan = self.plans[which]
        shell = plan.shells[part.index]
        own = _shell_name(shell)
        # What stands around a transformation says nothing of what it does.
        if own == _AROUND and len(shell.cells) == 1:
            return self.text(which, plan.cells[shell.cells[0]])
        return f"`{own}`"

    def groups(self, old: Group, new: Group, name: Name) -> Iterator[str]:
        if old.key != new.key or len(old.parts) != len(new.parts):
            yield self.change(old, new, name)
            return
        pairs = list(zip(old.parts, new.parts, _keys(old), strict=True))
        if self.is_brief and _is_transformation(old):
            pairs = [(*pairs[1][:2], "")]
        for before, after, key in pairs:
            yield from self.parts(before, after, _longer(name, key))

    def functions(self, old: Function, new: Function, name: Name) -> Iterator[str]:
        shell, other = (
            plan.shells[part.index]
            for plan, part in zip(self.plans, (old, new), strict=True)
        )
        own = _shell_name(shell)
        if own != _shell_name(other):
            yield self.change(old, new, name)
            return
        if shell.code != other.code:
            yield f"the function `{own}` has other code, or stands elsewhere"
            return
        found = list(self.contents(shell, other, name if own == _AROUND else None))
        if not found and shell.key != other.key:
            found = [f"the function `{own}` reads what may have changed since"]
        yield from found

    def contents(self, old: Shell, new: Shell, name: Name | None) -> Iterator[str]:
        own = _shell_name(old)
        cells = zip(old.code.co_freevars, old.cells, new.cells, strict=True)
        for variable, i, j in cells:
            if self.first("cell", i, j):
                before, after = self.plans[0].cells[i], self.plans[1].cells[j]
                yield from self.parts(before, after, name or (variable, own))
        yield from self.defaults(old.defaults, new.defaults, old.code, own)
        yield from self.parts(old.kwdefaults, new.kwdefaults, ("", own))
        yield from self.parts(old.attributes, new.attributes, ("", own))

    def defaults(
        self, old: Part, new: Part, code: types.CodeType, own: str
    ) -> Iterator[str]:
        if not (isinstance(old, Group) and isinstance(new, Group)):
            yield from self.parts(old, new, ("defaults", own))
            return
        if len(old.parts) != len(new.parts):
            yield self.change(old, new, ("defaults", own))
            return
        first = code.co_argcount - len(old.parts)
        arguments = code.co_varnames[first : code.co_argcount]
        for before, after, name in zip(old.parts, new.parts, arguments, strict=True):
            yield from self.parts(before, after, (name, own))


def _shell_name(shell: Shell) -> str:
    return _function_name(types.SimpleNamespace(**shell.metadata))


def _said_of(name: Name, text: str) -> str:
    return f"{_of(name)}: {text}" if name[0] else text


def _of(name: Name) -> str:
    variable, owner = name
    variable = "content" if variable in _IN_CHAIN else variable
    return f"{variable} of `{owner}`" if variable and owner else variable


def _longer(name: Name, key: str) -> Name:
    variable, owner = name
    if variable in _IN_CHAIN:
        return f"part {key}", owner
    return ".".join(filter(None, (variable, key))), owner


def _keys(group: Group) -> list[str]:
    """What leads to the parts of a group: keys, fields, or numbers."""
    key = group.key
    if isinstance(key, tuple) and key and key[0] is dict:
        # Each is a type and a value.
        return [str(name[-1]) for name in key[1]]
    if key is types.MethodType:
        return ["", ""]
    node = _node_type(group)
    fields = getattr(node, "_fields", None)
    if fields is not None and len(fields) == len(group.parts):
        return list(fields)
    return [str(index) for index in range(len(group.parts))]


def _node_type(group: Group) -> type | None:
    key = group.key
    if not (isinstance(key, tuple) and key and isinstance(key[0], PyTreeDef)):
        return None
    data = key[0].node_data()
    return None if data is None else data[0]


def _is_transformation(group: Group) -> bool:
    node = _node_type(group)
    if node is None or issubclass(node, AbstractTransform):
        return False  # Those of vernal have fields instead of the two functions.
    return issubclass(node, optax.GradientTransformation)

"""What is left of a closure without its arrays, and how it is built again."""

import dataclasses
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.tree_util as jtu
import numpy as np

from .._pickling import bare, content_of, packed
from .equality import Hashed


@runtime_checkable
class Part(Protocol):
    """A part of a skeleton, which can build its object again."""

    def build(self, leaves: "Leaves", functions: "Functions") -> Any: ...


# A tuple, a dictionary by index, or what stands for an empty tuple in a tree.
Leaves = Any
Functions = list[types.FunctionType]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    index: int

    def build(self, leaves: Leaves, functions: Functions) -> Any:
        return leaves[self.index]


@dataclasses.dataclass(frozen=True, slots=True)
class Static:
    key: Hashable
    value: Any = dataclasses.field(compare=False)

    def build(self, leaves: Leaves, functions: Functions) -> Any:
        return self.value


@dataclasses.dataclass(frozen=True, slots=True)
class Function:
    index: int

    def build(self, leaves: Leaves, functions: Functions) -> Any:
        return functions[self.index]


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Anything made by one call on its parts: a container, a method, a partial."""

    key: Hashable
    parts: tuple[Part, ...]
    make: Callable[[list[Any]], Any] = dataclasses.field(compare=False)

    def build(self, leaves: Leaves, functions: Functions) -> Any:
        return self.make([part.build(leaves, functions) for part in self.parts])


@dataclasses.dataclass(frozen=True, slots=True)
class Shell:
    """A function without its contents: built first, so that cells may hold it."""

    key: Hashable
    cells: tuple[int, ...]
    defaults: Part
    kwdefaults: Part
    attributes: Part
    code: types.CodeType = dataclasses.field(compare=False)
    scope: dict[str, Any] = dataclasses.field(compare=False)
    metadata: dict[str, Any] = dataclasses.field(compare=False)
    original: types.FunctionType | None = dataclasses.field(compare=False)
    """The function itself, where others may know it by its identity."""

    def open(self, cells: list[types.CellType]) -> types.FunctionType:
        if self.original is not None:
            return cast(types.FunctionType, self.original)
        closure = tuple(cells[i] for i in self.cells)
        return bare(self.code, self.scope, self.metadata, closure)

    def fill(
        self, fn: types.FunctionType, leaves: Leaves, functions: Functions
    ) -> None:
        if fn is self.original:
            return
        fn.__defaults__ = self.defaults.build(leaves, functions)
        fn.__kwdefaults__ = self.kwdefaults.build(leaves, functions)
        fn.__dict__.update(self.attributes.build(leaves, functions))


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How to build an object: functions and cells are made first, and then filled."""

    root: Part
    shells: tuple[Shell, ...]
    cells: tuple[Part | None, ...]

    def build(self, leaves: Leaves) -> Any:
        cells = [_kept_cell(part) or types.CellType() for part in self.cells]
        functions = [shell.open(cells) for shell in self.shells]
        for shell, fn in zip(self.shells, functions, strict=True):
            shell.fill(fn, leaves, functions)
        for cell, part in zip(cells, self.cells, strict=True):
            if part is not None and _kept_cell(part) is None:
                cell.cell_contents = part.build(leaves, functions)
        return self.root.build(leaves, functions)


def _kept_cell(part: Part | None) -> types.CellType | None:
    """Returns the cell itself, where functions write to it."""
    value = part.value if isinstance(part, Static) else None
    return value if isinstance(value, types.CellType) else None


class Skeleton(Hashed):
    """All of a closure but its arrays: hashable, compared by value, interned."""

    __slots__ = ("__weakref__", "_recipe", "plan")

    def __init__(self, plan: Plan, recipe: tuple[Any, ...]):
        """`recipe` is a function that encodes an object, and its further arguments."""
        super().__init__(plan)
        self.plan: Plan = plan
        self._recipe = recipe

    def __reduce__(self) -> Any:
        # The object, with marks for its leaves, which is encoded again.
        parts = all_parts(self.plan)
        marks = {part.index: part for part in parts if isinstance(part, Leaf)}
        encode, *options = self._recipe
        return encode, (packed(self.plan.build(marks)), *options)

    def __copy__(self) -> "Skeleton":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Skeleton":
        return self

    @property
    def function_names(self) -> frozenset[str]:
        """The qualified names of the functions that have captured anything."""
        return frozenset(s.metadata["__qualname__"] for s in self.plan.shells)

    def words(self) -> frozenset[str]:
        """All names and strings in the code of the functions."""
        codes = [shell.code for shell in self.plan.shells]
        codes += [
            value.__code__
            for part in all_parts(self.plan)
            if isinstance(part, Static)
            and isinstance(value := part.value, types.FunctionType)
        ]
        found: set[str] = set()
        while codes:
            code = codes.pop()
            found.update(code.co_names, code.co_varnames)
            found.update(c for c in code.co_consts if isinstance(c, str))
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        return frozenset(found)

    def is_made_of(self, modules: tuple[str, ...]) -> bool:
        """Whether it holds only numbers and functions of some modules and packages."""
        # Not `__module__`, which `functools.wraps` copies.
        scopes = (shell.scope["__name__"] for shell in self.plan.shells)
        return all(_is_from(name, modules) for name in scopes) and all(
            _is_plain(part, modules) for part in all_parts(self.plan)
        )

    def __repr__(self) -> str:
        return f"Skeleton({', '.join(sorted(self.function_names))})"


def all_parts(plan: Plan) -> Iterator[Part]:
    """Yields all parts, those within others too."""
    todo = [plan.root, *(part for part in plan.cells if part is not None)]
    for shell in plan.shells:
        todo.append(shell.defaults)
        # Dictionaries, whose keys are the names of arguments and attributes.
        for part in (shell.kwdefaults, shell.attributes):
            todo += part.parts if isinstance(part, Group) else [part]
    while todo:
        part = todo.pop()
        yield part
        if isinstance(part, Group):
            todo += part.parts


def _is_from(name: str, modules: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _is_plain(part: Part, modules: tuple[str, ...]) -> bool:
    if isinstance(part, Leaf | Function):
        return True
    if isinstance(part, Group):
        if isinstance(part.key, type):
            return part.key in (tuple, list, types.MethodType)
        if isinstance(part.key, tuple) and isinstance(part.key[0], jtu.PyTreeDef):
            data = part.key[0].node_data()
            return data is not None and issubclass(data[0], tuple)
        return part.key == (dict, ())
    value = part.value if isinstance(part, Static) else part
    if isinstance(value, types.CellType):
        return all(_is_plain(Static(None, held), modules) for held in content_of(value))
    if type(value) is _JITTED:
        value = getattr(value, "__wrapped__", None)
    if isinstance(value, types.FunctionType):
        return _is_from(value.__globals__["__name__"], modules)
    if isinstance(value, type):
        return _is_from(value.__module__, (*modules, "builtins", "numpy", "ml_dtypes"))
    numbers = bool | int | float | complex | np.generic | np.ndarray | jax.Array
    return value is None or isinstance(value, numbers | str | np.dtype)


_JITTED = type(jax.jit(lambda: None))


interned: weakref.WeakValueDictionary[Hashed, Skeleton] = weakref.WeakValueDictionary()

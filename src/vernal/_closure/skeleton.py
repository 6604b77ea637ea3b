"""What is left of a closure without its arrays, and how it is built again."""

import dataclasses
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.tree_util as jtu
import numpy as np

from .._pickling import bare, by_code, metadata, packed
from .equality import Hashed

# The parts of a skeleton. Each knows how to build its object again. In a pickle they
# are without their keys, which are found anew in the process that loads it.


@runtime_checkable
class Part(Protocol):
    def build(self, site: "Site") -> Any: ...


Leaves = tuple[Any, ...] | dict[int, Any]


@dataclasses.dataclass(slots=True)
class Site:
    """What the parts of one skeleton are built from."""

    leaves: Leaves
    functions: list[types.FunctionType]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    index: int

    def build(self, site: Site) -> Any:
        return site.leaves[self.index]


@dataclasses.dataclass(frozen=True, slots=True)
class Static:
    key: Hashable
    value: Any = dataclasses.field(compare=False)

    def build(self, site: Site) -> Any:
        return self.value

    def __reduce__(self) -> Any:
        value = self.value
        if isinstance(value, types.CellType):
            try:
                return _static_cell, (packed(value.cell_contents),)
            except ValueError:
                return _static_cell, ()
        return Static, (None, packed(value))


def _static_cell(*contents: Any) -> Static:
    return Static(None, types.CellType(*contents))


@dataclasses.dataclass(frozen=True, slots=True)
class Function:
    index: int

    def build(self, site: Site) -> Any:
        return site.functions[self.index]


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Anything made by one call on its parts: a container, a method, a partial."""

    key: Hashable
    parts: tuple[Part, ...]
    make: Callable[[list[Any]], Any] = dataclasses.field(compare=False)

    def build(self, site: Site) -> Any:
        return self.make([part.build(site) for part in self.parts])

    def __reduce__(self) -> Any:
        return Group, (None, self.parts, self.make)


@dataclasses.dataclass(frozen=True, slots=True)
class Hollow:
    """Makes a node of its children. In a pickle it is such a node, without children."""

    structure: Any

    def __call__(self, children: list[Any]) -> Any:
        return self.structure.unflatten(children)

    def __reduce__(self) -> Any:
        node = self.structure.unflatten([...] * self.structure.num_leaves)
        return _hollow, (packed(node),)


def _hollow(node: Any) -> Hollow:
    return Hollow(jtu.tree_structure(node, is_leaf=lambda x: x is not node))


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

    def fill(self, fn: types.FunctionType, site: Site) -> None:
        if fn is self.original:
            return
        fn.__defaults__ = self.defaults.build(site)
        fn.__kwdefaults__ = self.kwdefaults.build(site)
        fn.__dict__.update(self.attributes.build(site))

    def __reduce__(self) -> Any:
        if self.original is not None:
            return _original_shell, (self.original,)
        empty = by_code(self.code, self.scope, self.metadata)
        contents = self.cells, self.defaults, self.kwdefaults, self.attributes
        return _shell, (empty, *contents)


def _shell(
    fn: types.FunctionType,
    cells: tuple[int, ...],
    defaults: Part,
    kwdefaults: Part,
    attributes: Part,
) -> Shell:
    contents = cells, defaults, kwdefaults, attributes
    return Shell(None, *contents, fn.__code__, fn.__globals__, metadata(fn), None)


def _original_shell(fn: types.FunctionType) -> Shell:
    nothing = Static(None, None)
    shell = _shell(fn, (), nothing, nothing, nothing)
    return dataclasses.replace(shell, original=fn)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    root: Part
    shells: tuple[Shell, ...]
    cells: tuple[Part | None, ...]

    def build(self, leaves: Leaves) -> Any:
        """Builds the object, around some leaves."""
        cells = [
            part.value
            if isinstance(part, Static) and isinstance(part.value, types.CellType)
            else types.CellType()
            for part in self.cells
        ]
        functions = [shell.open(cells) for shell in self.shells]
        site = Site(leaves, functions)
        for shell, fn in zip(self.shells, functions, strict=True):
            shell.fill(fn, site)
        for cell, part in zip(cells, self.cells, strict=True):
            if part is not None and not (
                isinstance(part, Static) and part.value is cell
            ):
                cell.cell_contents = part.build(site)
        return self.root.build(site)

    def __reduce__(self) -> Any:
        """Leaves out the contents of functions that are pickled by name."""
        shells: dict[int, Shell] = {}
        cells: dict[int, Part | None] = {}
        todo: list[Part | None] = [self.root]
        while todo:
            part = todo.pop()
            if isinstance(part, Group):
                todo += part.parts
            elif isinstance(part, Function) and part.index not in shells:
                shell = shells[part.index] = self.shells[part.index]
                if shell.original is None:
                    todo += shell.defaults, shell.kwdefaults, shell.attributes
                    new = {i: self.cells[i] for i in shell.cells if i not in cells}
                    cells |= new
                    todo += new.values()
        return _plan, (self.root, shells, cells, len(self.shells), len(self.cells))


def _plan(
    root: Part,
    shells: dict[int, Shell],
    cells: dict[int, Part | None],
    shell_count: int,
    cell_count: int,
) -> Plan:
    nothing = _original_shell(_plan)
    return Plan(
        root,
        tuple(shells.get(i, nothing) for i in range(shell_count)),
        tuple(cells.get(i) for i in range(cell_count)),
    )


class Skeleton:
    """All of a closure but its arrays: hashable, compared by value, interned."""

    __slots__ = ("__weakref__", "_hash", "_recipe", "plan")

    def __init__(self, plan: Plan, hashed: int, recipe: tuple[Any, ...]):
        """**Arguments:**

        - `plan`: what it is of.
        - `hashed`: the hash of that.
        - `recipe`: a function and its arguments, by which another process makes it.
        """
        self.plan: Plan = plan
        self._hash = hashed
        self._recipe = recipe

    def __reduce__(self) -> Any:
        return self._recipe

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
        """Whether there is nothing here but numbers and functions of some modules.

        **Arguments:**

        - `modules`: their names; one that ends with a dot stands for a package.
        """
        # Not `__module__`, which `functools.wraps` copies.
        scopes = (shell.scope["__name__"] for shell in self.plan.shells)
        return all(_is_from(name, modules) for name in scopes) and all(
            _is_plain(part, modules) for part in all_parts(self.plan)
        )

    def __repr__(self) -> str:
        return f"Skeleton({', '.join(sorted(self.function_names))})"


def all_parts(plan: Plan) -> Iterator[Part]:
    todo = [plan.root, *(part for part in plan.cells if part is not None)]
    for shell in plan.shells:
        todo.append(shell.defaults)
        # Dictionaries, but by the names of arguments and attributes.
        for part in (shell.kwdefaults, shell.attributes):
            todo += part.parts if isinstance(part, Group) else [part]
    while todo:
        part = todo.pop()
        yield part
        if isinstance(part, Group):
            todo += part.parts


def _is_from(name: str, modules: tuple[str, ...]) -> bool:
    return name in modules or any(
        f"{name}.".startswith(module) for module in modules if module.endswith(".")
    )


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
        try:
            value = value.cell_contents
        except ValueError:
            return True
    if type(value) is _JITTED:
        value = getattr(value, "__wrapped__", None)
    if isinstance(value, types.FunctionType):
        return _is_from(value.__globals__["__name__"], modules)
    if isinstance(value, type):
        return _is_from(value.__module__, (*modules, "builtins", "numpy.", "ml_dtypes"))
    numbers = bool | int | float | complex | np.generic | np.ndarray | jax.Array
    return value is None or isinstance(value, numbers | str | np.dtype)


_JITTED = type(jax.jit(lambda: None))


interned: weakref.WeakValueDictionary[Hashed, Skeleton] = weakref.WeakValueDictionary()

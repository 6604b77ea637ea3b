"""What is left of a closure without its arrays, and how it is built again."""

import dataclasses
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol

# The parts of a skeleton. Each knows how to build its object again.


class Part(Protocol):
    def build(self, site: "Site") -> Any: ...


@dataclasses.dataclass(slots=True)
class Site:
    """What the parts of one skeleton are built from."""

    leaves: tuple[Any, ...]
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

    def open(self, cells: list[types.CellType]) -> types.FunctionType:
        closure = tuple(cells[i] for i in self.cells)
        fn = types.FunctionType(self.code, self.scope, closure=closure)
        for name, value in self.metadata.items():
            setattr(fn, name, value)
        return fn

    def fill(self, fn: types.FunctionType, site: Site) -> None:
        fn.__defaults__ = self.defaults.build(site)
        fn.__kwdefaults__ = self.kwdefaults.build(site)
        fn.__dict__.update(self.attributes.build(site))


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    root: Part
    shells: tuple[Shell, ...]
    cells: tuple[Part | None, ...]


class Skeleton:
    """All of a closure but its arrays: hashable, compared by value, interned."""

    __slots__ = ("__weakref__", "_hash", "plan")

    def __init__(self, plan: Plan, hashed: int):
        self.plan = plan
        self._hash = hashed

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

    def __repr__(self) -> str:
        return f"Skeleton({', '.join(sorted(self.function_names))})"


interned: weakref.WeakValueDictionary[Plan, Skeleton] = weakref.WeakValueDictionary()

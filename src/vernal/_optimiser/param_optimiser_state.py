"""The state of a `ParamOptimiser`."""

from collections.abc import Hashable
from typing import Any

import equinox as eqx


class ParamOptimiserState(eqx.Module):
    """The state of a [`vernal.ParamOptimiser`][].

    `groups` has the state of each rule, in order, and then that of the default.
    `paths` are those of the trained parameters, `owners` the group of each. `rules` are
    those of the optimiser that made it.
    """

    first: Any
    groups: tuple[Any, ...]
    # Tuples; `Learned` in a state that Optax makes to map over.
    paths: Any = eqx.field(static=True)
    shapes: Any = eqx.field(static=True)
    owners: Any = eqx.field(static=True)
    rules: "Rules" = eqx.field(static=True)

    @property
    def members(self) -> list[list[str]]:
        """The paths of each group's parameters."""
        found: list[list[str]] = [[] for _ in self.groups]
        for path, owner in zip(known(self.paths), known(self.owners), strict=True):
            found[owner].append(path)
        return found


class Rules:
    """The rules of an optimiser, without the transformations.

    All are equal: rules that are written otherwise may have the same parameters, and
    then a state of the one is a state of the other.
    """

    def __init__(self, key: Hashable):
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules)

    def __hash__(self) -> int:
        return hash(Rules)


class Learned:
    """A static field of a state that was made without parameters.

    `optax.tree_map_params` makes such a state, compares it with a complete one, and
    fills it with values. This is equal to the first value that it is compared with.
    """

    def __init__(self) -> None:
        self.value: Any = None

    def __eq__(self, other: object) -> bool:
        other = known(other)
        self.value = other if self.value is None else self.value
        return self.value == other

    def __hash__(self) -> int:
        return hash(self.value)


def known(static: Any) -> Any:
    return static.value if isinstance(static, Learned) else static

"""The state of a `ParamOptimiser`."""

from typing import Any

import equinox as eqx


class ParamOptimiserState(eqx.Module):
    """The state of a [`vernal.ParamOptimiser`][].

    `groups` has the state of each rule, in order, and then that of the default.
    `paths` are the parameters that are trained, `owners` the group of each.
    """

    first: Any
    groups: tuple[Any, ...]
    # Tuples; `Learned` in what Optax makes to map over.
    paths: Any = eqx.field(static=True)
    shapes: Any = eqx.field(static=True)
    owners: Any = eqx.field(static=True)


class Learned:
    """What is static in a state that was made without parameters.

    `optax.tree_map_params` makes such a state, compares it with a whole one, and fills
    it with the values of that. It is equal to what it first meets, and remembers that.
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

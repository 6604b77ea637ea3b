"""The state of a `ParamOptimiser`."""

from typing import Any

import equinox as eqx


class ParamOptimiserState(eqx.Module):
    """The state of a [`vernal.ParamOptimiser`][].

    `groups` has the state of each rule, in order, and then that of the default.
    `paths` are those of the trained parameters, `owners` the group of each.
    """

    first: Any
    groups: tuple[Any, ...]
    # Tuples; `Learned` in a state that Optax makes to map over.
    paths: Any = eqx.field(static=True)
    shapes: Any = eqx.field(static=True)
    owners: Any = eqx.field(static=True)


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

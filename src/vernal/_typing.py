"""The type-checker at the boundary, and the names its annotations share."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from beartype import beartype
from jaxtyping import jaxtyped

P = ParamSpec("P")
R = TypeVar("R")

Params = Any
"""A pytree of parameters: arrays, with `None` where a leaf is left out."""


def checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Checks a public function's arguments against its jaxtyping annotations.

    The check runs in Python, when the function is called or traced: a compiled
    program pays nothing for it.
    """
    return jaxtyped(fn, typechecker=beartype)  # pyright: ignore

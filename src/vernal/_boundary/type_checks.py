"""The type-checker at the boundary, and what annotations share."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import equinox as eqx
from beartype import beartype
from jaxtyping import jaxtyped

if TYPE_CHECKING:
    from equinox._module._module import (
        _ModuleMeta,  # pyright: ignore[reportPrivateUsage]
    )

    class ModuleMeta(_ModuleMeta):
        """The metaclass of Equinox's modules."""

else:
    ModuleMeta = type(eqx.Module)

P = ParamSpec("P")
R = TypeVar("R")

PyTree = Any
"""Any pytree: what its leaves must be, no annotation says."""

Params = Any
"""A pytree of parameters: arrays, with `None` where a leaf is left out."""


def checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Checks a public function's arguments against its jaxtyping annotations.

    The check runs in Python, when the function is called or traced: it costs a
    compiled program nothing.
    """

    @functools.wraps(fn)
    def body(*args: P.args, **kwargs: P.kwargs) -> R:
        # A user's function may give the same names of axes to other lengths.
        with jaxtyped("context"):  # pyright: ignore
            return fn(*args, **kwargs)

    return jaxtyped(body, typechecker=beartype)  # pyright: ignore

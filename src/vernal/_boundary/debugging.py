"""JAX's flags `jax_debug_nans` and `jax_debug_infs`, where NaN is an answer."""

import contextlib
import contextvars
import functools as ft
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

# The flags as the user set them, while they are off.
_asked: contextvars.ContextVar[tuple[bool, bool] | None] = contextvars.ContextVar(
    "asked", default=None
)


def undebugged(fn: Callable[P, R]) -> Callable[P, R]:
    """Switches the two flags off while a function runs.

    An infinite `best_loss`, or the infinite error of a parameter without data, is an
    answer and not a fault; and the NaN policy decides what follows a bad step.
    """

    @ft.wraps(fn)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        flags = jax.config.jax_debug_nans, jax.config.jax_debug_infs  # pyright: ignore
        if not any(flags):
            return fn(*args, **kwargs)
        with _switched((False, False), asked=flags):
            return fn(*args, **kwargs)

    return quiet


def is_debugged() -> bool:
    """Whether `undebugged` has switched off a flag that the user set."""
    return _asked.get() is not None


def debugged() -> contextlib.AbstractContextManager[None]:
    """Switches the flags back to what the user set, to run the user's code."""
    flags = _asked.get()
    return contextlib.nullcontext() if flags is None else _switched(flags, asked=None)


@contextlib.contextmanager
def _switched(
    flags: tuple[bool, bool], asked: tuple[bool, bool] | None
) -> Iterator[None]:
    token = _asked.set(asked)
    try:
        with jax.debug_nans(flags[0]), jax.debug_infs(flags[1]):
            yield
    finally:
        _asked.reset(token)

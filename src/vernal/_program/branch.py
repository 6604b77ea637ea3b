"""Branches of a program, where they are worth it."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.lax as lax
from jaxtyping import Array, Bool

T = TypeVar("T")

# How many bytes an accelerator reads and writes in about the time that it would wait,
# some 10 µs: an estimate from the speed of its memory.
_WORTH_A_WAIT = 2**24


def chosen(
    flag: Bool[Array, ""],
    if_true: Callable[[], T],
    if_false: Callable[[], T],
    reads: Any,
) -> T:
    """Returns the result of one of two functions that do little but read `reads`.

    An accelerator waits for the host at each branch, which is told where to go on. If
    that takes longer than both functions, both are computed.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(reads))
    if jax.default_backend() == "cpu" or size >= _WORTH_A_WAIT:
        return lax.cond(flag, if_true, if_false)
    pick = lambda new, old: lax.select(flag, new, old)
    return jax.tree.map(pick, if_true(), if_false())

"""Calls of LAPACK, which some releases of JAX cannot map together on a CPU."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jaxlib.version import __version_info__ as _JAXLIB

from .host import equations, jaxpr_of

# Those that share a stack of matrices among the threads of XLA, and wait for that in
# one of them: if all threads wait, none is left to do the work.
_WAITS = (0, 10) <= _JAXLIB < (0, 11, 1)

_OF_LAPACK = {x.name for x in vars(jax.lax.linalg).values() if isinstance(x, Primitive)}


def may_hang(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether a program may wait for ever that maps a function, by `jax.vmap`.

    It may if two calls of LAPACK in it do not depend on each other, as in the gradient
    of a likelihood by Cholesky's decomposition. This traces the function.
    """
    if not _WAITS or jax.default_backend() != "cpu":
        return False
    jaxpr = jaxpr_of(fn, *args)
    called = () if jaxpr is None else (x.primitive.name for x in equations(jaxpr))
    return not _OF_LAPACK.isdisjoint(called)

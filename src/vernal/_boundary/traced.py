"""Functions that run on the host, refused within a compiled program."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

OUTSIDE = "Return the trainer from the compiled function, and call it there."
UNROLL = "Within `jax.jit`, `jax.vmap` or `jax.grad`, use `vn.unroll`."


def is_traced(*trees: Any) -> bool:
    """Whether a tree has values that are known only when a program runs."""
    # JAX warns of an iterator in a tree.
    known = [tree for tree in trees if not isinstance(tree, Iterator)]
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(known))


def refuse_traced(name: str, *trees: Any, remedy: str = OUTSIDE) -> None:
    """Refuses to run `name` within `jax.jit`, `jax.vmap`, `jax.grad` or `jax.lax.scan`.

    It is given `trees`. An error ends with `remedy`.
    """
    if is_traced(*trees):
        raise TypeError(
            f"`{name}` runs on the host, and cannot be a part of a compiled program or "
            f"be differentiated: it was given tracers. {remedy}"
        )


def refuse_program(name: str, *trees: Any, remedy: str = OUTSIDE) -> None:
    """Refuses, as `refuse_traced`, a function that runs programs.

    Within a function that JAX traces these would be traced too, whatever their inputs.
    """
    refuse_traced(name, *trees, remedy=remedy)
    # Under such a trace the result of each operation is a tracer.
    if isinstance(jax.lax.stop_gradient(np.float32(0)), Tracer):
        raise TypeError(
            f"`{name}` runs on the host, and was called in a function that JAX traces, "
            "such as the loss of another trainer. Call it before, and use its result "
            f"there. {remedy}"
        )


class RefusedError(ValueError):
    """Something is wrong with a function, in whatever mode it is differentiated."""

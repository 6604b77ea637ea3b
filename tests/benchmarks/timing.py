"""How the sides of a comparison are timed: in turns, everything compiled."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds(fn: Callable[[], Any]) -> float:
    """Runs a function once, to the end of what it computes."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def in_turns(
    sides: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Runs each side once to compile it, and then all of them round after round.

    What else the machine does falls on all alike.
    """
    for fn in sides.values():
        seconds(fn)
    # As `timeit` does: the collector's work grows with all that lives here.
    gc.collect()
    gc.disable()
    try:
        turns = [
            {name: seconds(fn) for name, fn in sides.items()} for _ in range(rounds)
        ]
    finally:
        gc.enable()
    return {name: [turn[name] for turn in turns] for name in sides}

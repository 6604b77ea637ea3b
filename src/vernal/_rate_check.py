"""What an Optax transformation has for a rate: found in its closures, and checked."""

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import optax

from ._typing import takes

# What Optax calls a rate or a schedule where its closures hold one.
_RATES = ("learning_rate", "step_size", "step_size_fn")


def check_rates(tx: optax.GradientTransformation, where: str) -> None:
    """Checks that each rate is a number or a function of the step count.

    Optax itself looks at them only in the first update.

    **Arguments:**

    - `tx`: the transformation.
    - `where`: what an error calls it.
    """
    for rate in _rates(tx, set()):
        if isinstance(rate, str | bytes | list | dict | set):
            raise TypeError(
                f"`{where}` has the rate {rate!r}, which is neither a number nor a "
                "schedule: `optax.adam(1e-3)`."
            )
        if isinstance(rate, FunctionType):
            takes(rate, 1, where, "schedule(count)")


def _rates(node: Any, seen: set[int]) -> Iterator[Any]:
    """Yields what the closures of Optax's functions hold as a rate."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, tuple | list):
        for part in node:
            yield from _rates(part, seen)
    elif isinstance(node, FunctionType) and node.__module__.startswith("optax"):
        cells = node.__closure__ or ()
        for name, cell in zip(node.__code__.co_freevars, cells, strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                continue  # Not filled yet.
            if name in _RATES:
                yield value
            yield from _rates(value, seen)

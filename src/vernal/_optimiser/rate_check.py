"""Checks the learning rates that an Optax transformation was given."""

import re
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import numpy as np
import optax

from .._boundary import takes
from .._pickling import content_of

# What is in the cells of a transformation's function.
Cells = Mapping[str, Any]

# Optax's names of rates and schedules in its closures.
_RATES = ("learning_rate", "step_size", "step_size_fn")

# Its parts of an optimiser that leave the sign to the rate.
_UNSIGNED = re.compile(r"scale_by_(?!schedule).*|identity|trace|add_decayed_weights")

# Its names of the arguments that `inject_hyperparams` passes on.
_OPTIONS = ("numeric_hps", "other_hps")


def check_rates(tx: optax.GradientTransformation, where: str) -> None:
    """Checks that each rate is a number or a function of the step count.

    Optax itself would fail in the first update. An error calls `tx` by `where`.
    """
    if _has_no_sign(tx):
        raise TypeError(
            f"`{where}` has the learning rate `None`: Optax then leaves out the sign, "
            "and the loss would rise. Give a rate, such as `optax.adam(1e-3)`."
        )
    for rate in _rates(tx, set()):
        is_schedule = callable(rate) and not isinstance(rate, type)
        if not (is_schedule or _is_real(rate) or rate is None):
            raise TypeError(
                f"`{where}` has a rate of type `{type(rate).__name__}`, which is "
                "neither a real number nor a schedule: `optax.adam(1e-3)`."
            )
        if isinstance(rate, FunctionType):
            takes(rate, 1, where, "schedule(count)")


def _has_no_sign(tx: optax.GradientTransformation) -> bool:
    """Whether Optax made a chain of parts without a rate, and `None` for the rate."""
    parts = _of_optax(tx.update).get("update_fns", ())
    functions = [_of_optax(part).get("tx", tx).update for part in parts]
    makers = [getattr(fn, "__qualname__", "").split(".")[0] for fn in functions]
    return makers[-1:] == ["identity"] and all(map(_UNSIGNED.fullmatch, makers))


def cells(fn: Any) -> Cells:
    """Returns what a function has captured, by name."""
    pairs = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    # A cell may be empty.
    return {name: value for name, cell in pairs for value in content_of(cell)}


def _of_optax(fn: Any) -> Cells:
    """Returns what a function of Optax has captured."""
    is_own = isinstance(fn, FunctionType) and (fn.__module__ or "").startswith("optax.")
    return cells(fn) if is_own else {}


def _rates(node: Any, seen: set[int]) -> Iterator[Any]:
    """Yields the rates in the closures of Optax's functions."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, tuple | list | dict):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _rates(part, seen)
    else:
        for name, value in _of_optax(node).items():
            if name in _RATES:
                yield value
            elif name in _OPTIONS and isinstance(value, dict):
                yield from (value[rate] for rate in _RATES if rate in value)
            yield from _rates(value, seen)


def _is_real(rate: Any) -> bool:
    """Whether it is a real number, or an array of them."""
    is_array = hasattr(rate, "dtype") or hasattr(rate, "__jax_array__")
    return (is_array or isinstance(rate, int | float)) and not np.iscomplexobj(rate)

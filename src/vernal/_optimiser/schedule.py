"""Schedules of learning rates."""

import math

import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Real

from .._boundary import checked

Step = int | float | np.integer | np.floating
Rate = int | float | np.number | Real[Array, ""] | Real[np.ndarray, ""]


def _whole(value: Step, name: str, least: int) -> int:
    if not (math.isfinite(value) and value == int(value)):
        raise ValueError(
            f"`{name}` counts steps and must be a whole number, not {value}; "
            "round it first."
        )
    if value < least:
        raise ValueError(
            f"`{name}` must be at least {least}, not {value}: a schedule counts its "
            "steps from 0."
        )
    return int(value)


@checked
def delay(lr: Rate, start: Step, length: Step = 1) -> optax.Schedule:
    r"""A learning rate that stays at zero, then rises linearly to `lr`.

    At step $t$ the rate is

    $$\mathrm{lr} \cdot \min(1, \max(0, (t - \mathrm{start}) / \mathrm{length})),$$

    so that it is zero up to and including step `start`, and `lr` from step
    `start + length` on.

    Only the *rate* waits. Whatever an optimiser accumulates, such as momentum or the
    moments of Adam, goes on accumulating from the gradients seen while the rate is
    zero, and its step count goes on too. To hold the whole transformation still until
    a given step, use [`vernal.window`][] instead.

    The function has its origin in `zodiax.optimisation.delay`, and returns the same
    values.

    **Arguments:**

    - `lr`: the learning rate at the end, a finite scalar. May be traced.
    - `start`: the number of steps to wait, at least 0.
    - `length`: the number of steps of the rise, at least 1.

    **Returns:**

    An Optax schedule: a function from the step count to the learning rate.

    **Raises:**

    A `ValueError` if `start` or `length` is out of range or not whole, or if `lr` is
    known and not finite.
    """
    begin = _whole(start, "start", least=0)
    steps = _whole(length, "length", least=1)
    if not isinstance(lr, Tracer) and not math.isfinite(lr):
        raise ValueError(
            f"`lr` must be finite, not {lr}: every update would be lost to it. Give "
            "the rate that is to be reached at the end."
        )
    return optax.linear_schedule(0.0, lr, steps, begin)  # pyright: ignore

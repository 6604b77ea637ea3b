"""Transformations that wait: `delay` and `window`."""

import math
import operator
from typing import Any, NamedTuple, SupportsIndex, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Real

from .._boundary import MOST_STEPS, checked
from .transform import require_transformation

Step = int | float | np.integer | np.floating
Rate = int | float | np.number | Real[Array, ""] | Real[np.ndarray, ""]


def _whole(value: Step, name: str, least: int) -> int:
    if not (math.isfinite(value) and value == int(value) >= least):
        raise ValueError(
            f"`{name}` is {value}, but counts steps, from 0: it must be a whole number "
            f"of at least {least}."
        )
    return int(value)


@checked
def delay(lr: Rate, start: Step, length: Step = 1) -> optax.Schedule:
    r"""A learning rate that stays at zero, then rises linearly to `lr`.

    At step $t$ the rate is

    $$\mathrm{lr} \cdot \min(1, \max(0, (t - \mathrm{start}) / \mathrm{length})),$$

    so that it is zero up to and including step `start`, and `lr` from step
    `start + length` on.

    Only the *rate* waits. The optimiser itself does not: while the rate is zero, its
    momentum or moments accumulate, and it counts its steps. To hold the whole
    transformation until a given step, use [`vernal.window`][] instead.

    The values are those of `zodiax.optimisation.delay`.

    **Arguments:**

    - `lr`: the learning rate at the end, a finite scalar. It may be traced.
    - `start`: the number of steps to wait, at least 0.
    - `length`: the number of steps of the rise, at least 1.

    **Returns:**

    An Optax schedule: a function from the step count to the learning rate.

    **Raises:**

    - `ValueError`: if `start` or `length` is out of range or not whole, or if `lr` is
        not traced and not finite.
    """
    begin = min(_whole(start, "start", least=0), MOST_STEPS)
    steps = _whole(length, "length", least=1)
    if not isinstance(lr, Tracer) and not math.isfinite(lr):
        raise ValueError(
            f"`lr` must be finite, not {lr}: every update would be lost to it. Give "
            "the rate that is to be reached at the end."
        )
    if steps > MOST_STEPS:
        # As far as steps are counted, which is all that Optax takes.
        lr, steps = lr * (MOST_STEPS / steps), MOST_STEPS
    return optax.linear_schedule(0.0, lr, steps, begin)  # pyright: ignore


class WindowState(NamedTuple):
    """The state of [`window`][vernal.window]."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: Any


def window(
    tx: optax.GradientTransformation,
    start: SupportsIndex = 0,
    stop: SupportsIndex | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation act on a range of steps only.

    Outside `[start, stop)` the updates are zero, and the transformation is not called:
    its moments do not grow, and its schedule does not advance.

    **Arguments:**

    - `tx`: an Optax transformation.
    - `start`: the first step on which it acts. Steps are counted in updates taken.
    - `stop`: the first step on which it no longer acts; `None` for no end.

    **Returns:**

    An Optax transformation.

    **Raises:**

    - `TypeError`: if `tx` is not an Optax transformation.
    - `ValueError`: if `start` or `stop` is negative or not an integer, or if the window
        is empty or backwards.
    """
    inner = optax.with_extra_args_support(require_transformation(tx, "tx"))
    start = _step(start, "start")
    stop = None if stop is None else _step(stop, "stop")
    if stop is not None and stop <= start:
        raise ValueError(
            f"The window is empty or backwards: it starts at step {start} and stops "
            f"at step {stop}. Give a `stop` greater than `start`."
        )
    start = min(start, MOST_STEPS)
    stop = None if stop is None else min(stop, MOST_STEPS)

    # Known by their code, which a type checker must not wrap.
    @no_type_check
    def init_fn(params: Any) -> WindowState:
        return WindowState(jnp.zeros((), jnp.int32), inner.init(params))

    @no_type_check
    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, WindowState]:
        def act() -> tuple[Any, Any]:
            return inner.update(updates, state.inner_state, params, **extra)

        def wait() -> tuple[Any, Any]:
            zeros, held = jax.eval_shape(act)
            return (
                jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros),
                jax.tree.map(
                    lambda x, like: jnp.asarray(x, like.dtype), state.inner_state, held
                ),
            )

        inside = state.count >= start
        if stop is not None:
            inside &= state.count < stop
        updates, inner_state = jax.lax.cond(inside, act, wait)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, WindowState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _step(value: Any, name: str) -> int:
    try:
        step = operator.index(value)
    except TypeError:
        step = -1
    if step < 0:
        raise ValueError(
            f"`{name}` is {value!r}, and must be an integer that is not negative: it "
            "counts updates."
        )
    return step

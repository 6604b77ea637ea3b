"""Optax transformations as pytrees: rates are leaves, the rest compares by value."""

import numbers
import operator
from typing import Any, NamedTuple, SupportsIndex, final, no_type_check

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .._boundary import narrowed_tree
from .._closure import Closure
from .abstract_transform import AbstractTransform
from .rate_check import check_rates

RATE_NAMES = frozenset(
    {
        "learning_rate",
        "step_size",
        "value",
        "init_value",
        "peak_value",
        "end_value",
        # The dictionary of `inject_hyperparams`, which copies it to its first state.
        "numeric_hps",
    }
)
"""What Optax calls a rate, or a value of a schedule, where its closures hold one."""


# Optax's arithmetic has other last bits with a rate that is an array than with one that
# is a constant, which the compiler may merge with others, where these stand together.
_NEEDS_CONSTANTS = tuple(
    frozenset(f"{name}.<locals>.update_fn" for name in names)
    for names in (
        ("scale_by_factored_rms", "scale_by_param_block_rms"),
        ("scale_by_trust_ratio", "trace"),
        ("scale_by_lbfgs", "scale"),
    )
)


@final
class Transform(AbstractTransform):
    """An Optax transformation as a pytree, whose rates are its leaves."""

    closure: Closure

    @classmethod
    def of(cls, tx: optax.GradientTransformation, where: str) -> "Transform":
        """Encodes an Optax transformation.

        **Arguments:**

        - `tx`: the transformation.
        - `where`: what an error calls it.

        **Returns:**

        The same transformation as a pytree.

        **Raises:**

        `TypeError` if `tx` is not an Optax transformation.
        """
        tx = require_transformation(tx, where)
        check_rates(tx, where)
        closure = Closure.encode(tx, RATE_NAMES, within=("optax",))
        names = closure.skeleton.function_names
        if any(found <= names for found in _NEEDS_CONSTANTS):
            closure = Closure.encode(tx)
        return cls(closure)

    def _decode(self) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(self.closure.decode())

    def init(self, params: Any) -> Any:
        """As the encoded transformation's."""
        return self._decode().init(params)

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        """As the encoded transformation's."""
        return self._decode().update(updates, state, params, **extra)


def as_transform(tx: Any, where: str) -> AbstractTransform:
    """Makes a pytree of an Optax transformation, unless it is one.

    **Arguments:**

    - `tx`: an Optax transformation.
    - `where`: what an error calls it, e.g. `optimisers['power']`.

    **Returns:**

    The transformation as a pytree.

    **Raises:**

    `TypeError` if `tx` is not an Optax transformation.
    """
    if isinstance(tx, AbstractTransform):
        return narrowed_tree(tx)
    return Transform.of(tx, where)


def require_transformation(tx: Any, where: str) -> optax.GradientTransformation:
    """Returns `tx` itself.

    **Arguments:**

    - `tx`: what should be an Optax transformation.
    - `where`: what an error calls it.

    **Raises:**

    `TypeError`, with a remedy, if it is not one.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(_not_a_transformation(tx, where))
    return tx


def _not_a_transformation(tx: Any, where: str) -> str:
    if isinstance(tx, numbers.Real) and not isinstance(tx, bool):
        what, remedy = f"the number {tx}", f"Did you mean `optax.sgd({tx})`?"
    elif tx is None:
        what, remedy = "`None`", "Did you mean `optax.set_to_zero()`?"
    elif hasattr(tx, "gradient_transformation"):
        what = f"a `{type(tx).__name__}`"
        remedy = "Did you mean its `.gradient_transformation()`?"
    elif callable(tx) and hasattr(tx, "__name__"):
        name = tx.__name__
        what = f"the function `{name}`"
        remedy = (
            f"Did you mean `{name}(1e-3)`, or, if it is a schedule, "
            f"`optax.sgd({name})`?"
        )
    else:
        what = f"of type `{type(tx).__name__}`"
        remedy = "Give it one, e.g. `optax.adam(1e-3)`."
    return f"`{where}` is {what}, not an Optax transformation. {remedy}"


class WindowState(NamedTuple):
    """The state of [`window`][vernal.window]."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: Any


def window(
    tx: optax.GradientTransformation,
    start: SupportsIndex = 0,
    stop: SupportsIndex | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets a transformation act on a range of steps only.

    Outside `[start, stop)` the updates are zero, and the transformation sees nothing:
    neither the gradient nor the passing of a step. Its moments do not grow while it
    waits, and its schedule starts when it does.

    **Arguments:**

    - `tx`: an Optax transformation.
    - `start`: the first step on which it acts, counted in updates taken.
    - `stop`: the first step on which it no longer acts. `None`: it goes on.

    **Returns:**

    An Optax transformation.

    **Raises:**

    `TypeError` if `tx` is not an Optax transformation; `ValueError` if `start` or
    `stop` is negative or not an integer, or the window is empty or backwards.
    """
    inner = optax.with_extra_args_support(require_transformation(tx, "tx"))
    start = _step(start, "start")
    stop = None if stop is None else _step(stop, "stop")
    if stop is not None and stop <= start:
        raise ValueError(
            f"The window is empty or backwards: it starts at step {start} and stops "
            f"at step {stop}. Give a `stop` greater than `start`."
        )

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

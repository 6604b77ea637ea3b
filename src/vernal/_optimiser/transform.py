"""Optax transformations as pytrees whose rates are leaves."""

import inspect
import numbers
from collections.abc import Callable
from typing import Any, final

import optax

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
"""Optax's names of rates, and of the values of schedules, in its closures."""

# Where these occur together the compiler merges a rate that is a constant with others:
# the last bits would differ from Optax's if it were an array.
_NEEDS_CONSTANTS = tuple(
    frozenset(f"{name}.<locals>.update_fn" for name in names)
    for names in (
        ("scale_by_factored_rms", "scale_by_param_block_rms"),
        ("scale_by_trust_ratio", "trace"),
        ("scale_by_lbfgs", "scale"),
    )
)

_LOOKAHEAD = {"lookahead.<locals>.init_fn", "lookahead.<locals>.update_fn"}


@final
class Transform(AbstractTransform):
    """An Optax transformation as a pytree, whose rates are its leaves."""

    closure: Closure

    @classmethod
    def of(cls, tx: optax.GradientTransformation, where: str) -> "Transform":
        """Encodes a transformation, which an error calls `where`."""
        tx = require_transformation(tx, where)
        check_rates(tx, where)
        closure = Closure.encode(tx, RATE_NAMES, within=("optax",))
        names = closure.skeleton.function_names
        if names >= _LOOKAHEAD:
            raise TypeError(
                f"`{where}` is, or has within it, `optax.lookahead`, whose parameters "
                "are a pair of trees, which vernal does not have. Use the optimiser "
                "within it alone."
            )
        if any(found <= names for found in _NEEDS_CONSTANTS):
            closure = Closure.encode(tx)
        return cls(closure)

    def decode(self) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(self.closure.decode())

    def init(self, params: Any) -> Any:
        return self.decode().init(params)

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        """Calls the encoded transformation, with those of the extra it takes."""
        update = self.decode().update
        return update(updates, state, params, **_taken(update, extra))


def _taken(update: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that a function takes: not each of Optax's takes any."""
    known = inspect.signature(update).parameters
    if any(known[name].kind is inspect.Parameter.VAR_KEYWORD for name in known):
        return extra
    return {name: value for name, value in extra.items() if name in known}


def as_transform(tx: Any, where: str) -> AbstractTransform:
    """Makes a pytree of an Optax transformation, which an error calls `where`."""
    if isinstance(tx, AbstractTransform):
        return narrowed_tree(tx)
    return Transform.of(tx, where)


def require_transformation(tx: Any, where: str) -> optax.GradientTransformation:
    """Returns `tx` itself; raises a `TypeError` if Optax could not use it."""
    if isinstance(tx, optax.GradientTransformation):
        return tx
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
        remedy = f"Call it: `{name}(1e-3)`. A schedule goes into `optax.sgd({name})`."
    else:
        what = f"of type `{type(tx).__name__}`"
        remedy = "Give it one, e.g. `optax.adam(1e-3)`."
    raise TypeError(f"`{where}` is {what}, not an Optax transformation. {remedy}")

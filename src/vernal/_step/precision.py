"""Whether a trainer can be used: it is one, and of the precision that JAX has now."""

import contextlib
from typing import Any

import jax
import numpy as np

from .._boundary import REMEDY, is_wide, is_x64_on
from .abstract_trainer import AbstractTrainer


def require_one(trainer: AbstractTrainer, name: str) -> None:
    """Refuses a stacked trainer in what is for one, and one of another precision."""
    require_precision(trainer)
    refuse_stacked(trainer, name)


def refuse_stacked(trainer: AbstractTrainer, name: str) -> None:
    """Refuses a trainer of many, whose numbers would be taken for those of one."""
    if trainer.step_count.ndim:
        size, kind = len(trainer.step_count), type(trainer).__name__
        raise TypeError(
            f"`{name}`: this `{kind}` is stacked, with {size} members, and `{name}` "
            "is for one. `fit_many` fits them all; `result.trainer(0)` is one of them, "
            "and the result has their `errors`, `report` and `table`. In a program of "
            "your own, map over the members, by `eqx.filter_vmap`."
        )


def require_precision(trainer: AbstractTrainer) -> None:
    """Refuses a trainer that was made in float64 while JAX computes in float32."""
    if is_wide(trainer.best_loss.dtype) and not is_x64_on():
        raise ValueError(
            f"`{type(trainer).__name__}` was made in float64, while `jax_enable_x64` "
            "was on, and now it is off: JAX would compute in float32. Turn it on for "
            f"all of it, by {REMEDY}; or make the trainer here."
        )


def precision_of(trainer: AbstractTrainer) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that has the precision in which a trainer was made."""
    return jax.enable_x64(is_x64_on() or trainer.best_loss.dtype == np.float64)

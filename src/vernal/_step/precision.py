"""Whether a trainer has the precision that JAX has now."""

import contextlib
from typing import Any

import jax
import numpy as np

from .._boundary import REMEDY, is_wide, is_x64_on
from .abstract_trainer import AbstractTrainer


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

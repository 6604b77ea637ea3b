"""What was not finite during a fit, from the counts that each step keeps."""

from typing import Any

import equinox as eqx
import jax

from .._policy import SKIP_ADVICE, NanCount, NonFiniteError
from .._tree import paths
from .abstract_trainer import AbstractTrainer, TrainerT, progress_of, with_progress


def nan_report(trainer: AbstractTrainer) -> dict[str, NanCount]:
    """Implements `Trainer.nan_report`."""
    totals, firsts, _ = jax.device_get(progress_of(trainer).nan_counts)
    return {
        name: NanCount(int(total), int(first) if first >= 0 else None)
        for name, total, first in zip(nan_columns(trainer), totals, firsts, strict=True)
    }


def nan_columns(trainer: AbstractTrainer) -> tuple[str, ...]:
    """Returns the names of what a report counts."""
    names = paths(trainer.params)
    free = lambda name: f"<{name}>" if name in names else name
    return (free("loss"), *names, free("update"))


def last_bad_step(trainer: AbstractTrainer) -> int:
    """Returns the last step with a non-finite value, -1 if there was none."""
    *_, lasts = jax.device_get(progress_of(trainer).nan_counts)
    return int(lasts.max())


def is_at_bad_step(trainer: AbstractTrainer) -> bool:
    """Whether the last step had a non-finite value."""
    return last_bad_step(trainer) == int(trainer.step_count) - 1 >= 0


def raise_if_non_finite(
    trainer: AbstractTrainer, explanation: str = SKIP_ADVICE
) -> None:
    """Raises if the last step was bad, under a policy that raises."""
    if trainer.stopped and trainer.nan_policy.raises and is_at_bad_step(trainer):
        raise non_finite_error(trainer, trainer, explanation)


def error_if_stopped(trainer: TrainerT) -> TrainerT:
    """Raises when a compiled program runs; the error cannot name the step."""
    message = "A value is not finite, and the policy is RaiseOnNan."
    progress = eqx.error_if(progress_of(trainer), trainer.stopped, message)
    return with_progress(trainer, progress)


def non_finite_error(
    trainer: AbstractTrainer, result: Any, explanation: str
) -> NonFiniteError:
    """Names what was not finite at the last bad step."""
    *_, lasts = jax.device_get(progress_of(trainer).nan_counts)
    step = int(lasts.max())
    columns = zip(nan_columns(trainer), lasts, strict=True)
    bad = [name for name, last in columns if last == step]
    return NonFiniteError(step, bad, nan_report(trainer), result, explanation)

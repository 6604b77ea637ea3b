"""What was not finite during a fit, from the counts that each step keeps."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer

from .._boundary import is_debugged
from .._policy import SKIP_ADVICE, NanCount, NonFiniteError
from .._tree import ByName, paths
from .abstract_trainer import AbstractTrainer, TrainerT, progress_of, with_progress


def nan_report(trainer: AbstractTrainer) -> dict[str, NanCount]:
    """Implements `Trainer.nan_report`."""
    totals, firsts, _ = jax.device_get(progress_of(trainer).nan_counts)
    return ByName(
        (name, NanCount(int(total), int(first) if first >= 0 else None))
        for name, total, first in zip(nan_columns(trainer), totals, firsts, strict=True)
    )


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
    return last_bad_step(trainer) == int(trainer.step_count) - 1 >= 0


def raised_if_bad(
    before: AbstractTrainer,
    after: TrainerT,
    explanation: Callable[[], str] = lambda: SKIP_ADVICE,
) -> TrainerT:
    """Returns a trainer after steps; raises if one was bad, under a policy that raises.

    Under JAX's flags for debugging the explanation itself raises, whatever the policy.
    Within a compiled program the error, raised when it runs, cannot name the step.
    """
    raises = after.nan_policy.raises
    if isinstance(after.stopped, Tracer):
        if not raises:
            return after
        message = "A value is not finite, and the policy is RaiseOnNan."
        progress = eqx.error_if(progress_of(after), after.stopped, message)
        return with_progress(after, progress)
    if (raises or is_debugged()) and not before.stopped and after.stopped:
        explained = explanation()
        if raises and is_at_bad_step(after):
            raise non_finite_error(after, after, explained)
    return after


def non_finite_error(
    trainer: AbstractTrainer, result: Any, explanation: str
) -> NonFiniteError:
    """Names what was not finite at the last bad step."""
    *_, lasts = jax.device_get(progress_of(trainer).nan_counts)
    step = last_bad_step(trainer)
    columns = zip(nan_columns(trainer), lasts, strict=True)
    bad = [name for name, last in columns if last == step]
    return NonFiniteError(step, bad, nan_report(trainer), result, explanation)

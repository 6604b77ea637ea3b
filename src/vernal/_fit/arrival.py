"""Whether a trainer is at a minimum: for the end of a fit, and for a table."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._data import Source, Whole, as_batch
from .._minimum import along, distance_of, measure, settled, what_falls
from .._policy import StopReason
from .._program import program
from .._step import AbstractTrainer, overrides, step_key, stripped
from .._tree import as_parameters
from .result import FitResult

_WORTH_A_NOTE = 20


@program
def _measure(
    trainer: AbstractTrainer, projector: Any, batch: Any, kind: str, fall: Any
) -> Any:
    return measure(trainer, projector, batch, step_key(trainer), kind, fall)


def checked_end(result: FitResult[Any, Any], source: Source) -> FitResult[Any, Any]:
    """Checks that a fit which `Converged` ended has arrived at a minimum.

    That is known only where there is one loss: that of one batch.
    """
    trainer: AbstractTrainer = result.trainer
    is_over = result.stop_reason is StopReason.CONVERGED
    if not (is_over and isinstance(source, Whole) and _has_minimum(trainer)):
        return result
    losses = result.history.loss
    fall = np.asarray(losses[0] - losses[-1] if len(losses) else 0, losses.dtype)
    args = stripped(trainer), trainer.projector, source.batch, what_falls(trainer)
    distance = distance_of(_measure(*args, jnp.asarray(fall)))
    reason = settled(result.stop_reason, distance)
    return dataclasses.replace(result, stop_reason=reason, _distance=distance)


def edm_note(trainer: AbstractTrainer, batch: Any) -> str | None:
    """Returns a note if a trainer with a likelihood is not at a minimum.

    A fit has converged if `edm` is below a thousandth of the scatter. A table shows no
    difference below about twenty times that: a fifth of an error bar.
    """
    kind = what_falls(trainer)
    # A loss with a penalty has no known scale.
    if kind == "loss" or not _has_minimum(trainer):
        return None
    args = stripped(trainer), trainer.projector, as_batch(batch), kind, jnp.zeros(())
    distance = distance_of(_measure(*args))
    if not distance.edm > _WORTH_A_NOTE * distance.limit:
        return None
    where = along(np.asarray(distance.direction, float), trainer.params)
    return f"not at a minimum: edm {distance.edm:.3g}{where}"


def _has_minimum(trainer: AbstractTrainer) -> bool:
    """Whether a fit ends where the gradient is zero.

    With random numbers, or hooks that change steps, it may end elsewhere.
    """
    has_hooks = overrides(trainer, "transform_grads") or overrides(trainer, "constrain")
    return trainer.key is None and not has_hooks and _is_real(trainer.params)


def _is_real(params: Any) -> bool:
    try:
        as_parameters(params)
    except (TypeError, ValueError):
        return False
    return True

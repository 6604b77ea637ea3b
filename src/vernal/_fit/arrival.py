"""Whether a trainer has arrived at a minimum: at the end of a fit, and in a table."""

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

    That is known where there is one loss: that of one batch.
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
    """Says of a trainer with a likelihood that it is not at a minimum, if it is not.

    A fit is over once `edm` is below a thousandth of the scatter. In a table nothing
    looks any different before it is some twenty times that: a fifth of an error bar.
    """
    kind = what_falls(trainer)
    # How much of a loss with a penalty matters, nobody knows.
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

    Random numbers change with each step, and hooks lead elsewhere.
    """
    is_led = overrides(trainer, "transform_grads") or overrides(trainer, "constrain")
    return trainer.key is None and not is_led and _is_real(trainer.params)


def _is_real(params: Any) -> bool:
    try:
        as_parameters(params)
    except (TypeError, ValueError):
        return False
    return True

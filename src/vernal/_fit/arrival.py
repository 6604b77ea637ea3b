"""Whether a trainer is at a minimum: for the end of a fit, and for a table."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._boundary import outside_mesh
from .._data import Source, Whole, as_batch
from .._minimum import (
    Distance,
    Site,
    distance_of,
    endless,
    has_minimum,
    lower_point,
    measure,
    second_look,
    settled,
    what_falls,
)
from .._policy import StopReason
from .._program import program
from .._step import AbstractTrainer, in_real_coordinates, stripped
from .result import FitResult

_measure = program(measure)


@outside_mesh
def checked_end(
    result: FitResult[Any, Any], source: Source, trainer: AbstractTrainer
) -> FitResult[Any, Any]:
    """Checks that a fit which `Converged` ended has arrived at a minimum.

    That is known only where there is one loss: that of one batch. `trainer` is that of
    the result, on the devices of the fit.
    """
    is_over = result.stop_reason is StopReason.CONVERGED
    if not (is_over and isinstance(source, Whole) and has_minimum(trainer)):
        return result
    losses = result.history.loss
    known = losses[np.isfinite(losses)]
    fall = np.asarray(known[0] - known[-1] if len(known) else 0, losses.dtype)
    trainer = in_real_coordinates(trainer)
    bare, batch, kind = stripped(trainer), source.batch, what_falls(trainer)
    local = _measure(bare, trainer.projector, batch, kind, jnp.asarray(fall))
    site = Site(bare, batch, kind)
    distance = second_look(site, local, distance_of(local))
    if lower := lower_point(site, local, distance):
        distance = lower.distance
    distance = endless(site, local, distance)
    reason = settled(result.stop_reason, distance)
    return dataclasses.replace(result, stop_reason=reason, _distance=distance)


def distance_here(trainer: AbstractTrainer, batch: Any, kind: str) -> Distance:
    """Finds how far a trainer is from a minimum; `kind` is that of `what_falls`."""
    trainer = in_real_coordinates(trainer)
    bare, batch = stripped(trainer), as_batch(batch)
    local = _measure(bare, trainer.projector, batch, kind, jnp.zeros(()))
    site = Site(bare, batch, kind)
    distance = second_look(site, local, distance_of(local))
    return endless(site, local, distance)

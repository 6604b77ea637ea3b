"""What a profile starts from: a minimum, and the curvature there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import refuse_program
from .._curvature import Mode, checked_mode
from .._data import as_batch
from .._inference import Passes, around, require_likelihood
from .._minimum import (
    Curved,
    Local,
    Triangle,
    distance_of,
    edm_note,
    settled,
    what_falls,
)
from .._policy import StopReason
from .._projection import DenseWhitening
from .._solve import (
    REASONS,
    Problem,
    checked_solver,
    is_least_squares,
    whitened_without_signs,
)
from .._step import (
    AbstractTrainer,
    bounds_of,
    defined,
    in_free_coordinates,
    stripped,
)
from .held import Point, Scan

# A likelihood that is lower by less than this is the same, beside rounding.
_LOWER = 5e-3


class Options(NamedTuple):
    """The options that `profile` and `intervals` share."""

    max_steps: int
    jac: Mode | None


def prepare(
    name: str, trainer: AbstractTrainer, solver: Any, batch: Any, options: Options
) -> Scan:
    """Checks a trainer, which must be at a minimum, and finds its curvature there."""
    refuse_program(name, trainer, batch)
    encoded, _ = checked_solver(solver, options.max_steps, "max_steps")
    require_likelihood(trainer, "A profile of the likelihood")
    _require_same(trainer, solver)
    batch, trainer = as_batch(batch), in_free_coordinates(trainer)
    here = around(trainer, batch, "A profile of the likelihood", options.jac)
    if here.data is not None and here.data.is_robust:
        raise TypeError(
            f"`{name}` follows a likelihood, and a robust loss is none: by how much it "
            "rises says nothing of the errors. Use `standard_errors`, which takes them "
            "from the scatter of the data."
        )
    note = None if here.distance is None else edm_note(here.distance, trainer.params)
    if note is not None:
        raise ValueError(
            f"`{name}`: the trainer is {note}. A profile begins at the minimum: "
            "`trainer.solve(solver, batch).trainer` is there."
        )
    metric = here.whitening
    if bounds_of(trainer) is not None:
        metric = _without_bounds(trainer, batch, options.jac) or metric
    goal = jnp.asarray(np.int32(options.max_steps))
    problem = Problem(batch, encoded, 1, checked_mode(options.jac))
    return Scan(stripped(trainer), metric, problem, goal)


def _without_bounds(
    trainer: AbstractTrainer, batch: Any, jac: Mode | None
) -> DenseWhitening | None:
    # An element that is held at its bound may have to leave it.
    found = whitened_without_signs(trainer, batch, None, Passes(jac=jac))
    if found is None:
        return None
    (whitening,) = found.projector.whitenings
    assert isinstance(whitening, DenseWhitening)
    return whitening


def _require_same(trainer: AbstractTrainer, solver: Any) -> None:
    """Refuses a solver that minimises something else than the likelihood."""
    kind = "residuals" if "residuals" in defined(trainer) else "nll"
    falls = what_falls(trainer, is_least_squares(solver))
    if falls != kind:
        least = "a least-squares solver" if kind == "residuals" else "no `loss`"
        raise ValueError(
            f"`solver` minimises `{falls}`, and the profile is of the likelihood, by "
            f"`{kind}`. Give {least}, or a class that defines `{kind}` alone."
        )


def converged(points: Point) -> np.ndarray:
    """Finds out which of many points are minima of what is not held."""
    local, reasons = jax.device_get((points.local, points.reason))
    found = []
    for index, reason in enumerate(reasons):
        own = jax.tree.map(lambda x, i=index: x[i], local)
        is_done = settled(REASONS[reason], distance_of(own)) is StopReason.CONVERGED
        found.append(is_done or _is_flat(own))
    return np.array(found, bool)


def _is_flat(local: Local) -> bool:
    """Whether the likelihood does not depend on what is not held, as where all is."""
    if isinstance(local, Triangle):
        return not local.factor[:-1, :-1].any()
    is_curved = isinstance(local, Curved)
    return is_curved and not local.slope.any() and not local.hessian.any()


def is_lower(nll: np.ndarray, minimum: Any) -> np.ndarray:
    """Whether the likelihood is lower than at the minimum, beyond rounding."""
    eps = np.finfo(nll.dtype).eps
    return nll < minimum - _LOWER - 64 * eps * np.abs(minimum)

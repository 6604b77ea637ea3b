"""The second derivatives of a likelihood, at the minimum if that is close."""

from typing import Any

import numpy as np

from .._boundary import is_traced
from .._minimum import MOST_STEPS, moved, step_to_minimum, surroundings
from .._step import AbstractTrainer, defined
from .._tree import as_parameters
from .derivatives import Derived, Passes, derive, require_finite


def observed(
    trainer: AbstractTrainer, batch: Any, passes: Passes, holds: bool
) -> tuple[Derived, str]:
    """Computes the second derivatives of the likelihood, with its name in messages.

    Where the gradient may account for some of the curvature, the Hessian is that at the
    minimum: see `step_to_minimum`. All else is of the current point.
    """
    derived = derive(trainer, batch, "nll", None, passes, holds)
    (expansion,) = derived.found
    name = "`nll`" if "nll" in defined(trainer) else "the squared `residuals`"
    what = f"The curvature of {name}"
    require_finite((expansion.hessian,), derived.is_finite, what, trainer, batch)
    if is_traced(derived, trainer):
        return derived, name
    found = derived
    for _ in range(MOST_STEPS):
        hessian, gradient = found.found[0]
        params = as_parameters(trainer.params)
        here = surroundings(found.value, gradient, hessian, params)
        if (step := step_to_minimum(here)) is None:
            break
        trainer = moved(trainer, step)
        try:
            further = derive(trainer, batch, "nll", None, passes, holds)
        except (RuntimeError, ValueError):  # an error of the model, or one of its units
            break
        if not np.isfinite(further.found[0].hessian).all():
            break
        found = further
    expansion = expansion._replace(hessian=found.found[0].hessian)
    return derived._replace(found=(expansion,)), name

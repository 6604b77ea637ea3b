"""Where what is minimised may go no further: elements at bounds, and ends of priors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._boundary import PyTree
from .._curvature import Subject, gradient, traced
from .._tree import by_path, ravel, unravel
from .abstract_trainer import (
    AbstractTrainer,
    bijections_of,
    bounds_of,
    priors_of,
    template_of,
)


def pushed(
    trainer: AbstractTrainer, value: Callable[[PyTree], Float[Array, ""]]
) -> dict[str, Bool[Array, "..."]]:
    """Finds the elements at a bound beyond which a function is lower, by path.

    `value` is a function of the parameters. Each parameter with bounds is there.
    """
    bounds, params = bounds_of(trainer), trainer.params
    if bounds is None:
        return {}
    flat = ravel(params)
    fn = traced(lambda flat: value(unravel(flat, params)), flat)
    subject = Subject(f"What `{type(trainer).__name__}` minimises", is_quiet=True)
    try:
        slopes = unravel(gradient(fn, flat, subject), params)
    except TypeError:
        # Without derivatives nothing is known to be pushed.
        slopes = jax.tree.map(jnp.zeros_like, params)
    return bounds.pushed(params, slopes)


def prior_ends(trainer: AbstractTrainer, *, is_near: bool = False) -> str:
    """Names the first prior with an end that no bound stands for, and the remedy.

    It begins with a space, and is empty without such a prior. With `is_near` it names
    those alone near whose end a parameter is.
    """
    priors, bounds = priors_of(trainer), bounds_of(trainer)
    if priors is None:
        return ""
    bijections = bijections_of(trainer) or template_of(trainer).bijections
    mapped = {} if bijections is None else bijections.maps
    sides = ({}, {}) if bounds is None else (bounds.low, bounds.high)
    trained = by_path(trainer.params).by_name().keys() - mapped.keys()
    for path, ends in priors.ends(trainer.model, is_near).items():
        pairs = zip(ends, sides, strict=True)
        free = [
            _written(end) for end, side in pairs if not (end is None or path in side)
        ]
        if free and path in trained:
            support = ", ".join(map(_written, ends))
            return (
                f" The prior of {path!r} ends at {' and '.join(free)}, which no "
                f"derivative shows: give its support too, `bounds={{{path!r}: "
                f"({support})}}`."
            )
    return ""


def _written(end: Any) -> str:
    if end is None:
        return "None"
    ends = np.unique(np.asarray(end, float))
    return f"{ends[0]:g}" if ends.size == 1 else str(np.asarray(end).tolist())

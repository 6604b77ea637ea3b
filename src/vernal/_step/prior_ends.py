"""Where priors end: what is minimised jumps there, unless a bound says so."""

from typing import Any

import numpy as np

from .._tree import by_path
from .abstract_trainer import (
    AbstractTrainer,
    bijections_of,
    bounds_of,
    priors_of,
    template_of,
)


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

"""The rows of a trainer's parameters in reports and tables."""

from collections.abc import Iterator

import numpy as np

from .._report import ParameterRow, parameter_rows
from .._step import AbstractTrainer, template_of
from .._tree import by_path, named_leaves
from .expansion import Around
from .propagate import propagated


def rows(
    trainer: AbstractTrainer,
    here: Around | None,
    scale: float,
    most: int | None = None,
) -> Iterator[ParameterRow]:
    """Yields a row for each element; without the surroundings, there are no errors.

    The error of what is tied to others is that of a function of them.
    """
    free = [leaf.path for leaf in named_leaves(trainer.params) if leaf.is_parameter]
    ties = template_of(trainer).ties
    words = {} if ties is None else ties.words
    errors = None
    if here is not None:
        errors = here.errors(trainer.params, scale)
        if words:
            tied = lambda model: {p: by_path(model).by_name()[p] for p in words}
            _, found = propagated(trainer, tied, here, scale)
            known = {path: np.asarray(found[path], float) for path in words}
            # What follows only elements that are held has no error either.
            is_held = lambda e: (e == 0) & here.held.any()
            errors |= {p: np.where(is_held(e), np.nan, e) for p, e in known.items()}
    return parameter_rows(trainer.model, free, errors, words, most)

"""The rows of a trainer's parameters in reports and tables."""

from collections.abc import Iterator

import numpy as np

from .._report import ParameterRow, parameter_rows
from .._step import AbstractTrainer, template_of
from .._tree import by_path, element_name, named_leaves
from .elements import tied_with_errors
from .expansion import Around, OfElements
from .propagate import propagated


def rows(
    trainer: AbstractTrainer,
    here: tuple[Around, OfElements] | None,
    scale: float,
    most: int | None = None,
) -> Iterator[ParameterRow]:
    """Yields a row for each element; without the surroundings, there are no errors.

    The error of what is tied to others is that of a function of them; what is complex
    has none. The parameters of the trainer may be free coordinates.
    """
    free = [leaf.path for leaf in named_leaves(trainer.params) if leaf.is_parameter]
    ties, bijections = template_of(trainer).ties, template_of(trainer).bijections
    words = {} if ties is None else ties.words
    model, errors, fixed = trainer.model, None, set()
    if here is not None:
        around, own = here
        # Without scatter the scale is zero, and an infinite error stays infinite.
        is_known = np.isfinite(own.errors)
        scaled = scale * np.where(is_known, own.errors, 0)
        errors = own._replace(errors=np.where(is_known, scaled, own.errors))
        errors = errors.by_path(trainer)
        fixed = {
            element_name({path: errors[path]}, int(index))
            for path in (() if bijections is None else bijections.maps)
            for index in np.flatnonzero(np.isnan(errors[path]))
        }
        if real := tied_with_errors(trainer, model):
            tied = lambda model: {p: by_path(model).by_name()[p] for p in real}
            _, found, _ = propagated(trainer, tied, around, scale)
            errors |= {path: np.asarray(found[path], float) for path in real}
    for row in parameter_rows(model, free, errors, words, most):
        yield row._replace(status="fixed") if row.name in fixed else row

"""The table of parameters, with their values and errors."""

from typing import Any

from .._boundary import refuse_program
from .._curvature import Mode
from .._minimum import edm_note
from .._report import parameter_rows
from .._step import AbstractTrainer
from .._tree import aligned, named_leaves
from .expansion import around

# The most rows that one array has.
_MOST_ROWS = 64


def table(trainer: AbstractTrainer, batch: Any, jac: Mode | None) -> str:
    """Implements `Trainer.table`."""
    refuse_program("table", trainer, batch)
    free = {leaf.path for leaf in named_leaves(trainer.params) if leaf.is_parameter}
    errors = note = None
    if batch is not None:
        here = around(trainer, batch, jac, "A standard error")
        errors = here.by_path(here.errors())
        if here.distance is not None:
            note = edm_note(here.distance, trainer.params)
    rows = parameter_rows(trainer.model, free, errors, _MOST_ROWS)
    head = "parameter", "value", "standard error" if errors else ""
    text = aligned([head, *(row.cells() for row in rows)])
    return text if note is None else f"{text}\n{note}"

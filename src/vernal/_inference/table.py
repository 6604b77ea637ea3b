"""The table of parameters, with their values and errors."""

from typing import Any

from .._boundary import boolean, refuse_program
from .._curvature import Mode
from .._minimum import edm_note
from .._step import AbstractTrainer, in_free_coordinates
from .._tree import aligned
from .expansion import around
from .laplace import ErrorKind
from .rows import rows

# The most rows that one array has.
_MOST_ROWS = 64


def table(
    trainer: AbstractTrainer,
    batch: Any,
    scale_errors: bool,
    jac: Mode | None,
    kind: ErrorKind | None,
) -> str:
    """Implements `Trainer.table`."""
    refuse_program("table", trainer, batch)
    scale_errors = boolean(scale_errors, "scale_errors")
    trainer, here, note, scale = in_free_coordinates(trainer), None, None, 1.0
    if batch is not None:
        here = around(trainer, batch, "A standard error", jac, kind)
        scale = here.error_scale(scale_errors)
        if here.distance is not None:
            note = edm_note(here.distance, trainer.params)
    head = "parameter", "value", "standard error" if here else ""
    known = None if here is None else (here, here.of_elements(trainer))
    cells = (row.cells() for row in rows(trainer, known, scale, _MOST_ROWS))
    text = aligned([head, *cells])
    return text if note is None else f"{text}\n{note}"

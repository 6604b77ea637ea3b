"""The table of parameters, with their values and errors."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .._boundary import refuse_program, spacing
from .._curvature import Mode
from .._fit import edm_note
from .._step import AbstractTrainer
from .._tree import aligned, element_name, named_leaves
from .uncertainty import standard_errors

# The most rows that one array has.
_MOST_ROWS = 64


def table(trainer: AbstractTrainer, batch: Any, jac: Mode | None) -> str:
    """Implements `Trainer.table`."""
    refuse_program("table", trainer, batch)
    errors = {}
    if batch is not None:
        found = standard_errors(trainer, batch, jac)
        errors = {leaf.path: np.asarray(leaf.value) for leaf in named_leaves(found)}
    trained = {leaf.path for leaf in named_leaves(trainer.params) if leaf.is_parameter}
    rows = [("parameter", "value", "standard error" if errors else "")]
    for leaf in named_leaves(trainer.model):
        if leaf.path in trained:
            error = errors.get(leaf.path)
            rows += _rows(leaf.path, np.asarray(leaf.value), error)
        elif leaf.unfitted:
            size = np.size(leaf.value)
            value = f"{np.asarray(leaf.value).item():.6g}" if size == 1 else "…"
            rows.append((leaf.path, value, leaf.unfitted))
    note = None if batch is None else edm_note(trainer, batch)
    return aligned(rows) if note is None else f"{aligned(rows)}\n{note}"


def _rows(
    path: str, values: np.ndarray, errors: np.ndarray | None
) -> Iterator[tuple[str, str, str]]:
    """Yields a row for each element, with a gap in a large array."""
    for index in range(values.size):
        if values.size > _MOST_ROWS and _MOST_ROWS // 2 <= index < values.size - 1:
            if index == _MOST_ROWS // 2:
                yield f"{path}: {values.size - 1 - index} more", "…", ""
            continue
        name = element_name({path: values}, index)
        value = values.flat[index]
        if errors is None:
            yield name, f"{value:.6g}", ""
        else:
            error = float(errors.flat[index])
            value, shown = _rounded(float(value), error)
            if 0 < error < (apart := spacing(values.flat[index], values.dtype)):
                shown += f", below the spacing of {values.dtype} ({apart:.2g})"
            yield name, value, shown


def _rounded(value: float, error: float) -> tuple[str, str]:
    """Writes an error with two significant digits, and its value to the same place."""
    if math.isinf(error):
        return f"{value:.6g}", "unconstrained"
    if not (error > 0 and math.isfinite(value)):
        return f"{value:.6g}", f"{error:.2g}"
    # Rounded first: the two digits of 0.0996 are those of 0.10.
    last = math.floor(math.log10(float(f"{error:.1e}"))) - 1
    if 1e-4 <= max(abs(value), error) < 1e6:
        decimals = max(-last, 0)
        return f"{value:.{decimals}f}", f"{error:.{decimals}f}"
    first = math.floor(math.log10(abs(value))) if value else last
    return f"{value:.{max(first - last, 0)}e}", f"{error:.1e}"

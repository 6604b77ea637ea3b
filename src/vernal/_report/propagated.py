"""What `Trainer.propagate` returns: a pair that prints as lines."""

from typing import Any, NamedTuple

import numpy as np

from .._tree import named_leaves
from .rows import ParameterRow, parameter_rows, plus_minus

# The most lines of one array.
_MOST_LINES = 16


class Propagated(NamedTuple):
    """What [`vernal.Trainer.propagate`][] returns: `value, error = ...`.

    It prints as a line for each element, `name = value ± error`, with the digits that
    the error leaves. Of an array of more than 16 elements the middle is left out.

    **Attributes:**

    - `value`: what the function returned.
    - `error`: a tree like it, with the standard errors.
    """

    value: Any
    error: Any

    def __str__(self) -> str:
        """Returns the lines; a single number has no name."""
        leaves = [leaf for leaf in named_leaves(self.error) if leaf.is_parameter]
        errors = {leaf.path: np.asarray(leaf.value) for leaf in leaves}
        rows = list(parameter_rows(self.value, errors, errors, {}, _MOST_LINES))
        names = [row.name for row in rows if row.value is not None]
        width = max(map(len, names), default=0)
        return "\n".join(_line(row, width) for row in rows)

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        # For notebooks, which show what `repr` returns otherwise.
        printer.text(str(self))


def _line(row: ParameterRow, width: int) -> str:
    if row.value is None:
        return row.name.removeprefix(": ")  # a gap
    text = plus_minus(row.value, row.error)
    return f"{row.name:{width}} = {text}" if row.name else text

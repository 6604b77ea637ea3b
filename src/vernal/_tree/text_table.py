"""Plain-text tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# From here on six digits leave out what differs between numbers such as dates.
_LARGE = 1e4


def short_number(value: Any) -> str:
    """Writes a number with six digits, and a large one with ten: those it has."""
    if not abs(value) >= _LARGE:
        return f"{value:.6g}"
    with np.errstate(over="ignore"):
        is_single = complex(np.complex64(value)) == complex(value)
    return f"{value:.8g}" if is_single else f"{value:.10g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Aligns rows of text in columns, with a line below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)

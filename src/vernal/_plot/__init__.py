"""Beneath `vernal.plot`: `axes` has scales and labels, `lines` draws parameters.

`residuals` evaluates these, and `arguments` checks what a picture is drawn of.
"""

from .arguments import as_numbers, drawn
from .axes import (
    add_legend,
    as_label,
    choose_scale,
    choose_ticks,
    draw_line,
    drawable,
    prepare,
)
from .lines import as_history, collect_lines, draw_lines, largest, to_one_scale
from .residuals import collect_points, goodness

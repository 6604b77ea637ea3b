"""Beneath `vernal.plot`: `axes` has scales and labels, `lines` draws parameters."""

from .axes import (
    add_legend as add_legend,
    choose_scale as choose_scale,
    choose_ticks as choose_ticks,
    draw_line as draw_line,
    drawable as drawable,
    prepare as prepare,
)
from .lines import (
    as_history as as_history,
    collect_lines as collect_lines,
    draw_lines as draw_lines,
    largest as largest,
    to_one_scale as to_one_scale,
)

"""A report as plain text, and as tables of HTML."""

import html
import math
from collections.abc import Iterator, Sequence
from typing import Any

from .._tree import aligned, short_number
from .rows import ParameterRow, written

Section = list[tuple[str, ...]]
"""The rows of a table; the first one is its head."""

# The most rows of parameters and of correlations.
_MOST_ROWS, _MOST_PAIRS = 64, 12
_LEAST_CORRELATION = 0.1

# An error of more times its value says nothing of a relative one.
_MOST_RELATIVE = 100


def as_text(report: Any) -> str:
    """Writes a report as aligned tables, one below the other."""
    text = "\n\n".join(aligned(section) for section in _sections(report))
    return text if report.note is None else f"{text}\n\n{report.note}"


def as_html(report: Any) -> str:
    """Writes a report as tables of HTML."""
    tables = "".join(map(_table, _sections(report)))
    note = "" if report.note is None else f"<p>{html.escape(report.note)}</p>"
    return f"<div>{tables}{note}</div>"


def _table(section: Section) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    head, *body = section
    rows = "".join(row(cells, "td") for cells in body)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{rows}</tbody></table>"


def _sections(report: Any) -> Iterator[Section]:
    reason = "" if report.stop_reason is None else str(report.stop_reason)
    yield [("fit", reason), *_facts(report)]
    heads = ("parameter", "value", "standard error", "relative")
    yield [heads, *map(_cells, _shortened(report.parameters))]
    pairs = [p for p in report.correlations if abs(p.value) >= _LEAST_CORRELATION]
    if pairs:
        shown = [(f"{a}, {b}", f"{value:+.3f}") for a, b, value in pairs[:_MOST_PAIRS]]
        more = len(pairs) - len(shown)
        rest = [(f"{more} more, in `report.correlations`", "…")] if more else []
        yield [(f"correlations of at least {_LEAST_CORRELATION}", ""), *shown, *rest]


def _facts(report: Any) -> Iterator[tuple[str, str]]:
    is_scaled = report.error_scale != 1
    expected = report.expected_deviance
    name = "chi-squared" if expected is None else "deviance"
    is_whole = report.effective_count == report.free_count
    facts = {
        "data": report.data_count,
        "free parameters": report.free_count,
        "effective parameters": None if is_whole else report.effective_count,
        "degrees of freedom": report.degrees_of_freedom,
        name: report.chi_squared,
        f"reduced {name}": report.reduced_chi_squared,
        "expected deviance": expected,
        # Without error bars chi-squared has no distribution.
        "p-value": None if is_scaled else report.p_value,
        "AIC": report.aic,
        "BIC": _bic(report),
        "prior penalty": report.prior_penalty,
        "edm": report.edm,
        "errors multiplied by": report.error_scale if is_scaled else None,
    }
    for name, value in facts.items():
        first = value[0] if isinstance(value, tuple) else value
        if isinstance(value, str):
            yield name, value
        elif first is not None and not math.isnan(first):
            is_pair = isinstance(value, tuple)
            yield name, " ± ".join(written(*value)) if is_pair else number(value)
    if report.error_kind == "sandwich":
        yield "errors", "from the scatter of the data (sandwich)"


def _bic(report: Any) -> Any:
    # How many data an `nll` has is not seen.
    is_counted = report.aic is None or report.data_count is not None
    return report.bic if is_counted else "needs `data_count=`"


def number(value: int | float) -> str:
    """Writes an integer in full, and another number with six digits or ten."""
    return str(value) if isinstance(value, int) else short_number(value)


def _cells(row: ParameterRow) -> tuple[str, str, str, str]:
    relative = ""
    if row.value and abs(row.error) < _MOST_RELATIVE * abs(row.value):
        relative = _percent(abs(row.error / row.value))
    return (*row.cells(), relative)


def _percent(share: float) -> str:
    """Writes a share with two digits, a large one without an exponent."""
    text = f"{100 * share:.2g}"
    return f"{float(text):.0f} %" if 100 * share >= 99.5 else f"{text} %"


def _shortened(rows: Sequence[ParameterRow]) -> Sequence[ParameterRow]:
    """Leaves out the middle of many rows."""
    gap = len(rows) - _MOST_ROWS
    if gap <= 0:
        return rows
    half = _MOST_ROWS // 2
    between = ParameterRow(f"{gap} more, in `report.parameters`", None, math.nan, "")
    return [*rows[:half], between, *rows[half + gap :]]

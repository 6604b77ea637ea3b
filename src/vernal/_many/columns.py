"""Many results as columns and as a table: a row for each member."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .._policy import StopReason
from .._report import written
from .._tree import aligned, by_path, element_name

# The most rows and columns of a table.
_MOST_MEMBERS, _MOST_COLUMNS = 1_000, 12


def by_element(tree: Any) -> dict[str, np.ndarray]:
    """Returns a column for each element of stacked parameters, by its name."""
    columns = {}
    for path, leaf in by_path(tree).items():
        rows = np.asarray(leaf)
        like = {path: rows[0]}
        for index, column in enumerate(rows.reshape(len(rows), -1).T):
            columns[element_name(like, index)] = column
    return columns


def as_columns(
    values: dict[str, np.ndarray], errors: dict[str, np.ndarray], **others: Any
) -> dict[str, Any]:
    """Joins columns; another one with the name of a parameter has it in brackets."""
    columns: dict[str, Any] = {}
    for name, column in values.items():
        columns[name] = column
        if name in errors:
            columns[f"error[{name}]"] = errors[name]
    taken = set(columns)
    for name, column in others.items():
        columns[f"<{name}>" if name in taken else name] = column
    return columns


def as_table(
    values: dict[str, np.ndarray],
    errors: dict[str, np.ndarray],
    losses: np.ndarray,
    reasons: Sequence[StopReason],
) -> str:
    """Writes a row for each member, and a line about those that failed."""
    names = list(values)[:_MOST_COLUMNS]
    more = len(values) - len(names)
    rest = [f"{more} more"] if more else []
    head = "member", *names, *rest, "best loss", "ended"
    rows: list[Sequence[str]] = [head]
    for index in _shown(len(reasons)):
        if index is None:
            rows.append(["…"] * len(head))
            continue
        own = [_cell(values[n][index], errors.get(n), index) for n in names]
        end = f"{losses[index]:.6g}", reasons[index].in_short
        rows.append([str(index), *own, *("…" for _ in rest), *end])
    return "\n".join([aligned(rows), *_failures(reasons)])


def _shown(size: int) -> Iterator[int | None]:
    """Yields the members that have a row, and `None` for a gap."""
    half = _MOST_MEMBERS // 2
    for index in range(size):
        if size <= _MOST_MEMBERS or not half < index < size - half:
            yield index
        elif index == half + 1:
            yield None


def _cell(value: Any, errors: np.ndarray | None, index: int) -> str:
    if errors is None:
        return f"{value:.6g}"
    error = float(errors[index])
    text, shown = written(float(value), error)
    if math.isinf(error):
        return f"{text} (unconstrained)"
    return f"{text} ± {shown or 'nan'}"


def _failures(reasons: Sequence[StopReason]) -> Iterator[str]:
    failed: dict[StopReason, list[str]] = {}
    for index, reason in enumerate(reasons):
        if reason.is_failure:
            failed.setdefault(reason, []).append(str(index))
    if failed:
        count = sum(map(len, failed.values()))
        said = (f"{', '.join(own)} ({r.in_short})" for r, own in failed.items())
        yield f"{count} of {len(reasons)} failed: {'; '.join(said)}"

"""Parameters over the steps, as lines that share an axis."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .._boundary import Params, nearest_names
from .._fit import FitResult
from .._loop import GRAD_NORM
from .._storage import History
from .._tree import UnknownPathError, element_name, named_leaves, paths
from .axes import as_label, draw_line, drawable

# If there are more lines, they are named by array instead of by element.
_MOST_LABELS = 12
# The most lines of one array.
_MOST_LINES = 200
# Sizes that differ by a larger factor do not share an axis.
_COMPARABLE = 100


class Line(NamedTuple):
    """One element of a parameter, over the steps."""

    group: str
    label: str
    values: np.ndarray
    error: float


def as_history(history: History | FitResult[Any, Any]) -> History:
    """Returns the history of a result; refuses one without steps."""
    found = history.history if isinstance(history, FitResult) else history
    if not len(found):
        raise ValueError(
            "`history` is empty: there is no step to draw. Take some with "
            "`trainer.fit(data, steps=...)`."
        )
    return found


def collect_lines(
    history: History | FitResult[Any, Any], names: Sequence[str], errors: Params
) -> list[Line]:
    """Lists the lines of the named parameters, by default of all."""
    recorded, known = as_history(history), None
    if errors is not None:
        leaves = named_leaves(errors)
        known = {leaf.path: leaf.value for leaf in leaves if leaf.is_parameter}
    if not names:
        names = _default_names(history, recorded, known)
    return [line for name in names for line in _elements(name, recorded[name], known)]


def _default_names(
    history: History | FitResult[Any, Any],
    recorded: History,
    errors: dict[str, Any] | None,
) -> list[str]:
    if errors is not None:
        parameters = list(errors)
    elif isinstance(history, FitResult):
        parameters = paths(history.trainer.params)
    else:
        parameters = [name for name in recorded.records if name != GRAD_NORM]
    names = [name for name in parameters if name in recorded.records]
    if not names:
        raise ValueError(
            "`history` has no parameter to draw. To keep them, pass "
            "`record=vn.paths(trainer.params)` to `fit`."
        )
    return names


def _elements(name: str, rows: np.ndarray, errors: dict[str, Any] | None) -> list[Line]:
    shape = rows.shape[1:]
    found = np.ones(shape) if errors is None else _error(name, shape, errors)
    if np.iscomplexobj(rows):
        parts = {".real": np.real(rows), ".imag": np.imag(rows)}
    else:
        parts = {"": rows}
    size = math.prod(shape)
    shown = np.unique(np.linspace(0, size - 1, min(size, _MOST_LINES)).astype(int))
    count = f"{len(shown)} of {size}" if len(shown) < size else f"{size}"
    group = f"{name} ({count})" if shape else name
    like = {name: rows[0]}
    return [
        Line(
            as_label(group),
            as_label(element_name(like, int(index)) + suffix),
            drawable(part.reshape(len(rows), size)[:, index]),
            float(found.flat[index]),
        )
        for suffix, part in parts.items()
        for index in shown
    ]


def _error(name: str, shape: tuple[int, ...], errors: dict[str, Any]) -> np.ndarray:
    if name not in errors:
        raise UnknownPathError(
            f"`errors` has no {name!r}. {nearest_names(name, list(errors))} Give what "
            "`trainer.standard_errors(batch)` returns, or leave that name out."
        )
    found = np.asarray(errors[name], float)
    if found.shape != shape:
        raise ValueError(
            f"`errors` has the shape {found.shape} at {name!r}, but what was recorded "
            f"has {shape}. Give what `trainer.standard_errors(batch)` returns for the "
            "same model."
        )
    return found


def to_one_scale(lines: list[Line], has_errors: bool) -> tuple[str, list[Line]]:
    """Brings lines to one scale, if need be. Returns its label, and the lines."""
    if has_errors:
        label, units = "in standard errors", [line.error for line in lines]
    else:
        sizes = [size for line in lines if (size := largest(line.values))]
        if not sizes or max(sizes) <= _COMPARABLE * min(sizes):
            return "value", lines
        label, units = "each in its own range", [_range(x.values) or 1 for x in lines]
    return f"from the last value, {label}", [
        line._replace(values=(line.values - _last(line.values)) / unit)
        for line, unit in zip(lines, units, strict=True)
    ]


def largest(values: np.ndarray) -> float:
    return float(np.max(np.abs(values[np.isfinite(values)]), initial=0))


def _range(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.ptp(finite)) if finite.size else 0.0


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else 0.0


def draw_lines(axes: Axes, steps: np.ndarray, lines: list[Line]) -> None:
    """Draws the lines, each with a label, or by array where they are too many."""
    by_group = len(lines) > _MOST_LABELS
    labels = [line.group if by_group else line.label for line in lines]
    order = list(dict.fromkeys(labels))
    cycle = len(plt.rcParams["axes.prop_cycle"])
    firsts: dict[str, Line2D] = {}
    for label, line in zip(labels, lines, strict=True):
        style: dict[str, Any] = {}
        if first := firsts.get(label):
            style = {"color": first.get_color(), "linestyle": first.get_linestyle()}
        elif len(firsts) >= cycle:  # the colours begin again
            style = {"linestyle": ("--", ":", "-.")[len(firsts) // cycle % 3 - 1]}
        if by_group:
            style["linewidth"] = 0.6 * plt.rcParams["lines.linewidth"]
        (drawn,) = draw_line(axes, steps, line.values, **style)
        if label not in firsts and len(firsts) < _MOST_LABELS:
            drawn.set_label(label)
        firsts.setdefault(label, drawn)
    if len(order) > _MOST_LABELS:
        axes.plot([], [], " ", label=f"and {len(order) - _MOST_LABELS} more")

"""Axes, scales, legends and labels of pictures."""

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

# If there are more rows, they are named by array instead of by element.
_MOST_TICKS = 40
# With more points matplotlib is slow to find the best place of a legend.
_MOST_POINTS = 50_000
# The margins that matplotlib adds to larger numbers overflow.
_LARGEST = 1e150
# The largest ratio of sizes on a symmetric logarithmic axis.
_DEEPEST = 1e15


def prepare(ax: Axes | None, size: tuple[float, float]) -> tuple[Axes, bool]:
    """Returns the axes, new ones if there are none, and whether they are empty."""
    if ax is None:
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    return ax, not ax.has_data()


def drawable(values: np.ndarray) -> np.ndarray:
    """Clips the huge numbers of a diverging fit; infinity stays."""
    floats = np.asarray(values, float)
    return np.where(np.isinf(floats), floats, np.clip(floats, -_LARGEST, _LARGEST))


def add_legend(axes: Axes, edgecolor: str = "none") -> None:
    """Adds a legend, if anything has a label; beside markers it needs an edge."""
    names = axes.get_legend_handles_labels()[1]
    points = sum(np.size(line.get_xdata()) for line in axes.lines)
    if names:
        axes.legend(
            loc="best" if points < _MOST_POINTS else "upper right",
            ncols=2 if len(names) > 6 else 1,
            frameon=True,
            framealpha=0.8,
            edgecolor=edgecolor,
        )


def draw_line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, **style: Any
) -> list[Line2D]:
    """Draws one line, with a dot at a point that has a gap on either side."""
    finite = np.pad(np.isfinite(values), 1)
    alone = np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])
    # A style with a marker of its own has one at each point.
    bare = alone.size and "marker" not in style
    dots = {"marker": ".", "markevery": alone.tolist()} if bare else {}
    return axes.plot(steps, drawable(values), **dots, **style)


def choose_scale(losses: np.ndarray) -> tuple[str, dict[str, float]]:
    """Chooses the scale of an axis for finite losses: its name and its options."""
    sizes = np.abs(losses[losses != 0])
    if not sizes.size or sizes.max() <= 10 * sizes.min() or losses.max() <= 0:
        return "linear", {}
    if losses.min() > 0:
        return "log", {}
    below = -losses.min()
    lesser, greater = sorted((losses.max(), below))
    threshold = max(lesser / 10 if lesser > 0 else sizes.min(), greater / _DEEPEST)
    # If both sides are of similar size, a linear axis shows them.
    if greater <= 1_000 * threshold:
        return "linear", {}
    return "symlog", {"linthresh": float(threshold)}


def choose_ticks(names: Sequence[str], room: float) -> dict[int | float, str]:
    """Maps positions along elements to labels; `room` is for each."""
    size = len(names)
    if size <= _MOST_TICKS and room > 4:
        return {index: as_label(name) for index, name in enumerate(names)}
    # The last brackets are those of the place in an array: a key may have others.
    array = lambda name: name.rpartition("[")[0] if name.endswith("]") else name
    groups = itertools.groupby(names, array)
    arrays = [(path, len(list(own))) for path, own in groups]
    ends = np.cumsum([count for _, count in arrays]).tolist()
    ticks: dict[float, str] = {}
    # The larger arrays first: where there is no room, small ones have no label.
    for index in sorted(range(len(arrays)), key=lambda index: -arrays[index][1]):
        path, count = arrays[index]
        centre = ends[index] - (count + 1) / 2
        if all(abs(centre - other) >= size / _MOST_TICKS for other in ticks):
            ticks[centre] = as_label(path)
    return dict(sorted(ticks.items()))


def as_label(name: str) -> str:
    # Matplotlib reads dollars as mathematics, and hides labels that start with `_`.
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown

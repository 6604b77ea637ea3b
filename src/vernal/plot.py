"""Pictures of a fit: its loss, its parameters, and what the data say of them.

It needs matplotlib, and `import vernal` does not import it: `import vernal.plot`.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    raise ImportError(
        "`vernal.plot` draws with matplotlib, which is not installed: "
        "`pip install vernal[plot]`."
    ) from None

from ._boundary import Params, checked, nearest_names
from ._fit import FitResult
from ._loop import GRAD_NORM
from ._projection import EigenProjector
from ._storage import History
from ._tree import (
    UnknownPathError,
    by_path,
    element_name,
    named_leaves,
    paths,
    ravel_size,
)

# Beyond these, lines and rows are named by array and no longer by element.
_MOST_LABELS = 12
_MOST_TICKS = 40
# The lines that are drawn of one array.
_MOST_LINES = 200
# Points among which matplotlib looks for the best place of a legend in good time.
_MOST_POINTS = 50_000
# The margins that matplotlib leaves around larger numbers overflow.
_LARGEST = 1e150
# What a symmetric axis shows of the way to zero.
_DEEPEST = 1e15
# Sizes further apart than this do not share an axis.
_COMPARABLE = 100


@checked
def history(history: History | FitResult[Any, Any], *, ax: Axes | None = None) -> Axes:
    """Draws the loss over the steps, the validation, and the lowest so far of these.

    The axis of the loss is logarithmic where the losses are positive and spread over
    more than a decade, and symmetrically so where they cross zero on the way from
    large to small. Axes that hold a picture already keep theirs.

    Steps whose loss is not finite are marked at the bottom. A step that was skipped
    for its gradient alone has a finite loss, and no mark:
    [`vernal.Trainer.nan_report`][] counts those.

    ```python
    import vernal.plot

    vernal.plot.history(trainer.fit(data, steps=500))
    ```

    **Arguments:**

    - `history`: a [`vernal.History`][], or the [`vernal.FitResult`][] that holds it.
    - `ax`: the axes to draw on, those of a new figure by default.

    **Returns:**

    The axes.

    **Raises:**

    A `ValueError` if the history is empty.
    """
    recorded = _recorded(history)
    steps, losses = recorded.steps, _drawable(recorded.loss)
    finite = np.isfinite(losses)
    axes, is_new = _prepare(ax, (6.4, 3.6))
    values = np.where(finite, losses, np.nan)
    _line(axes, steps, values, label="loss")
    scores, best = _drawable(recorded.validation), (steps, values)
    if scores.size:
        best = recorded.validation_steps, np.where(np.isfinite(scores), scores, np.nan)
        _line(axes, *best, label="validation")
    if np.isfinite(best[1]).any():
        lowest = np.fmin.accumulate(best[1])
        # Beneath the others, which it would hide where they go down all the way.
        thin = {"linewidth": 0.6 * plt.rcParams["lines.linewidth"], "zorder": 1.9}
        _line(axes, best[0], lowest, label="lowest so far", ds="steps-post", **thin)
    if not finite.all():
        axes.plot(
            steps[~finite],
            np.zeros(np.count_nonzero(~finite)),
            linestyle="",
            marker=2,  # a tick, upwards
            color="crimson",
            markersize=6,
            transform=axes.get_xaxis_transform(),
            label=f"not finite: {np.count_nonzero(~finite)} of {len(losses)}",
        )
    if is_new:
        scale, options = _loss_scale(
            np.concatenate([losses[finite], best[1][np.isfinite(best[1])]])
        )
        axes.set_yscale(scale, **options)
    axes.set(xlabel="step", ylabel="loss")
    _legend(axes)
    return axes


@checked
def trajectories(
    history: History | FitResult[Any, Any],
    *names: str,
    errors: Params = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws recorded parameters over the steps, a line for each element.

    With `errors`, each line is the distance from the element's last value in standard
    errors, so that parameters of any units share the axis. Without, lines are the
    values as they are, unless they differ in size by more than a factor of 100: each
    is then the distance from its last value in units of its own range.

    ```python
    result = trainer.fit(data, steps=500, record=vn.paths(trainer.params))
    errors = result.trainer.standard_errors(data)
    vernal.plot.trajectories(result, "flux", "position", errors=errors)
    ```

    **Arguments:**

    - `history`: a [`vernal.History`][], or the [`vernal.FitResult`][] that holds it.
    - `*names`: the paths of recorded parameters. By default all of them, as far as
        they have `errors`. (A history by itself does not tell parameters from
        metrics, and all but the norm of the gradient is drawn.)
    - `errors`: a tree of standard errors, as [`vernal.Trainer.standard_errors`][]
        returns. An element whose error is infinite is named, and not drawn.
    - `ax`: the axes to draw on, those of a new figure by default.

    **Returns:**

    The axes. More than a dozen lines are labelled by array, and of an array of more
    than 200 elements as many are drawn, evenly spaced.

    **Raises:**

    An `UnknownPathError` if the history or `errors` has no such name; a `ValueError`
    if the history is empty, or `errors` has another shape.
    """
    recorded = _recorded(history)
    known = None if errors is None else _by_path(errors)
    chosen = names or _default_names(history, recorded, known)
    lines = [line for name in chosen for line in _elements(name, recorded[name], known)]
    unknown = [line.label for line in lines if not 0 < line.error < math.inf]
    label, drawn = _comparable(
        [line for line in lines if 0 < line.error < math.inf], errors is not None
    )

    axes, is_new = _prepare(ax, (6.4, 4.0))
    _label_lines(axes, recorded.steps, drawn)
    if unknown:
        more = ", ..." if len(unknown) > 3 else ""
        text = f"no finite error: {', '.join(unknown[:3])}{more}"
        axes.plot([], [], " ", label=text)
    if errors is not None:
        axes.axhspan(-1, 1, color="0.5", alpha=0.15, linewidth=0, zorder=0)
        farthest = max((_size(line.values) for line in drawn), default=0)
        if is_new and farthest > 10:
            axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="step", ylabel=label)
    _legend(axes)
    return axes


@checked
def spectrum(projector: EigenProjector, *, ax: Axes | None = None) -> Axes:
    """Draws the eigenvalues of a projector, from the best constrained direction on.

    Null directions have a colour of their own. Those whose eigenvalue is lost in
    rounding, zero or negative, are triangles at the bottom. Of
    [`vernal.EigenProjector.from_matvec`][] the leading eigenvalues are drawn, which
    are those it knows.

    **Arguments:**

    - `projector`: a [`vernal.EigenProjector`][].
    - `ax`: the axes to draw on, those of a new figure by default.

    **Returns:**

    The axes, with the condition number in the legend.
    """
    _refuse_batch(projector)
    rounding = float(jnp.finfo(projector.eigenvalues.dtype).eps)
    values, rank = np.asarray(projector.eigenvalues, float), projector.rank
    index, size = np.arange(1, len(values) + 1), ravel_size(projector.origin)
    # Below rounding an eigenvalue has no size: its decades are not worth an axis.
    is_null = index > rank
    is_lost = is_null & (values <= values[0] * rounding)

    axes, _ = _prepare(ax, (6.4, 3.6))
    axes.set_yscale("log")
    if rank:
        what = "constrained" if len(values) == size else f"leading of {size}"
        condition = float(projector.condition_number)
        label = f"{rank} {what}, condition number {condition:.3g}"
        axes.plot(index[~is_null], values[~is_null], "o", ms=4, color="C0", label=label)
    null = is_null & ~is_lost
    if null.any():
        label = f"{np.count_nonzero(null)} null"
        axes.plot(index[null], values[null], "o", ms=4, color="C1", label=label)
    if is_lost.any():
        label = f"{np.count_nonzero(is_lost)} null, no larger than rounding"
        bottom = np.min(values[~is_lost], initial=1) / 10
        places = np.full(np.count_nonzero(is_lost), bottom)
        axes.plot(index[is_lost], places, "v", ms=5, color="C1", label=label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set(xlabel="direction", ylabel="eigenvalue of the scaled matrix")
    _legend(axes)
    return axes


@checked
def correlation(projector: EigenProjector, *, ax: Axes | None = None) -> Axes:
    """Draws how the errors of the parameters are correlated, from -1 to 1.

    Rows of elements whose variance is infinite, since the data do not constrain them,
    or not known, are grey. Between the blocks of
    [`vernal.EigenProjector.from_blocks`][] the correlation is zero, as assumed there.

    **Arguments:**

    - `projector`: a [`vernal.EigenProjector`][].
    - `ax`: the axes to draw on, those of a new figure by default.

    **Returns:**

    The axes. Up to 40 elements are named one by one; more of them, or in axes too small
    for that, by array.
    """
    _refuse_batch(projector)
    covariance = np.asarray(projector.covariance(), float)
    variance = np.diag(covariance)
    deviation = np.sqrt(np.where(np.isfinite(variance), variance, np.nan))
    # Divided twice, so that no number carries the square of a unit.
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = covariance / deviation[:, None] / deviation
    matrix = np.ma.masked_invalid(ratio)

    side = float(np.clip(3 + 0.2 * len(matrix), 4, 9))
    axes, _ = _prepare(ax, (side, 0.85 * side))
    colours = plt.get_cmap("RdBu_r").with_extremes(bad="0.8")
    image = axes.imshow(matrix, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
    has_gap = bool(np.ma.getmaskarray(matrix).any())
    label = "correlation (grey: no finite error)" if has_gap else "correlation"
    axes.figure.colorbar(image, ax=axes, label=label)
    box = axes.get_window_extent()
    room = 0.9 * min(box.width, box.height) / axes.figure.dpi * 72 / len(matrix)
    is_roomy = len(matrix) <= _MOST_TICKS and bool(room > 4)
    ticks = _ticks(projector.origin, is_roomy)
    font = min(plt.rcParams["font.size"], room) if len(ticks) == len(matrix) else None
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=font)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=font)
    axes.grid(False)
    return axes


def _prepare(ax: Axes | None, size: tuple[float, float]) -> tuple[Axes, bool]:
    """Returns the axes, new ones if need be, and whether nothing is on them yet."""
    if ax is None:
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    return ax, not ax.has_data()


def _recorded(history: History | FitResult[Any, Any]) -> History:
    found = history.history if isinstance(history, FitResult) else history
    if not len(found):
        raise ValueError(
            "`history` is empty: there is no step to draw. Take some with "
            "`trainer.fit(data, steps=...)`."
        )
    return found


def _drawable(values: np.ndarray) -> np.ndarray:
    """Cuts off what a fit passes through when it diverges; infinity stays."""
    floats = np.asarray(values, float)
    return np.where(np.isinf(floats), floats, np.clip(floats, -_LARGEST, _LARGEST))


def _legend(axes: Axes) -> None:
    """Names what there is to name, out of the way of the lines if it can be found."""
    names = axes.get_legend_handles_labels()[1]
    points = sum(np.size(line.get_xdata()) for line in axes.lines)
    if names:
        axes.legend(
            loc="best" if points < _MOST_POINTS else "upper right",
            ncols=2 if len(names) > 6 else 1,
            frameon=True,
            framealpha=0.8,
            edgecolor="none",
        )


def _line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, **style: Any
) -> list[Line2D]:
    """Draws one line; a point with a gap on either side gets a dot, to be seen."""
    there = np.pad(np.isfinite(values), 1)
    alone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])
    dots = {"marker": ".", "markevery": alone.tolist()} if alone.size else {}
    return axes.plot(steps, _drawable(values), **dots, **style)


def _loss_scale(losses: np.ndarray) -> tuple[str, dict[str, float]]:
    """Chooses the scale that shows finite losses best: its name and its options."""
    sizes = np.abs(losses[losses != 0])
    if not sizes.size or sizes.max() <= 10 * sizes.min() or losses.max() <= 0:
        return "linear", {}
    if losses.min() > 0:
        return "log", {}
    below = -losses.min()
    lesser, greater = sorted((losses.max(), below))
    threshold = max(lesser / 10 if lesser > 0 else sizes.min(), greater / _DEEPEST)
    # Where both sides are of a size, zero is in nobody's way.
    if greater <= 1_000 * threshold:
        return "linear", {}
    return "symlog", {"linthresh": float(threshold)}


class _Line(NamedTuple):
    """One element of a parameter, over the steps."""

    group: str
    label: str
    values: np.ndarray
    error: float


def _by_path(tree: Params) -> dict[str, Any]:
    return {leaf.path: leaf.value for leaf in named_leaves(tree) if leaf.is_parameter}


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


def _elements(
    name: str, rows: np.ndarray, errors: dict[str, Any] | None
) -> list[_Line]:
    """Lists the lines of one parameter."""
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
        _Line(
            _text(group),
            _text(element_name(like, int(index)) + suffix),
            _drawable(part.reshape(len(rows), size)[:, index]),
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


def _comparable(lines: list[_Line], has_errors: bool) -> tuple[str, list[_Line]]:
    """Brings lines to one scale; returns what to call it, too."""
    if has_errors:
        lines = [
            line._replace(values=(line.values - _last(line.values)) / line.error)
            for line in lines
        ]
        return "from the last value, in standard errors", lines
    sizes = [size for line in lines if (size := _size(line.values))]
    if not sizes or max(sizes) <= _COMPARABLE * min(sizes):
        return "value", lines
    lines = [
        line._replace(
            values=(line.values - _last(line.values)) / (_range(line.values) or 1)
        )
        for line in lines
    ]
    return "from the last value, each in its own range", lines


def _size(values: np.ndarray) -> float:
    return float(np.max(np.abs(values[np.isfinite(values)]), initial=0))


def _range(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.ptp(finite)) if finite.size else 0.0


def _last(values: np.ndarray) -> float:
    """The last finite value."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else 0.0


def _label_lines(axes: Axes, steps: np.ndarray, lines: list[_Line]) -> None:
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
        elif len(firsts) >= cycle:  # the colours begin anew
            style = {"linestyle": ("--", ":", "-.")[len(firsts) // cycle % 3 - 1]}
        if by_group:
            style["linewidth"] = 0.6 * plt.rcParams["lines.linewidth"]
        (drawn,) = _line(axes, steps, line.values, **style)
        if label not in firsts and len(firsts) < _MOST_LABELS:
            drawn.set_label(label)
        firsts.setdefault(label, drawn)
    if len(order) > _MOST_LABELS:
        axes.plot([], [], " ", label=f"and {len(order) - _MOST_LABELS} more")


def _ticks(params: Params, one_by_one: bool) -> dict[int | float, str]:
    """Maps places along the elements of `params` to the names that stand there."""
    size = ravel_size(params)
    if one_by_one:
        return {i: _text(element_name(params, i)) for i in range(size)}
    leaves = by_path(params)
    ends = np.cumsum([leaf.size for _, leaf in leaves]).tolist()
    ticks: dict[float, str] = {}
    # The larger arrays first: where there is no room it is the small that go without.
    for index in sorted(range(len(leaves)), key=lambda index: -leaves[index][1].size):
        path, leaf = leaves[index]
        centre = ends[index] - (leaf.size + 1) / 2
        if all(abs(centre - other) >= size / _MOST_TICKS for other in ticks):
            ticks[centre] = _text(path)
    return dict(sorted(ticks.items()))


def _text(name: str) -> str:
    """A path as a label: matplotlib would set dollars, and leave out underscores."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _refuse_batch(projector: EigenProjector) -> None:
    if projector.eigenvalues.ndim != 1:
        raise ValueError(
            "`projector` is a batch of projectors, as `jax.vmap` makes them, and a "
            "picture shows one: `jax.tree.map(lambda x: x[0], projector)`."
        )

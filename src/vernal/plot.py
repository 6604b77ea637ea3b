"""Pictures of a fit: its loss, its parameters and their errors, its residuals.

Each function draws on the axes `ax`, by default those of a new figure, and returns
them. They need matplotlib. `import vernal` does not import this module; write
`import vernal.plot`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    raise ImportError(
        "`vernal.plot` draws with matplotlib, which is not installed: "
        "`pip install vernal[plot]`."
    ) from None

from ._boundary import Params, in_few_words
from ._fit import FitResult
from ._plot import (
    add_legend,
    as_history,
    as_label,
    as_numbers,
    choose_scale,
    choose_ticks,
    collect_lines,
    collect_points,
    draw_line,
    draw_lines,
    drawable,
    drawn,
    goodness,
    largest,
    prepare,
    to_one_scale,
)
from ._profile import Profile, plane, probability
from ._projection import EigenProjector
from ._report import Report
from ._solve import Solver
from ._step import require_one
from ._storage import History
from ._trainer import Trainer
from ._tree import element_name, ravel_size


@drawn
def history(history: History | FitResult[Any, Any], *, ax: Axes | None = None) -> Axes:
    """Draws the loss over the steps, the validation loss, and the lowest value so far.

    The scale is logarithmic if all losses are positive and span more than a decade. It
    is logarithmic on both sides of zero (`"symlog"`) if large losses fall and cross
    zero. Axes that already hold a picture keep their scale.

    Steps with a non-finite loss are marked at the bottom. A step that was skipped
    because of its gradient has a finite loss and no mark;
    [`vernal.Trainer.nan_report`][] counts those steps.

    ```python
    import vernal.plot

    vernal.plot.history(trainer.fit(data, steps=500))
    ```

    **Raises:**

    - `ValueError`: if the history is empty.
    """
    recorded = as_history(history)
    steps, losses = recorded.steps, drawable(recorded.loss)
    finite = np.isfinite(losses)
    axes, is_new = prepare(ax, (6.4, 3.6))
    values = np.where(finite, losses, np.nan)
    draw_line(axes, steps, values, label="loss")
    scores, best = drawable(recorded.validation), (steps, values)
    if scores.size:
        best = recorded.validation_steps, np.where(np.isfinite(scores), scores, np.nan)
        draw_line(axes, *best, label="validation")
    if np.isfinite(best[1]).any():
        lowest = np.fmin.accumulate(best[1])
        # Beneath the others: it would hide a loss that never rises.
        thin = {"linewidth": 0.6 * plt.rcParams["lines.linewidth"], "zorder": 1.9}
        draw_line(axes, best[0], lowest, label="lowest so far", ds="steps-post", **thin)
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
        scale, options = choose_scale(
            np.concatenate([losses[finite], best[1][np.isfinite(best[1])]])
        )
        axes.set_yscale(scale, **options)
    axes.set(xlabel="step", ylabel="loss")
    add_legend(axes)
    return axes


@drawn
def trajectories(
    history: History | FitResult[Any, Any],
    *names: str,
    errors: Params = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws recorded parameters over the steps, a line for each element.

    With `errors`, each line shows the distance from the element's last value in
    standard errors, so that parameters of any units share the axis. Without `errors`,
    lines show the values themselves. If these differ in size by more than a factor of
    100, each line shows the distance from its last value in units of its range.

    ```python
    result = trainer.fit(data, steps=500, record=vn.paths(trainer.params))
    errors = result.trainer.standard_errors(data)
    vernal.plot.trajectories(result, "flux", "position", errors=errors)
    ```

    More than 12 lines are labelled by array. Of an array with more than 200
    elements, 200 are drawn, evenly spaced.

    **Arguments:**

    - `history`: a [`vernal.History`][], or a [`vernal.FitResult`][] that has one.
    - `*names`: the paths of recorded parameters. By default all of them; with `errors`,
        all that have one. (A [`vernal.History`][] does not distinguish parameters from
        metrics: by default everything but the norm of the gradient is drawn.)
    - `errors`: a tree of standard errors, as [`vernal.Trainer.standard_errors`][]
        returns it. An element whose error is infinite is named and not drawn.

    **Raises:**

    - `UnknownPathError`: if the history or `errors` lacks one of the names.
    - `ValueError`: if the history is empty, or the shape of `errors` does not match.
    """
    lines = collect_lines(history, names, errors)
    unknown = [line.label for line in lines if not 0 < line.error < math.inf]
    label, drawn = to_one_scale(
        [line for line in lines if 0 < line.error < math.inf], errors is not None
    )

    axes, is_new = prepare(ax, (6.4, 4.0))
    draw_lines(axes, as_history(history).steps, drawn)
    if unknown:
        more = ", ..." if len(unknown) > 3 else ""
        text = f"no finite error: {', '.join(unknown[:3])}{more}"
        axes.plot([], [], " ", label=text)
    if errors is not None:
        axes.axhspan(-1, 1, color="0.5", alpha=0.15, linewidth=0, zorder=0)
        farthest = max((largest(line.values) for line in drawn), default=0)
        if is_new and farthest > 10:
            axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="step", ylabel=label)
    add_legend(axes)
    return axes


@drawn
def spectrum(projector: EigenProjector, *, ax: Axes | None = None) -> Axes:
    """Draws the eigenvalues of a projector, the best constrained direction first.

    Null directions have their own colour. Those whose eigenvalue is zero, negative or
    no larger than rounding are triangles at the bottom. A projector made by
    [`vernal.EigenProjector.from_matvec`][] knows only the leading eigenvalues, and
    these are drawn. The legend has the condition number.
    """
    _refuse_batch(projector)
    rounding = float(jnp.finfo(projector.eigenvalues.dtype).eps)
    values, rank = np.asarray(projector.eigenvalues, float), projector.rank
    index, size = np.arange(1, len(values) + 1), ravel_size(projector.origin)
    # Below rounding the size of an eigenvalue means nothing.
    is_null = index > rank
    is_lost = is_null & (values <= values[0] * rounding)

    axes, _ = prepare(ax, (6.4, 3.6))
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
    # Without an edge its markers look like eigenvalues.
    add_legend(axes, edgecolor="0.8")
    return axes


@drawn
def correlation(projector: EigenProjector | Report, *, ax: Axes | None = None) -> Axes:
    """Draws the correlation matrix of the parameters, from -1 to 1.

    Rows of elements are grey if their variance is infinite, because the data do not
    constrain them, or not known. Between blocks
    ([`vernal.EigenProjector.from_blocks`][]) the correlation is zero by assumption.

    Up to 40 elements are named one by one. If there are more, or the axes are too
    small, arrays are named instead.

    **Arguments:**

    - `projector`: a [`vernal.EigenProjector`][]; or a [`vernal.Report`][], for its free
        elements.
    """
    if isinstance(projector, Report):
        names = [row.name for row in projector.parameters if row.is_free]
        ratio = projector.correlation_matrix
    else:
        _refuse_batch(projector)
        origin, covariance = projector.origin, np.asarray(projector.covariance(), float)
        names = [element_name(origin, index) for index in range(len(covariance))]
        variance = np.diag(covariance)
        deviation = np.sqrt(np.where(np.isfinite(variance), variance, np.nan))
        # Divided twice: the square of a unit may overflow.
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = covariance / deviation[:, None] / deviation
    matrix = np.ma.masked_invalid(ratio)

    side = float(np.clip(3 + 0.2 * len(matrix), 4, 9))
    axes, _ = prepare(ax, (side, 0.85 * side))
    colours = plt.get_cmap("RdBu_r").with_extremes(bad="0.8")
    image = axes.imshow(matrix, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
    has_gap = bool(np.ma.getmaskarray(matrix).any())
    label = "correlation (grey: no finite error)" if has_gap else "correlation"
    axes.figure.colorbar(image, ax=axes, label=label)
    box = axes.get_window_extent()
    room = 0.9 * min(box.width, box.height) / axes.figure.dpi * 72 / len(matrix)
    ticks = choose_ticks(names, room)
    font = min(plt.rcParams["font.size"], room) if len(ticks) == len(matrix) else None
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=font)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=font)
    axes.grid(False)
    return axes


@drawn
def band(
    trainer: Trainer[Any, Any],
    fn: Callable[..., Any],
    batch: Any,
    x: Any,
    *,
    errors: float | int = 1,
    scale_errors: bool = False,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws a function of the model as a line, in a band of its standard error.

    ```python
    vernal.plot.band(trainer, lambda model: model(x), batch, x, ax=axes)
    ```

    The error is that of [`vernal.Trainer.propagate`][]. Where it is infinite or NaN,
    there is no band.

    **Arguments:**

    - `trainer`: a [`vernal.Trainer`][], after its fit.
    - `fn`: a function of the model, which returns a value for each element of `x`.
    - `batch`: all of the data.
    - `x`: where the values belong, a vector.
    - `errors`: the half-width of the band in standard errors.
    - `scale_errors`: as for [`vernal.Trainer.report`][].
    - `label`: the label of the line.

    **Raises:**

    - `ValueError`: if `x` is not a vector, or `fn` does not return one of its length.
    - as [`vernal.Trainer.propagate`][].
    """
    places = as_numbers(x)
    if places is None or places.ndim != 1 or not places.size:
        raise ValueError(f"`x` is {in_few_words(x)}, but must be a vector of numbers.")
    if not 0 < errors < math.inf:
        raise ValueError(
            f"`errors` is {in_few_words(errors)}, but must be a positive number."
        )
    value, error = trainer.propagate(fn, batch, scale_errors=scale_errors)
    if np.shape(value) != places.shape:
        shape = getattr(value, "shape", "another structure")
        raise ValueError(
            f"`fn` returned an array of shape {shape}, but must return one of the "
            f"shape of `x`, {places.shape}."
        )
    middle, half = drawable(np.asarray(value)), errors * np.asarray(error, float)
    half = np.where(np.isfinite(half), half, np.nan)
    axes, _ = prepare(ax, (6.4, 3.6))
    (line,) = draw_line(axes, places, middle, label=label)
    axes.fill_between(
        places,
        drawable(middle - half),
        drawable(middle + half),
        color=line.get_color(),
        alpha=0.25,
        linewidth=0,
    )
    add_legend(axes)
    return axes


@drawn
def residuals(
    trainer: Trainer[Any, Any],
    batch: Any,
    x: Any = None,
    *,
    scale_errors: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws the residuals as points, and says how good the fit is.

    ```python
    vernal.plot.residuals(trainer, batch, x)
    ```

    The title of empty axes has chi-squared, or the deviance of counts, and the p-value
    of [`vernal.Trainer.report`][]. The grey band is one error bar wide to both sides.
    Of a likelihood the points are its deviance residuals, without missing data (where
    it has a mask, `where`); of complex residuals, both parts.

    **Arguments:**

    - `trainer`: a [`vernal.Trainer`][] with `residuals`.
    - `batch`: all of the data.
    - `x`: where the residuals belong, an array that broadcasts to theirs; of several
        arrays or likelihoods, such as `{"counts": ..., "image": ...}`, a tree like
        that. By default the index of each.
    - `scale_errors`: as for [`vernal.Trainer.report`][]: divides the residuals by the
        root of the reduced chi-squared.

    **Raises:**

    - `TypeError`: if the class defines no `residuals`.
    - `ValueError`: if `x` is not like the residuals.
    - as [`vernal.Trainer.report`][].
    """
    require_one(trainer, "residuals")
    points = list(collect_points(trainer, batch, x))
    report = trainer.report(batch, scale_errors=scale_errors)
    axes, is_new = prepare(ax, (6.4, 3.6))
    for label, places, values in points:
        heights = drawable(values / report.error_scale)
        axes.plot(places, heights, ".", label=label or None)
    if is_new:
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.axhspan(-1, 1, color="0.5", alpha=0.15, linewidth=0, zorder=0)
        axes.set(ylabel="residual", title=goodness(report))
        if x is None:
            axes.set_xlabel("index")
    add_legend(axes)
    return axes


@drawn
def profile(profile: Profile[Any], *, ax: Axes | None = None) -> Axes:
    r"""Draws the likelihood along one parameter, and the parabola of its error.

    Lines at $\Delta\chi^2 = 1$ and $4$ show one and two standard errors. Where the
    solver found no minimum there is a gap.

    ```python
    vernal.plot.profile(trainer.profile(solver, batch, "power"))
    ```
    """
    axes, is_new = prepare(ax, (4.8, 3.6))
    order = np.argsort(profile.values)
    values, delta = profile.values[order], drawable(profile.delta[order])
    known = np.where(profile.converged[order] & np.isfinite(delta), delta, np.nan)
    draw_line(axes, values, known, label="profile likelihood", marker=".")
    if 0 < profile.error < math.inf:
        fine = np.linspace(values[0], values[-1], 201)
        parabola = ((fine - profile.value) / profile.error) ** 2
        draw_line(axes, fine, parabola, label="standard error", color="0.5", ls="--")
    for level in (1, 4):
        axes.axhline(level, color="0.7", linewidth=0.8, zorder=0)
    if is_new:
        axes.set_ylim(bottom=min(0.0, float(np.nanmin(known, initial=0))))
    axes.set(xlabel=as_label(profile.name), ylabel=r"$\Delta\chi^2$")
    add_legend(axes)
    return axes


@drawn
def contour(
    trainer: Trainer[Any, Any],
    solver: Solver,
    batch: Any,
    first: str,
    second: str,
    *,
    levels: Sequence[float] | np.ndarray | float = (0.683, 0.954),
    scale_errors: bool = False,
    ax: Axes | None = None,
) -> Axes:
    r"""Draws the regions of two parameters by profile likelihood.

    On each contour $\Delta\chi^2$ is a quantile of $\chi^2$ with two degrees of
    freedom, with all other parameters at their best. The cross marks the minimum. Of a
    region that is open, as where the data know only a sum, a part is drawn, and a
    warning names the sides.

    ```python
    vernal.plot.contour(trainer, solver, batch, "mean", "power")
    ```

    **Arguments:**

    - `trainer`: a [`vernal.Trainer`][], at a minimum.
    - `solver`, `batch`: as for [`vernal.Trainer.profile`][].
    - `first`, `second`: the names of the elements on the axes.
    - `levels`: the probabilities of the regions, or that of one.
    - `scale_errors`: as for [`vernal.Trainer.profile`][].

    **Raises:**

    - as [`vernal.Trainer.intervals`][].
    - `ValueError`: if a level is not between 0 and 1.
    """
    given = levels if isinstance(levels, Sequence) else np.atleast_1d(levels)
    shares = sorted({probability(level, "levels") for level in given})
    if not shares:
        raise ValueError("`levels` is empty: there is no contour to draw.")
    require_one(trainer, "contour")
    quantiles = [-2 * math.log1p(-share) for share in shares]
    names, most = (first, second), quantiles[-1]
    found = plane(trainer, solver, batch, names, most, scale_errors)
    axes, _ = prepare(ax, (4.8, 4.0))
    (cross,) = axes.plot(*found.best, "+")
    # The root is nearly linear between two values.
    root = np.sqrt(np.maximum(np.ma.masked_invalid(found.delta), 0))
    colour, edges = cross.get_color(), np.sqrt(quantiles)
    styles = [("-", "--", ":", "-.")[index % 4] for index in range(len(shares))]
    axes.contour(found.x, found.y, root, levels=edges, colors=colour, linestyles=styles)
    for share, style in zip(shares, styles, strict=True):
        axes.plot([], [], style, color=colour, label=f"{100 * share:.4g} %")
    axes.set(xlabel=as_label(found.names[0]), ylabel=as_label(found.names[1]))
    add_legend(axes)
    return axes


def _refuse_batch(projector: EigenProjector) -> None:
    if projector.eigenvalues.ndim != 1:
        raise ValueError(
            "`projector` is a batch of projectors, as `jax.vmap` returns it, and a "
            "picture shows one: `jax.tree.map(lambda x: x[0], projector)`."
        )

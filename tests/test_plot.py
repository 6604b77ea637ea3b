"""`vernal.plot`: what is on the pictures, and what they are not to do."""

import contextlib
import dataclasses
import functools
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import optimistix as optx
import pytest
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator

import vernal as vn
import vernal.plot
from models import GaussianFit, LineFit, gaussian, gaussian_batch, line, line_batch

NAN, INF = np.nan, np.inf


@pytest.fixture
def laid_out():
    """Has Matplotlib find room, and ticks of its own: both take it longest."""


@pytest.fixture(autouse=True)
def pictures(request):
    """Draws every figure in full, with nothing shown and nothing left behind."""
    plt.switch_backend("Agg")
    before = matplotlib.rcParams.copy()
    yield
    try:
        for figure in map(plt.figure, plt.get_fignums()):
            if "laid_out" not in request.fixturenames:
                figure.set_layout_engine("none")
                for axis in (
                    axis for ax in figure.axes for axis in ax._axis_map.values()
                ):
                    if not isinstance(axis.get_major_locator(), FixedLocator):
                        axis.set_ticks([])
                        axis.set_ticks([], minor=True)
            figure.canvas.draw()
    finally:
        plt.close("all")
    assert matplotlib.rcParams == before


def recorded(loss=(1.0,), /, **records):
    """A history by hand; `__` in a name stands for a dot."""
    rows = {name.replace("__", "."): np.asarray(v) for name, v in records.items()}
    count = len(next(iter(rows.values()))) if rows else len(loss)
    losses = np.resize(np.asarray(loss, float), count)
    return vn.History(np.arange(count), losses, rows)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def curves(ax):
    """The lines with points on them, by label."""
    return {line.get_label(): line for line in ax.lines if np.size(line.get_xdata())}


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def is_alone_dotted(line):
    return line.get_marker() == "." and list(line.get_markevery())


# --- the loss ---


def test_history_has_the_validation_and_its_lowest():
    steps, scores = np.array([2, 4]), np.array([7.0, np.nan])
    history = vn.History(np.arange(5), np.full(5, 2.0), {}, scores, steps)
    loss, validation, lowest = vernal.plot.history(history).lines
    np.testing.assert_array_equal(validation.get_xdata(), steps)
    np.testing.assert_array_equal(validation.get_ydata(), scores)
    np.testing.assert_array_equal(lowest.get_ydata(), [7, 7])
    np.testing.assert_array_equal(loss.get_ydata(), np.full(5, 2.0))


def test_history_has_the_loss_and_the_lowest():
    ax = vernal.plot.history(recorded((5.0, 3.0, 4.0, 2.0, 6.0)))
    loss, lowest = ax.lines
    np.testing.assert_array_equal(loss.get_xdata(), range(5))
    np.testing.assert_array_equal(loss.get_ydata(), [5, 3, 4, 2, 6])
    np.testing.assert_array_equal(lowest.get_ydata(), [5, 3, 3, 2, 2])
    assert lowest.get_linewidth() < loss.get_linewidth()
    assert legend(ax) == ["loss", "lowest so far"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss")
    assert ax.figure.get_layout_engine() is not None


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ((5.0, 3.0, 1.0), "linear"),
        ((5.0, 0.5), "linear"),
        ((5.0, 0.4), "log"),
        ((1e9, 1e-9), "log"),
        ((1e9, NAN, 1.0, INF), "log"),
        ((3.0, 0.0), "linear"),
        ((1e6, 10.0, 0.0), "symlog"),
        ((1e6, -50.0), "symlog"),
        ((50.0, -1e6), "symlog"),
        ((1e6, -1e5), "linear"),
        ((1.0, 1e-3, -2.0), "linear"),
        ((-1.0, -1e6), "linear"),
        ((-1e6, 0.0), "linear"),
        ((0.0, 0.0), "linear"),
        ((7.0,), "linear"),
        ((NAN, NAN), "linear"),
    ],
)
def test_the_scale_of_the_loss(losses, scale):
    ax = vernal.plot.history(recorded(losses))
    assert ax.get_yscale() == scale
    low, high = ax.get_ylim()
    finite = [loss for loss in losses if np.isfinite(loss)]
    assert all(low <= loss <= high for loss in finite)


@pytest.mark.parametrize("most", [1e308, -1e308])
@pytest.mark.parametrize("least", [1.0, 0.0, -1.0, 1e-308, 1e308])
def test_a_fit_that_diverged_is_drawn(most, least):
    loss = vernal.plot.history(recorded((least, most, INF))).lines[0]
    np.testing.assert_array_equal(abs(loss.get_ydata()[1]), 1e150)
    history = recorded(a=[least, most, INF], b=[1.0, 1.0, 1.0])
    vernal.plot.trajectories(history)
    errors = {"a": np.asarray(1e-8), "b": np.asarray(1.0)}
    vernal.plot.trajectories(history, errors=errors)


def test_losses_that_are_not_finite_are_marked_and_counted():
    losses = (NAN, 4.0, INF, 3.0, 5.0, -INF, NAN)
    ax = vernal.plot.history(recorded(losses))
    loss, lowest, marks = ax.lines
    np.testing.assert_array_equal(loss.get_ydata(), [NAN, 4, NAN, 3, 5, NAN, NAN])
    np.testing.assert_array_equal(lowest.get_ydata(), [NAN, 4, 4, 3, 3, 3, 3])
    np.testing.assert_array_equal(marks.get_xdata(), [0, 2, 5, 6])
    assert legend(ax)[-1] == "not finite: 4 of 7"
    # At the bottom, whatever the scale: the lower edge in the axes' own coordinates.
    ax.figure.canvas.draw()
    drawn = marks.get_transform().transform(marks.get_xydata())
    np.testing.assert_allclose(ax.transAxes.inverted().transform(drawn)[:, 1], 0)
    # A point between two gaps makes no line.
    assert is_alone_dotted(loss) == [1]


def test_nothing_but_nan():
    ax = vernal.plot.history(recorded((NAN, NAN, INF)))
    assert legend(ax) == ["loss", "not finite: 3 of 3"]
    np.testing.assert_array_equal(ax.lines[-1].get_xdata(), range(3))


def test_one_step_is_a_dot():
    ax = vernal.plot.history(recorded((3.0,)))
    assert is_alone_dotted(ax.lines[0]) == [0]


def test_a_line_without_gaps_has_no_dots():
    ax = vernal.plot.history(recorded((3.0, 2.0)))
    assert ax.lines[0].get_marker() == "None"


def test_a_result_is_as_good_as_its_history():
    trainer = LineFit(line(), optax.sgd(0.1))
    result = trainer.fit(line_batch(), 6, every=2)
    for given in (result, result.history):
        loss = vernal.plot.history(given).lines[0]
        np.testing.assert_array_equal(loss.get_xdata(), [0, 2, 4])
        np.testing.assert_array_equal(loss.get_ydata(), result.history.loss)


def test_a_fit_in_half_precision():
    history = vn.History(np.arange(2), np.asarray(jnp.ones(2, jnp.bfloat16)))
    np.testing.assert_array_equal(vernal.plot.history(history).lines[0].get_ydata(), 1)


# --- the parameters ---


def test_values_of_one_size_are_drawn_as_they_are():
    history = recorded(
        mean=[1.0, 2.0, 3.0], wfe=np.arange(1.0, 7.0).reshape(3, 2), grad_norm=[1, 2, 3]
    )
    ax = vernal.plot.trajectories(history)
    assert legend(ax) == ["mean", "wfe[0]", "wfe[1]"]
    np.testing.assert_array_equal(curves(ax)["wfe[1]"].get_ydata(), [2, 4, 6])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "value")
    assert ax.get_yscale() == "linear"


def test_names_choose():
    history = recorded(a=[1.0, 2.0], b__c=[[[3.0]], [[4.0]]], loss_of_mine=[1.0, 1.0])
    assert legend(vernal.plot.trajectories(history, "b.c")) == ["b.c[0,0]"]
    assert legend(vernal.plot.trajectories(history, "b.c", "a")) == ["b.c[0,0]", "a"]


def test_sizes_apart_share_the_axis_in_their_own_ranges():
    history = recorded(
        flux=[1e6, 3e6, 2e6], wfe=[[-1e-8, 5e-8], [1e-8, 5e-8], [3e-8, 5e-8]]
    )
    ax = vernal.plot.trajectories(history)
    assert ax.get_ylabel() == "from the last value, each in its own range"
    drawn = curves(ax)
    np.testing.assert_allclose(drawn["flux"].get_ydata(), [-0.5, 0.5, 0])
    np.testing.assert_allclose(drawn["wfe[0]"].get_ydata(), [-1, -0.5, 0])
    np.testing.assert_array_equal(drawn["wfe[1]"].get_ydata(), 0)


@pytest.mark.parametrize(("other", "is_plain"), [(99.0, True), (101.0, False)])
def test_a_factor_of_a_hundred_is_the_border(other, is_plain):
    ax = vernal.plot.trajectories(recorded(a=[1.0, 1.0], b=[other, other]))
    assert (ax.get_ylabel() == "value") is is_plain


def test_zeros_have_no_size():
    ax = vernal.plot.trajectories(recorded(a=[2.0, 3.0], b=[0.0, 0.0], c=[NAN, NAN]))
    assert ax.get_ylabel() == "value"
    assert vernal.plot.trajectories(recorded(b=[0.0])).get_ylabel() == "value"


def test_standard_errors_are_the_unit():
    history = recorded(flux=[1e6, 2e6], wfe=[[1e-8, 2e-8], [3e-8, 2e-8]])
    errors = {"flux": jnp.asarray(1e5), "wfe": jnp.asarray([1e-8, 1e-9]), "not": None}
    ax = vernal.plot.trajectories(history, errors=errors)
    assert ax.get_ylabel() == "from the last value, in standard errors"
    drawn = curves(ax)
    np.testing.assert_allclose(drawn["flux"].get_ydata(), [-10, 0])
    np.testing.assert_allclose(drawn["wfe[0]"].get_ydata(), [-2, 0])
    np.testing.assert_allclose(drawn["wfe[1]"].get_ydata(), [0, 0])
    assert ax.get_yscale() == "linear"
    errors["flux"] /= 2
    assert vernal.plot.trajectories(history, errors=errors).get_yscale() == "symlog"


def test_an_element_without_a_finite_error_is_named_and_not_drawn():
    history = recorded(a=[1.0, 2.0], b=[[1.0, 2.0, 3.0]] * 2)
    errors = {"a": jnp.asarray(INF), "b": jnp.asarray([NAN, 1.0, 0.0])}
    ax = vernal.plot.trajectories(history, errors=errors)
    assert legend(ax) == ["b[1]", "no finite error: a, b[0], b[2]"]
    assert next(iter(curves(ax))) == "b[1]"
    ax = vernal.plot.trajectories(history, "a", errors=errors)
    assert legend(ax) == ["no finite error: a"]
    history = recorded(a=np.ones((2, 5)))
    ax = vernal.plot.trajectories(history, errors={"a": np.full(5, INF)})
    assert legend(ax) == ["no finite error: a[0], a[1], a[2], ..."]


def test_the_last_value_is_the_last_finite_one():
    history = recorded(a=[1.0, 3.0, NAN], b=[NAN, INF, NAN])
    errors = {"a": np.asarray(2.0), "b": np.asarray(1.0)}
    drawn = curves(vernal.plot.trajectories(history, errors=errors))
    np.testing.assert_array_equal(drawn["a"].get_ydata(), [-1, 0, NAN])
    assert not np.isfinite(drawn["b"].get_ydata()).any()


def test_many_lines_are_labelled_by_array():
    history = recorded(a=np.ones((2, 3, 4)), b=[1.0, 2.0])
    ax = vernal.plot.trajectories(history)
    assert len(ax.lines) == 13
    assert legend(ax) == ["a (12)", "b"]
    first, *others, last = ax.lines
    assert {line.get_color() for line in others} == {first.get_color()}
    assert last.get_color() != first.get_color()
    ax = vernal.plot.trajectories(history, "a")
    assert len(legend(ax)) == 12


def test_many_arrays_are_not_all_labelled():
    history = recorded(**{f"p{i}": [float(i), 1.0] for i in range(30)})
    ax = vernal.plot.trajectories(history)
    assert len(curves(ax)) == 30
    assert legend(ax) == [*(f"p{i}" for i in range(12)), "and 18 more"]


def test_labelled_lines_look_different():
    history = recorded(a=np.ones((2, 12)))
    lines = vernal.plot.trajectories(history).lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_of_a_large_array_some_elements_are_drawn():
    ax = vernal.plot.trajectories(recorded(a=np.ones((2, 100, 100))))
    assert len(ax.lines) == 200
    assert legend(ax) == ["a (200 of 10000)"]


def test_complex_parameters_have_two_lines():
    history = recorded(wave=np.array([[1 + 2j], [3 - 1j]]))
    drawn = curves(vernal.plot.trajectories(history))
    np.testing.assert_array_equal(drawn["wave[0].real"].get_ydata(), [1, 3])
    np.testing.assert_array_equal(drawn["wave[0].imag"].get_ydata(), [2, -1])


def test_one_step_and_empty_arrays():
    ax = vernal.plot.trajectories(recorded(a=[[1.0, 2.0]]))
    assert [is_alone_dotted(line) for line in ax.lines] == [[0], [0]]
    assert not vernal.plot.trajectories(recorded(a=np.zeros((3, 0)))).lines


def test_names_that_matplotlib_would_read_otherwise():
    history = recorded(**{"_raw": [1.0, 2.0], "a$b$": [1.0, 2.0]})
    ax = vernal.plot.trajectories(history)
    assert legend(ax) == [" _raw", r"a\$b\$"]


class Told(GaussianFit):
    def loss(self, model, batch):
        loss = jnp.mean(self.residuals(model, batch) ** 2)
        return loss, {"double": 2 * loss}


@pytest.mark.filterwarnings("ignore::vernal.ObjectiveWarning")
def test_a_result_tells_parameters_from_metrics():
    trainer = Told(gaussian(), optax.sgd(0.01), train=("std", "mean"))
    result = trainer.fit(gaussian_batch(), 4, record=("grad_norm", "double", "*"))
    assert legend(vernal.plot.trajectories(result)) == ["mean", "std"]
    assert set(legend(vernal.plot.trajectories(result.history))) == {
        "double",
        "mean",
        "std",
    }
    errors = result.trainer.standard_errors(gaussian_batch())
    for given in (result, result.history):
        ax = vernal.plot.trajectories(given, errors=errors)
        assert legend(ax) == ["mean", "std"]
    distance = curves(ax)["mean"].get_ydata()
    values = result.history["mean"]
    np.testing.assert_allclose(distance, (values - values[-1]) / errors.mean)


# --- the eigenvalues ---

PARAMS = {"flux": jnp.asarray(1e6), "wfe": jnp.zeros(4), "zero": jnp.asarray(0.0)}
NAMES = ["flux", "wfe[0]", "wfe[1]", "wfe[2]", "wfe[3]", "zero"]


def fisher(size=6, seed=0):
    factor = np.random.default_rng(seed).normal(size=(3 * size, size))
    return factor.T @ factor


def with_null():
    """The first is not seen at all; of the last two only the sum is."""
    matrix = fisher()
    matrix[0, :] = matrix[:, 0] = 0
    matrix[5, :] = matrix[4, :]
    matrix[:, 5] = matrix[:, 4]
    return jnp.asarray(matrix)


class Product(eqx.Module):
    """With a matrix, which is an array: all share a program."""

    matrix: jax.Array

    def __call__(self, tree):
        return {"a": self.matrix @ tree["a"]}


SIZE = 20


def of_matvec(matrix):
    params, key = {"a": jnp.zeros(SIZE)}, jax.random.key(0)
    return vn.EigenProjector.from_matvec(
        Product(jnp.asarray(matrix)), params, 3, key=key
    )


LEADING = np.diag(np.linspace(SIZE, 1.0, SIZE))


def test_spectrum_is_what_the_projector_knows():
    projector = vn.EigenProjector.from_fisher(jnp.asarray(fisher()), PARAMS)
    ax = vernal.plot.spectrum(projector)
    (kept,) = ax.lines
    np.testing.assert_array_equal(kept.get_xdata(), range(1, 7))
    np.testing.assert_allclose(kept.get_ydata(), projector.eigenvalues)
    condition = float(projector.condition_number)
    assert legend(ax) == [f"6 constrained, condition number {condition:.3g}"]
    assert ax.get_yscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == (
        "direction",
        "eigenvalue of the scaled matrix",
    )


def test_the_legend_of_a_spectrum_has_an_edge():
    """Its markers are those of eigenvalues."""
    projector = vn.EigenProjector.from_fisher(jnp.asarray(fisher()), PARAMS)
    frame = vernal.plot.spectrum(projector).get_legend().get_frame()
    assert frame.get_edgecolor()[:3] == (0.8, 0.8, 0.8)


@pytest.mark.parametrize("on_null", ["drop", "prior"])
def test_null_directions_lost_in_rounding_stand_at_the_bottom(on_null):
    projector = vn.EigenProjector.from_fisher(with_null(), PARAMS, on_null=on_null)
    ax = vernal.plot.spectrum(projector)
    kept, lost = ax.lines
    np.testing.assert_array_equal(lost.get_xdata(), [5, 6])
    assert 0 < lost.get_ydata()[0] < kept.get_ydata().min()
    assert lost.get_marker() != kept.get_marker()
    assert lost.get_color() != kept.get_color()
    assert legend(ax)[-1] == "2 null, no larger than rounding"
    low, high = ax.get_ylim()
    assert low < lost.get_ydata()[0] < kept.get_ydata()[0] < high


def test_null_directions_with_a_size_are_where_they_are():
    matrix = jnp.diag(jnp.asarray([1.0] * 6)).at[4, 5].set(1 - 1e-8)
    matrix = matrix.at[5, 4].set(1 - 1e-8)
    projector = vn.EigenProjector.from_fisher(matrix, PARAMS, rtol=1e-3)
    ax = vernal.plot.spectrum(projector)
    kept, null = ax.lines
    assert legend(ax)[-1] == "1 null"
    np.testing.assert_allclose(null.get_ydata(), 1e-8, rtol=1e-6)
    assert null.get_color() != kept.get_color()


def test_null_directions_of_both_kinds():
    matrix = with_null().at[1, :].mul(1e-9).at[:, 1].mul(1e-9)
    projector = vn.EigenProjector.from_fisher(matrix, PARAMS, rank=2)
    kept, null, lost = vernal.plot.spectrum(projector).lines
    assert [len(line.get_xdata()) for line in (kept, null, lost)] == [2, 2, 2]


def test_nothing_is_constrained():
    zeros = jnp.zeros((6, 6))
    projector = vn.EigenProjector.from_fisher(zeros, PARAMS, on_null="prior")
    ax = vernal.plot.spectrum(projector)
    assert legend(ax) == ["6 null, no larger than rounding"]


def test_spectrum_of_one_parameter():
    projector = vn.EigenProjector.from_fisher(jnp.ones((1, 1)), {"a": jnp.ones(1)})
    assert legend(vernal.plot.spectrum(projector)) == [
        "1 constrained, condition number 1"
    ]


def test_spectrum_of_blocks():
    blocks = {"flux": jnp.ones((1, 1)), "wfe": with_null()[1:5, 1:5]}
    projector = vn.EigenProjector.from_blocks(blocks, PARAMS)
    ax = vernal.plot.spectrum(projector)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), projector.eigenvalues)


def test_spectrum_of_matvec_has_the_leading_ones():
    ax = vernal.plot.spectrum(of_matvec(LEADING))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [20, 19, 18], rtol=1e-6)
    assert legend(ax) == ["3 leading of 20, condition number 1.11"]


# --- the correlations ---


def matrix_of(ax):
    return ax.images[0].get_array()


def test_correlation_is_that_of_the_inverse():
    units = np.diag(10.0 ** np.array([-6, 8, 8, 8, 8, 0]))
    matrix = jnp.asarray(units @ fisher() @ units)
    ax = vernal.plot.correlation(vn.EigenProjector.from_fisher(matrix, PARAMS))
    covariance = np.linalg.inv(fisher())
    deviation = np.sqrt(np.diag(covariance))
    expected = covariance / np.outer(deviation, deviation)
    found = matrix_of(ax)
    assert not np.ma.getmaskarray(found).any()
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert ax.images[0].get_clim() == (-1, 1)
    assert ticks(ax.xaxis) == ticks(ax.yaxis) == NAMES
    np.testing.assert_array_equal(ax.get_yticks(), range(6))
    assert ax.images[0].colorbar.ax.get_ylabel() == "correlation"


def test_rows_without_bound_are_grey():
    ax = vernal.plot.correlation(vn.EigenProjector.from_fisher(with_null(), PARAMS))
    mask = np.ma.getmaskarray(matrix_of(ax))
    unbounded = np.isin(np.arange(6), [0, 4, 5])
    np.testing.assert_array_equal(mask, unbounded[:, None] | unbounded)
    label = ax.images[0].colorbar.ax.get_ylabel()
    assert label == "correlation (grey: no finite error)"
    assert tuple(ax.images[0].get_cmap().get_bad()) == (0.8, 0.8, 0.8, 1.0)
    with_prior = vn.EigenProjector.from_fisher(with_null(), PARAMS, on_null="prior")
    assert not np.ma.getmaskarray(matrix_of(vernal.plot.correlation(with_prior))).any()


def test_parameters_without_a_block_are_grey():
    projector = vn.EigenProjector.from_blocks({"wfe": jnp.asarray(fisher(4))}, PARAMS)
    found = matrix_of(vernal.plot.correlation(projector))
    unknown = np.isin(np.arange(6), [0, 5])
    np.testing.assert_array_equal(np.ma.getmaskarray(found), unknown[:, None] | unknown)
    np.testing.assert_allclose(np.diag(found)[1:5].astype(float), 1)


def test_correlation_of_matvec():
    ax = vernal.plot.correlation(of_matvec(LEADING))
    np.testing.assert_allclose(matrix_of(ax), np.eye(SIZE), atol=1e-6)
    # Three combinations are seen, of all elements.
    rows = np.random.default_rng(0).normal(size=(3, SIZE))
    flat = of_matvec(rows.T @ rows)
    assert np.ma.getmaskarray(matrix_of(vernal.plot.correlation(flat))).all()


def test_of_a_report_it_is_the_correlation_of_the_free_elements():
    batch = gaussian_batch()
    trainer = GaussianFit(gaussian(), bounds={"std": (1.0, None)})
    report = trainer.solve(SOLVER, batch).report(batch)
    ax = vernal.plot.correlation(report)
    assert ticks(ax.xaxis) == ["mean", "power"]
    np.testing.assert_array_equal(matrix_of(ax), report.correlation_matrix)


def test_many_elements_are_named_by_array():
    params = {"a": jnp.zeros(30), "b": jnp.zeros((2, 5)), "c": jnp.asarray(0.0)}
    params["d"] = jnp.zeros(20)
    projector = vn.EigenProjector.from_fisher(jnp.eye(61), params)
    ax = vernal.plot.correlation(projector)
    assert ticks(ax.yaxis) == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(ax.get_yticks(), [14.5, 34.5, 40, 50.5])


@pytest.mark.parametrize(("size", "first"), [(40, "a[0]"), (41, "a")])
def test_the_number_that_is_named_one_by_one(size, first):
    projector = vn.EigenProjector.from_fisher(jnp.eye(size), {"a": jnp.zeros(size)})
    shown = ticks(vernal.plot.correlation(projector).xaxis)
    assert shown[0] == first
    assert len(shown) == (size if size == 40 else 1)


def test_names_are_as_small_as_the_axes_demand():
    projector = vn.EigenProjector.from_fisher(jnp.eye(40), {"a": jnp.zeros(40)})
    sizes = []
    for height in (12, 6, 3):
        ax = vernal.plot.correlation(
            projector, ax=plt.figure(figsize=(12, height)).gca()
        )
        sizes.append(ax.get_yticklabels()[0].get_fontsize())
    assert sizes[0] == plt.rcParams["font.size"] > sizes[1]
    assert ticks(ax.yaxis) == ["a"]


def test_names_without_room_are_left_out():
    params = {f"p{i:03}": jnp.asarray(0.0) for i in range(200)}
    projector = vn.EigenProjector.from_fisher(jnp.eye(200), params)
    shown = vernal.plot.correlation(projector)
    assert ticks(shown.yaxis) == [f"p{i:03}" for i in range(0, 200, 5)]
    params = {"a": jnp.zeros(100), "b": jnp.asarray(0.0), "c": jnp.asarray(0.0)}
    projector = vn.EigenProjector.from_fisher(jnp.eye(102), params)
    assert ticks(vernal.plot.correlation(projector).yaxis) == ["a", "b"]


def test_correlation_in_single_precision_with_small_units():
    matrix = jnp.diag(jnp.asarray([1e14, 1e14], "f4")).at[0, 1].set(5e13)
    matrix = matrix.at[1, 0].set(5e13)
    projector = vn.EigenProjector.from_fisher(matrix, {"a": jnp.zeros(2, "f4")})
    found = matrix_of(vernal.plot.correlation(projector))
    np.testing.assert_allclose(found, [[1, -0.5], [-0.5, 1]], rtol=1e-5)


LINE = LineFit(line())
SWAPPED = {
    "a trainer for a function": (
        lambda: vernal.plot.band(line, LINE, line_batch(), jnp.ones(2)),
        "`trainer` is .* must be a trainer, such as `result.trainer`",
    ),
    "a batch for a function": (
        lambda: vernal.plot.band(LINE, line_batch(), line, jnp.ones(2)),
        "`fn` is of type `tuple`, but must be a function",
    ),
    "a trainer for a projector": (
        lambda: vernal.plot.correlation(LINE),
        r"a report, such as `trainer.report\(batch\)`",
    ),
    "a batch for a solver": (
        lambda: vernal.plot.contour(LINE, line_batch(), SOLVER, "slope", "offset"),
        "`solver` is of type `tuple`",
    ),
}


@pytest.mark.parametrize("case", SWAPPED)
def test_what_is_swapped_is_said_shortly(case):
    make, match = SWAPPED[case]
    with pytest.raises(TypeError, match=match) as caught:
        make()
    assert len(str(caught.value)) < 200


# --- the axes ---

PROJECTOR = vn.EigenProjector.from_fisher(jnp.asarray(fisher()), PARAMS)
CALLS = {
    "history": lambda ax: vernal.plot.history(recorded((1.0, NAN, 30.0)), ax=ax),
    "trajectories": lambda ax: vernal.plot.trajectories(recorded(a=[1.0, 2.0]), ax=ax),
    "spectrum": lambda ax: vernal.plot.spectrum(PROJECTOR, ax=ax),
    "correlation": lambda ax: vernal.plot.correlation(PROJECTOR, ax=ax),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layout", [None, "constrained", "tight"])
def test_axes_that_are_given_are_drawn_on(name, layout, laid_out):
    figure, (left, right) = plt.subplots(1, 2, layout=layout)
    assert CALLS[name](right) is right
    assert plt.get_fignums() == [figure.number]
    assert not left.has_data()
    assert right.has_data()


@pytest.mark.seams
@pytest.mark.parametrize("name", CALLS)
def test_every_call_without_axes_makes_a_figure(name):
    assert CALLS[name](None) is not CALLS[name](None)
    assert len(plt.get_fignums()) == 2


@pytest.mark.parametrize("name", CALLS)
def test_twins_and_parts_of_figures(name, laid_out):
    figure = plt.figure(layout="constrained")
    left, right = figure.subfigures(1, 2)
    CALLS[name](left.subplots())
    ax = right.subplots()
    ax.plot([0, 1], [5, 6])
    assert CALLS[name](ax.twinx()) is not ax
    assert len(ax.lines) == 1


def test_axes_with_a_picture_keep_their_scale():
    ax = vernal.plot.history(recorded((1e3, 1.0)))
    vernal.plot.history(recorded((3.0, 2.0)), ax=ax)
    assert ax.get_yscale() == "log"
    assert len(ax.lines) == 4
    _, ax = plt.subplots()
    ax.plot([0, 1], [5, 6])
    vernal.plot.history(recorded((1e3, 1.0)), ax=ax)
    vernal.plot.trajectories(recorded(a=[1e3, 1.0]), errors={"a": np.ones(())}, ax=ax)
    assert ax.get_yscale() == "linear"


def test_a_long_fit_finds_its_legend_a_place_in_good_time(monkeypatch):
    ax = vernal.plot.history(recorded(np.linspace(2, 1, 60_000)))
    assert ax.get_legend()._get_loc() == 1


def test_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *_: pytest.fail("shown"))
    for call in CALLS.values():
        call(None)


# --- what is refused ---


def test_an_empty_history():
    empty = vn.History(np.zeros(0, int), np.zeros(0), {"a": np.zeros((0, 2))})
    for call in (vernal.plot.history, vernal.plot.trajectories):
        with pytest.raises(ValueError, match=r"`history` is empty.*trainer\.fit"):
            call(empty)
    assert not plt.get_fignums()


def test_nothing_recorded():
    for history in (recorded((1.0, 2.0)), recorded(grad_norm=[1.0])):
        with pytest.raises(ValueError, match=r"no parameter.*`record=vn\.paths"):
            vernal.plot.trajectories(history)


def test_unknown_names():
    with pytest.raises(vn.UnknownPathError, match=r"no 'meen'.*'mean'.*`record="):
        vernal.plot.trajectories(recorded(mean=[1.0]), "meen")
    with pytest.raises(vn.UnknownPathError, match=r"`errors` has no 'mean'.*'men'"):
        vernal.plot.trajectories(
            recorded(mean=[1.0]), "mean", errors={"men": np.ones(())}
        )


def test_errors_of_another_shape():
    with pytest.raises(ValueError, match=r"`errors`.*\(3,\) at 'a'.*\(2,\)"):
        vernal.plot.trajectories(recorded(a=[[1.0, 2.0]]), errors={"a": np.ones(3)})


def test_a_batch_of_projectors():
    make = lambda matrix: vn.EigenProjector.from_fisher(matrix, PARAMS, rank=6)
    batch = jax.vmap(make)(jnp.stack([jnp.asarray(fisher())] * 2))
    for call in (vernal.plot.spectrum, vernal.plot.correlation):
        with pytest.raises(ValueError, match=r"batch of projectors.*x\[0\]"):
            call(batch)
        call(jax.tree.map(lambda x: x[0], batch))


@pytest.mark.parametrize(
    "call",
    [
        lambda: vernal.plot.history([1.0]),
        lambda: vernal.plot.history(recorded(), ax=plt),
        lambda: vernal.plot.trajectories(recorded(a=[1.0]), 3),
        lambda: vernal.plot.spectrum(None),
        lambda: vernal.plot.correlation(jnp.eye(2)),
    ],
)
def test_arguments_of_another_kind(call):
    with pytest.raises(TypeError):
        call()


# --- what is imported ---


def test_what_is_optional_is_imported_for_its_purpose_alone():
    """Without it the error says what to install."""
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["orbax"] = None
sys.modules["orbax.checkpoint"] = None
import vernal
try:
    import vernal.plot
except ImportError as error:
    print(error)
try:
    vernal.Checkpoints("here")
except ImportError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, text=True
    )
    assert run.returncode == 0, run.stderr
    pictures, checkpoints = run.stdout.splitlines()
    assert "`pip install vernal[plot]`" in pictures
    assert "`Checkpoints` needs Orbax: `pip install vernal[checkpoint]`" in checkpoints


# --- a band ---


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
def test_a_band_is_the_function_and_its_error():
    batch = gaussian_batch()
    trainer, x = GaussianFit(gaussian()), jnp.linspace(0.0, 2.0, 7)
    value, error = trainer.propagate(lambda model: model(x), batch)
    _, given = plt.subplots()
    ax = vernal.plot.band(
        trainer, lambda model: model(x), batch, x, errors=2, label="line", ax=given
    )
    assert ax is given
    assert legend(ax) == ["line"]
    np.testing.assert_array_equal(curves(ax)["line"].get_ydata(), value)
    (area,) = ax.collections
    corners = area.get_paths()[0].vertices
    for place, middle, half in zip(x, value, 2 * error, strict=True):
        heights = corners[corners[:, 0] == place, 1]
        np.testing.assert_allclose(heights.min(), middle - half)
        np.testing.assert_allclose(heights.max(), middle + half)


def test_without_a_finite_error_there_is_no_band():
    trainer = GaussianFit(gaussian())
    # One datum does not constrain three parameters.
    batch = jax.tree.map(lambda leaf: leaf[:1], gaussian_batch())
    grid = jnp.linspace(0.0, 1.0, 4)
    ax = vernal.plot.band(trainer, lambda model: model(grid), batch, grid)
    assert np.isfinite(ax.lines[0].get_ydata()).all()
    assert not any(area.get_paths() for area in ax.collections)


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"x": jnp.ones((2, 2))}, "`x` is"),
        ({"x": jnp.ones(3)}, "`fn` returned an array of shape"),
        ({"errors": 0}, "`errors` is 0"),
        ({"fn": lambda model: (model.mean, model.std)}, "another structure"),
    ],
)
def test_what_has_no_band(options, match):
    x = jnp.linspace(0.0, 1.0, 4)
    given = {"fn": lambda model: model(x), "batch": gaussian_batch(), "x": x} | options
    with pytest.raises(ValueError, match=match):
        vernal.plot.band(GaussianFit(gaussian()), **given)


# --- residuals ---


class Several(vn.Trainer):
    def residuals(self, model, batch):
        rate = jnp.full(6, model["rate"])
        return {
            "counts": vn.likelihoods.Poisson(rate, batch["counts"], where=batch["is"]),
            "grid": (model["rate"] - batch["grid"]).reshape(2, 3),
        }


SEVERAL = {
    "counts": jnp.array([3, 1, 4, 1, 5, 9]),
    "is": jnp.arange(6) != 2,
    "grid": jnp.arange(6.0),
}


def test_residuals_are_points_with_their_p_value():
    trainer, batch = linear()
    given, report = trainer.residuals(trainer.model, batch), trainer.report(batch)
    ax = vernal.plot.residuals(trainer, batch)
    assert ax.get_xlabel() == "index"
    assert ax.get_legend() is None
    (points, zero) = ax.lines
    np.testing.assert_array_equal(points.get_xdata(), np.arange(16))
    np.testing.assert_allclose(points.get_ydata(), given, rtol=1e-12)
    assert points.get_linestyle() == "None"
    assert zero.get_ydata() == [0, 0]
    title = rf"$\chi^2$ = {report.chi_squared:.4g}, 14 degrees of freedom, p = "
    assert ax.get_title() == title + f"{report.p_value:.2g}"
    # Beside a place, in units of their scatter; what is drawn on keeps its title.
    x = batch[0].tolist()
    again = vernal.plot.residuals(trainer, batch, x, scale_errors=True, ax=ax)
    assert again is ax
    assert ax.get_title().startswith(title)
    np.testing.assert_array_equal(ax.lines[2].get_xdata(), x)
    root = np.sqrt(report.reduced_chi_squared)
    np.testing.assert_allclose(ax.lines[2].get_ydata(), given / root, rtol=1e-10)
    scaled = vernal.plot.residuals(trainer, batch, scale_errors=True)
    assert scaled.get_title().endswith("degrees of freedom")


def test_residuals_of_several_likelihoods():
    trainer = Several({"rate": jnp.asarray(3.0)})
    x = {"counts": jnp.arange(10, 16), "grid": np.array([1.0, 2.0, 3.0])}
    ax = vernal.plot.residuals(trainer, SEVERAL, x)
    assert legend(ax) == ["residuals['counts']", "residuals['grid']"]
    assert ax.get_title().startswith("deviance = ")
    drawn = curves(ax)
    terms = trainer.residuals(trainer.model, SEVERAL)
    expected = np.asarray(terms["counts"].residuals())
    found = drawn["residuals['counts']"].get_ydata()
    # What is missing is not drawn.
    assert np.isnan(found[2])
    np.testing.assert_allclose(np.delete(found, 2), np.delete(expected, 2), rtol=1e-12)
    grid = drawn["residuals['grid']"]
    np.testing.assert_array_equal(grid.get_xdata(), [1, 2, 3, 1, 2, 3])
    np.testing.assert_allclose(grid.get_ydata(), terms["grid"].ravel(), rtol=1e-12)
    for bad, match in (
        (jnp.arange(6), "an array of numbers for each of `residuals.'counts'.`, "),
        ({"counts": x["counts"]}, "`x` is of type `dict`, but must have"),
        (x | {"grid": "a word"}, "an array of numbers"),
        (
            x | {"grid": jnp.ones(2)},
            r"shape \(2,\) for `residuals\['grid'\]`.*\(2, 3\)",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            vernal.plot.residuals(trainer, SEVERAL, bad)


def test_complex_residuals_have_two_parts():
    class Complex(vn.Trainer):
        def residuals(self, model, batch):
            return jax.lax.complex(model["a"] * batch, model["a"] - batch)

    trainer, batch = Complex({"a": jnp.asarray(1.0)}), jnp.arange(4.0)
    drawn = curves(vernal.plot.residuals(trainer, batch))
    given = trainer.residuals(trainer.model, batch)
    parts = {"residuals.real": given.real, "residuals.imag": given.imag}
    for name, part in parts.items():
        np.testing.assert_allclose(drawn[name].get_ydata(), part, rtol=1e-12)


def test_without_residuals_there_is_no_picture_of_them():
    with pytest.raises(TypeError, match="`LineFit` defines no `residuals`"):
        vernal.plot.residuals(LINE, line_batch())


def test_the_picture_of_robust_residuals_has_no_title():
    class Robustly(vn.Trainer):
        def residuals(self, model, batch):
            return vn.likelihoods.Robust(model["a"] - batch, "soft_l1")

    batch = jnp.asarray(np.random.default_rng(0).normal(size=40))
    ax = vernal.plot.residuals(Robustly({"a": jnp.asarray(0.1)}), batch)
    assert ax.get_title() == ""


# --- profiles ---

SOLVER = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)


@functools.cache
def linear():
    """A line at its minimum: its likelihood is normal."""
    x, y = line_batch()
    batch = x, y + 0.1 * jnp.cos(9 * x), jnp.full(x.shape, 0.2)
    return GaussianFit(line()).solve(SOLVER, batch).trainer, batch


def test_a_profile_is_drawn_beside_the_parabola_of_the_error():
    trainer, batch = linear()
    found = trainer.profile(SOLVER, batch, "slope", [2.2, 1.9, 2.0])
    ax = vernal.plot.profile(found)
    assert legend(ax) == ["profile likelihood", "standard error"]
    order = [1, 2, 0]
    drawn, parabola = (curves(ax)[name] for name in legend(ax))
    np.testing.assert_array_equal(drawn.get_xdata(), found.values[order])
    np.testing.assert_array_equal(drawn.get_ydata(), found.delta[order])
    heights = np.interp([1.9, 2.2], *parabola.get_data())
    np.testing.assert_allclose(heights, found.delta[[1, 0]], rtol=1e-3)
    assert ax.get_xlabel() == "slope"


@pytest.mark.parametrize("known", [[1, 0, 0], [0, 1, 0], [1, 0, 1]])
def test_a_value_alone_in_a_profile_has_its_marker(known):
    trainer, batch = linear()
    found = trainer.profile(SOLVER, batch, "slope", [1.9, 2.0, 2.2])
    found = dataclasses.replace(found, converged=np.array(known, bool))
    drawn = curves(vernal.plot.profile(found))["profile likelihood"]
    assert (drawn.get_marker(), drawn.get_markevery()) == (".", None)
    np.testing.assert_array_equal(np.isfinite(drawn.get_ydata()), found.converged)


def test_the_contours_of_a_line_are_ellipses():
    trainer, batch = linear()
    ax = vernal.plot.contour(trainer, SOLVER, batch, "slope", "offset")
    assert legend(ax) == ["68.3 %", "95.4 %"]
    fmat = np.asarray(trainer.fisher(batch))
    best = np.array([trainer.model.slope, trainer.model.offset])
    (lines,) = ax.collections
    for path, level in zip(lines.get_paths(), (0.683, 0.954), strict=True):
        steps = path.vertices - best
        rise = np.einsum("ki,ij,kj->k", steps, fmat, steps)
        np.testing.assert_allclose(rise, -2 * np.log1p(-level), rtol=0.02)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("slope", "offset")


class Valley(vn.Trainer):
    def residuals(self, model, batch):
        return valley(model["x"], model["y"], batch, jnp)


def valley(x, y, batch, lib=np):
    """A straight line far from where its offset is, or a valley that is bent."""
    if batch == "bent":
        return lib.stack([x - 1, (y - x**2) / 0.3], axis=-1)
    at = batch[0] + np.linspace(0.0, 3.0, 20)
    line = x[..., None] + y[..., None] * at
    return (line - (1 + 2 * at) + 0.3 * lib.cos(9 * at)) / 0.5


@pytest.mark.parametrize("names", [("x", "y"), ("y", "x")])
@pytest.mark.parametrize("batch", ["bent", (0.0,), (3.0,), (10.0,), (100.0,)])
@pytest.mark.parametrize("levels", [(0.683, 0.954), 0.683, np.array([0.4, 0.997])])
def test_a_contour_of_two_that_are_correlated_is_one_curve(names, batch, levels):
    start = Valley({"x": jnp.asarray(1.0), "y": jnp.asarray(1.0)})
    trainer = start.solve(SOLVER, batch).trainer
    ax = vernal.plot.contour(trainer, SOLVER, batch, *names, levels=levels)

    def deviance(first, second):
        place = dict(zip(names, map(np.asarray, (first, second)), strict=True))
        return np.sum(np.square(valley(**place, batch=batch)), axis=-1)

    least = deviance(*(trainer.model[name] for name in names))
    (lines,) = ax.collections
    for path, level in zip(lines.get_paths(), np.ravel(levels), strict=True):
        assert np.count_nonzero(path.codes == path.MOVETO) == 1
        first, *_, last = path.vertices
        np.testing.assert_allclose(first, last, atol=1e-9)
        rise = deviance(*path.vertices.T) - least
        np.testing.assert_allclose(rise, -2 * np.log1p(-level), rtol=0.1)


class Open(vn.Trainer):
    """The data know the sum, or the first, or a curve that is hardly bent."""

    def residuals(self, model, batch):
        return misfit(model["first"], model["second"], *batch)


def misfit(first, second, kind, x, y):
    if kind == "sum":
        return ((first + second) * x - y) / 0.1
    if kind == "idle":
        return (first * x + 0 * second - y) / 0.1
    return (first * x / (1 + x / second) - y) / 0.1


OPEN = {
    "sum": "below in 'first', above in 'first', below in 'second', above in 'second':",
    "idle": "open, below in 'second', above in 'second':",
    "bent": "open, above in 'second':",
}


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_region_that_is_open_is_said_and_drawn_so(kind, dtype):
    x = np.linspace(1, 2, 10)
    y = 6 * x / (1 + x / 100) if kind == "bent" else 6 * x
    data = x, y + 0.1 * np.cos(9 * x)
    batch = kind, *(jnp.asarray(each, dtype) for each in data)
    start = {"first": 5.0, "second": 90.0 if kind == "bent" else 2.0}
    model = {name: jnp.asarray(value, dtype) for name, value in start.items()}
    solver = optx.LevenbergMarquardt(rtol=1e-6, atol=1e-6)
    trainer = Open(model).solve(solver, batch).trainer
    is_doubtful = kind == "sum" and dtype == np.float32
    also = pytest.warns(UserWarning, match="rounding may hide")
    with (
        also if is_doubtful else contextlib.nullcontext(),
        pytest.warns(UserWarning, match=OPEN[kind]),
    ):
        ax = vernal.plot.contour(trainer, solver, batch, "first", "second")
    # Of the data as they are in that precision.
    known = kind, *(np.asarray(each, float) for each in batch[1:])
    deviance = lambda *at: np.sum(np.square(misfit(*at, *known)), axis=-1)
    least = deviance(*(np.asarray(x, float) for x in trainer.model.values()))
    (lines,) = ax.collections
    for path, level in zip(lines.get_paths(), (0.683, 0.954), strict=True):
        for part in path.to_polygons(closed_only=False):
            assert np.abs(part[0] - part[-1]).max() > 0.01
        rise = deviance(*path.vertices.T[..., None]) - least
        np.testing.assert_allclose(rise, -2 * np.log1p(-level), rtol=0.1)


def test_contours_have_scaled_errors():
    trainer, (x, y, sigma) = linear()
    scatter = np.sqrt(trainer.report((x, y, sigma)).reduced_chi_squared)
    paths = [
        vernal.plot.contour(
            trainer, SOLVER, (x, y, own), "slope", "offset", scale_errors=is_scaled
        )
        .collections[0]
        .get_paths()
        for own, is_scaled in ((sigma, True), (sigma * scatter, False))
    ]
    for ours, theirs in zip(*paths, strict=True):
        np.testing.assert_allclose(ours.vertices, theirs.vertices, rtol=1e-6)


@pytest.mark.parametrize("levels", [(), (0.5, 1.0), (68.3,)])
def test_a_level_of_a_contour_is_a_probability(levels):
    trainer, batch = linear()
    with pytest.raises(ValueError, match="`levels` is"):
        vernal.plot.contour(trainer, SOLVER, batch, "slope", "offset", levels=levels)


def test_a_contour_is_of_two_elements():
    trainer, batch = linear()
    with pytest.raises(ValueError, match="both 'slope'"):
        vernal.plot.contour(trainer, SOLVER, batch, "slope", "slope")

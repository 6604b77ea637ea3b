"""`Trainer.report`: the numbers of lmfit and iminuit, and what there is to read."""

import copy
import functools
import json
import pickle
import re
import sys

import equinox as eqx
import iminuit
import jax
import jax.numpy as jnp
import lmfit
import numpy as np
import numpyro.distributions as dist
import optax
import optimistix as optx
import pytest
import scipy.stats

import vernal as vn
from models import Gaussian, GaussianFit, line
from nist import CURVES, DATA
from vernal.likelihoods import Poisson, Robust

LM = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
X = jnp.linspace(-5.0, 5.0, 60)

CERTIFIED = "Misra1a", "Chwirut2", "Thurber", "MGH10", "BoxBOD"


class CurveFit(vn.Trainer):
    name: str = eqx.field(static=True)

    def __init__(self, name, *args):
        self.name = name
        super().__init__(*args)

    def residuals(self, b, batch):
        x, y = batch
        return CURVES[self.name](b, x) - y


class Likelihood(vn.Trainer):
    """The same as `GaussianFit`, by its `nll`."""

    def nll(self, model, batch):
        x, y, sigma = batch
        return 0.5 * jnp.sum(((model(x) - y) / sigma) ** 2)


def peak(*values, dtype=jnp.float64):
    return Gaussian(*(jnp.asarray(value, dtype) for value in values))


@functools.cache
def data(sigma=0.1, dtype=jnp.float64):
    noise = sigma * jax.random.normal(jax.random.key(0), X.shape)
    batch = X, peak(0.3, 1.2, 4.0)(X) + noise, jnp.full(X.shape, sigma)
    return jax.tree.map(lambda x: x.astype(dtype), batch)


@functools.cache
def solved(kind=GaussianFit):
    solver = LM if kind is GaussianFit else optx.BFGS(1e-10, 1e-10)
    return kind(peak(0.2, 1.1, 3.8)).solve(solver, data())


# The numbers of others


@functools.cache
def compiled(name):
    """The residuals of one of NIST's data sets, and their Jacobian."""
    x, y = (np.asarray(DATA[name][k], float) for k in ("x", "y"))
    residuals = lambda b: CURVES[name](b, x) - y
    return jax.jit(residuals), jax.jit(jax.jacfwd(residuals)), (x, y)


@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("name", CERTIFIED)
def test_the_numbers_are_those_of_lmfit(name, is_scaled):
    given = DATA[name]
    residuals, jacobian, batch = compiled(name)
    params = lmfit.Parameters()
    for index, value in enumerate(given["certified"]):
        params.add(f"b{index}", value=value)
    as_array = lambda p: np.asarray([p[name].value for name in params], float)
    theirs = lmfit.minimize(
        lambda p: np.asarray(residuals(as_array(p))),
        params,
        Dfun=lambda p: np.array(jacobian(as_array(p))),
        scale_covar=is_scaled,
        ftol=1e-14,
        xtol=1e-14,
    )
    here = jnp.asarray(as_array(theirs.params))
    ours = CurveFit(name, here).report(batch, scale_errors=is_scaled)

    assert ours.data_count == theirs.ndata
    assert ours.free_count == theirs.nvarys
    assert ours.degrees_of_freedom == theirs.nfree
    close = {"rtol": 1e-6}
    np.testing.assert_allclose(ours.chi_squared, theirs.chisqr, **close)
    np.testing.assert_allclose(ours.reduced_chi_squared, theirs.redchi, **close)
    errors = [theirs.params[name].stderr for name in params]
    np.testing.assert_allclose([row.error for row in ours.parameters], errors, **close)
    for pair in ours.correlations:
        first, second = (f"b{name.strip('[]')}" for name in pair[:2])
        other = theirs.params[first].correl[second]
        np.testing.assert_allclose(pair.value, other, rtol=1e-5, atol=1e-7)
    # lmfit takes the error bars for unknown here, whatever its `scale_covar`.
    count, chi = theirs.ndata, theirs.chisqr
    apart = 0 if is_scaled else chi - count * np.log(chi / count)
    np.testing.assert_allclose(ours.aic, theirs.aic + apart, **close)
    np.testing.assert_allclose(ours.bic, theirs.bic + apart, **close)
    if is_scaled:
        np.testing.assert_allclose(errors, given["errors"], rtol=1e-5)


@pytest.mark.parametrize("kind", [GaussianFit, Likelihood])
def test_the_numbers_are_those_of_iminuit(kind):
    result = solved(kind)
    report = result.report(data())
    batch = data()
    nll = jax.jit(lambda *b: Likelihood.nll(None, Gaussian(*b), batch))
    gradient = jax.jit(jax.grad(nll, argnums=(0, 1, 2)))
    theirs = iminuit.Minuit(
        lambda *b: float(nll(*b)),
        *(0.2, 1.1, 3.8),
        name=("mean", "std", "power"),
        grad=lambda *b: np.asarray(gradient(*b)),
    )
    theirs.errordef = iminuit.Minuit.LIKELIHOOD
    theirs.strategy = 2
    theirs.migrad()
    theirs.hesse()
    # Of residuals the second derivatives are left out.
    exact = {"rtol": 1e-3 if kind is Likelihood else 2e-2}
    for name in ("mean", "std", "power"):
        np.testing.assert_allclose(report[name].value, theirs.values[name], rtol=1e-4)
        np.testing.assert_allclose(report[name].error, theirs.errors[name], **exact)
    correlation = theirs.covariance.correlation()
    for first, second, value in report.correlations:
        near = 5e-3 if kind is Likelihood else 2e-2
        np.testing.assert_allclose(value, correlation[first, second], atol=near)
    assert report.edm < 1e-8
    if kind is GaussianFit:
        expected = scipy.stats.chi2.sf(2 * theirs.fval, X.size - 3)
        np.testing.assert_allclose(report.p_value, expected, rtol=1e-5)


@pytest.mark.parametrize("step", [0.01, 0.1])
@pytest.mark.parametrize("kind", [GaussianFit, Likelihood])
@pytest.mark.parametrize("is_whitened", [True, False])
def test_the_edm_is_that_of_a_step_from_the_minimum(kind, step, is_whitened):
    trainer = solved(kind).trainer
    errors = trainer.standard_errors(data())
    model = eqx.tree_at(lambda m: m.mean, trainer.model, replace_fn=lambda x: x)
    model = eqx.tree_at(lambda m: m.mean, model, model.mean + step * errors.mean)
    moved = trainer.replace(model=model)
    moved = moved.whiten(data()) if is_whitened else moved
    # `mean` is hardly correlated with the others.
    np.testing.assert_allclose(moved.report(data()).edm, step**2 / 2, rtol=0.05)


def test_directions_that_a_projector_dropped_are_not_free():
    trainer = GaussianFit(peak(0.2, 1.1, 3.8))
    projector = vn.EigenProjector.from_fisher(
        trainer.fisher(data()), trainer.params, rank=1
    )
    dropped = trainer.reproject(projector)
    assert 0 < dropped.report(data()).edm < trainer.report(data()).edm
    # That is what `table` says.
    assert f"edm {dropped.report(data()).edm:.3g}" in dropped.table(data())


# What is not known


def test_of_an_nll_there_is_no_chi_squared():
    report, other = solved(Likelihood).report(data()), solved().report(data())
    unknown = (
        *(report.chi_squared, report.reduced_chi_squared, report.p_value),
        *(report.data_count, report.degrees_of_freedom, report.bic),
    )
    assert unknown == (None,) * 6
    assert re.search(r"\nBIC +needs `data_count=`\n", str(report))
    np.testing.assert_allclose(report.aic, other.aic, rtol=1e-6)
    counted = Likelihood(solved().model).report(data(), data_count=60)
    np.testing.assert_allclose(counted.bic, other.bic, rtol=1e-6)
    assert counted.degrees_of_freedom == 57
    assert "data_count=" not in str(counted)


def test_complex_residuals_count_twice():
    class Phase(vn.Trainer):
        def residuals(self, model, batch):
            return model["a"] * jnp.exp(1j * model["p"]) - batch

    model = {"a": jnp.asarray(2.0), "p": jnp.asarray(0.3)}
    with jax.numpy_dtype_promotion("standard"):
        report = Phase(model).report(jnp.ones(3))
    assert (report.data_count, report.degrees_of_freedom) == (6, 4)
    chi = 3 * abs(2 * np.exp(0.3j) - 1) ** 2
    np.testing.assert_allclose(report.chi_squared, chi)


class Tangle(vn.Trainer):
    """Of `a` and `b` only the sum counts, and `dead` not at all."""

    def residuals(self, model, batch):
        total = model["a"] + model["b"] * model["unit"]
        first = total * batch + model["c"]
        return jnp.concatenate([first, first - 0.1 * batch])


def tangle():
    names = ("a", "b", "c", "dead", "off")
    return {name: jnp.asarray(1.0) for name in names} | {"unit": 1.0, "n": 3}


def test_what_the_data_do_not_constrain_takes_no_degree_of_freedom():
    trainer = Tangle(tangle(), train=("a", "b", "c", "dead"))
    report = trainer.report(jnp.linspace(1.0, 2.0, 5))
    assert (report.data_count, report.free_count) == (10, 4)
    assert report.degrees_of_freedom == 8
    rows = {row.name: (row.status, row.is_free) for row in report.parameters}
    assert rows == {
        "a": ("unconstrained", True),
        "b": ("unconstrained", True),
        "c": ("", True),
        "dead": ("unconstrained", True),
        "n": ("not fitted (a Python int)", False),
        "off": ("frozen", False),
        "unit": ("frozen (a Python float)", False),
    }
    assert np.isinf(report["a"].error)
    assert np.isnan(report["off"].error)
    assert report.correlations == ()
    assert str(report).count("unconstrained") == 3
    with pytest.raises(vn.UnknownPathError, match="Did you mean 'dead'"):
        report["deed"]


def test_without_degrees_of_freedom():
    few = jax.tree.map(lambda x: x[28:31], data())
    trainer = GaussianFit(peak(0.2, 1.1, 3.8))
    report = trainer.report(few)
    assert report.degrees_of_freedom == 0
    assert report.reduced_chi_squared is None
    assert report.p_value is None
    with pytest.raises(ValueError, match="`scale_errors`"):
        trainer.report(few, scale_errors=True)


class Decay(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model["height"] * jnp.exp(-model["rate"] * x) - y


@pytest.mark.parametrize("unit", [1e-155, 1e-160, 1e-200])
def test_the_scale_of_errors_in_any_unit(unit):
    """The squares of such residuals underflow."""
    x = jnp.linspace(0.0, 5.0, 30)
    y = jnp.exp(-0.7 * x) + 0.01 * jax.random.normal(jax.random.key(1), x.shape)

    def errors(unit):
        trainer = Decay({"height": jnp.asarray(unit), "rate": jnp.asarray(0.7)})
        report = trainer.report((x, unit * y), scale_errors=True)
        own = trainer.standard_errors((x, unit * y), scale_errors=True)
        np.testing.assert_allclose(own["rate"], report["rate"].error, rtol=1e-12)
        aic = report.aic - 2 * x.size * np.log(unit)
        return report["height"].error / unit, report["rate"].error, aic

    np.testing.assert_allclose(errors(unit), errors(1.0), rtol=1e-8)


class Masked(vn.Trainer):
    def residuals(self, model, batch):
        data, is_there = batch
        mean = jnp.broadcast_to(model["level"], data.shape)
        if data.dtype == jnp.int64:
            return vn.likelihoods.Poisson(mean, data, where=is_there)
        return vn.likelihoods.Gaussian(mean, data, where=is_there)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.int64])
def test_where_no_datum_is_left_there_is_no_bic(dtype):
    batch = jnp.arange(1, 4, dtype=dtype), jnp.zeros(3, bool)
    report = Masked({"level": jnp.array(2.0)}).report(batch)
    assert report.data_count == report.degrees_of_freedom == 0
    assert (report.chi_squared, report.aic, report.bic) == (0, 0, None)
    assert report["level"].status == "unconstrained"
    assert "BIC" not in str(report)


def test_without_scatter_what_is_not_constrained_stays_so():
    class Exact(vn.Trainer):
        def residuals(self, model, batch):
            return model["level"] + 0 * model["idle"] - batch

    trainer = Exact({"level": jnp.array(2.0), "idle": jnp.array(1.0)})
    report = trainer.report(jnp.full(5, 2.0), scale_errors=True)
    assert (report["level"].error, report["idle"].error) == (0, jnp.inf)
    assert report["idle"].status == "unconstrained"


class Curves(vn.Trainer):
    def residuals(self, model, batch):
        one, other = batch
        return ((model["a"] - 1) * one + (model["b"] - 1) * other) / 0.1


class CurvesNll(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(Curves.residuals(self, model, batch) ** 2)


@pytest.mark.parametrize("kind", [Curves, CurvesNll])
@pytest.mark.parametrize(
    ("dtype", "is_idle", "is_noted"),
    [(np.float32, False, True), (np.float32, True, False), (np.float64, False, False)],
)
def test_what_rounding_hides_has_a_note(kind, dtype, is_idle, is_noted):
    """Two curves that differ by less than 32 bits show, unless one does nothing."""
    x = np.linspace(0, 1, 200, dtype=dtype)
    trainer = kind({"a": jnp.ones((), dtype), "b": jnp.ones((), dtype)})
    batch = x, np.zeros_like(x) if is_idle else x + 1e-5 * x**2
    report = trainer.report(batch)
    is_known = dtype == jnp.float64 and not is_idle
    assert np.isfinite(report["b"].error) == is_known
    said = "rounding may hide" in str(report.note)
    assert said == ("rounding may hide" in trainer.table(batch)) == is_noted


class MeanLoss(vn.Trainer):
    def loss(self, model, batch):
        return jnp.mean(model(batch[0]) ** 2)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: MeanLoss(line()).report(data()), TypeError, "A report needs a lik"),
        (
            lambda: Likelihood(peak(0.3, 1.2, 4.0)).report(data(), scale_errors=True),
            ValueError,
            "`scale_errors`.*define `residuals`",
        ),
        (
            lambda: GaussianFit(peak(0.3, 1.2, jnp.nan)).report(data()),
            ValueError,
            "not finite",
        ),
        (
            lambda: jax.jit(lambda b: Tangle(tangle(), train="a").report(b))(X),
            TypeError,
            "runs on the host",
        ),
    ],
)
def test_what_has_no_report(make, error, match):
    with pytest.raises(error, match=match):
        make()


# What it costs


@pytest.mark.parametrize("kind", [GaussianFit, Likelihood])
def test_it_shares_the_program_of_the_errors(kind):
    traces = 0

    class Counted(kind):
        def nll(self, model, batch):
            nonlocal traces
            traces += 1
            return Likelihood.nll(self, model, batch)

        if kind is GaussianFit:

            def residuals(self, model, batch):
                nonlocal traces
                traces += 1
                return GaussianFit.residuals(self, model, batch)

            nll = None

    trainer = Counted(peak(0.3, 1.2, 4.0))
    trainer.standard_errors(data())
    once = traces
    trainer.report(data())
    trainer.table(data())
    trainer.report(data(), scale_errors=kind is GaussianFit)
    assert traces == once


# What there is to read

EXPECTED = """\
fit                   Converged.
────────────────────  ───────────
data                  60
free parameters       3
degrees of freedom    57
chi-squared           58.7715
reduced chi-squared   1.03108
AIC                   4.75877
BIC                   11.0418
edm                   0
errors multiplied by  1.01542

parameter  value  standard error  relative
─────────  ─────  ──────────────  ────────
mean       0.291  0.012           4.3 %
std        1.206  0.012           1 %
power      3.933  0.035           0.89 %

correlations of at least 0.1
────────────────────────────  ──────
std, power                    -0.577"""


class Level(vn.Trainer):
    def residuals(self, model, batch):
        y, std = batch
        return (model["level"] - y) / std


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (0.0000123, "0.0012 %"),
        (0.0431, "4.3 %"),
        (0.994, "99 %"),
        (0.9951, "100 %"),
        (1.234, "120 %"),
        (9.96, "1000 %"),
        (16.4, "1600 %"),
        (99.4, "9900 %"),
        (99.6, "10000 %"),
        (101.0, ""),
    ],
)
@pytest.mark.parametrize("value", [1.0, -3e-30, 2e20])
def test_a_relative_error_is_written_without_an_exponent(error, shown, value):
    batch = np.full(1, value), np.full(1, abs(value) * error)
    *_, line = str(Level({"level": jnp.asarray(value)}).report(batch)).splitlines()
    assert line.startswith("level")
    assert line.endswith(shown)
    assert line.count("%") == bool(shown)


def test_as_text_and_in_a_notebook():
    report = solved().report(data(), scale_errors=True)
    shown = str(report).splitlines()
    edm = next(index for index, line in enumerate(shown) if line[:3] == "edm")
    shown[edm] = EXPECTED.splitlines()[edm]
    shown[1] = EXPECTED.splitlines()[1]
    assert shown == EXPECTED.splitlines()
    page = report._repr_html_()
    assert page.count("<table>") == 3
    assert "<td>std, power</td><td>-0.577</td>" in page
    assert repr(report).startswith("Report(chi_squared=58.7715, degrees_of_freedom=57")
    model = {"<b>": jnp.asarray(1.0)}

    class Escaped(vn.Trainer):
        def residuals(self, model, batch):
            return model["<b>"] - batch

    page = Escaped(model).report(jnp.arange(3.0))._repr_html_()
    assert "<td>&lt;b&gt;</td>" in page
    assert "not at a minimum" not in page


def test_a_long_array_is_cut_in_the_text_alone():
    class Many(vn.Trainer):
        def residuals(self, model, batch):
            return jnp.concatenate([model, model]) - batch

    report = Many(jnp.ones(200)).report(jnp.arange(400.0))
    assert len(report.parameters) == 200
    assert "136 more, in `report.parameters`" in str(report)
    assert len(str(report).splitlines()) < 90


def test_the_text_says_where_all_correlations_are():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(12, 8)))

    class Mixed(vn.Trainer):
        def residuals(self, model, batch):
            return matrix @ model - batch

    report = Mixed(jnp.ones(8)).report(jnp.arange(12.0))
    sizes = [abs(pair.value) for pair in report.correlations]
    assert sizes == sorted(sizes, reverse=True)
    more = sum(size >= 0.1 for size in sizes) - 12
    assert more > 0
    assert f"{more} more, in `report.correlations`  …" in str(report)
    first, second, value = report.correlations[0]
    assert f"{first}, {second}" in str(report)
    assert f"{value:+.3f}" in str(report)


def test_as_a_dictionary_and_a_frame():
    report = solved().report(data())
    written = json.loads(json.dumps(report.to_dict()))
    assert written["stop_reason"] == "Converged."
    assert written["degrees_of_freedom"] == 57
    assert written["p_value"] == report.p_value
    assert written["note"] is None
    assert written["parameters"]["std"]["error"] == report["std"].error
    assert written["correlations"][0][:2] == ["std", "power"]
    frame = report.to_dataframe()
    assert list(frame.columns) == ["value", "error", "status"]
    assert frame.loc["power", "value"] == report["power"].value


def test_without_pandas(monkeypatch):
    report = solved().report(data())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        report.to_dataframe()


def test_it_is_immutable_and_can_be_pickled():
    report = solved().report(data())
    with pytest.raises(AttributeError):
        report.chi_squared = 0.0
    for other in (copy.copy(report), pickle.loads(pickle.dumps(report))):
        assert str(other) == str(report)


@pytest.mark.parametrize("kind", [GaussianFit, Likelihood])
def test_single_precision(kind):
    wide = solved(kind).report(data())
    batch = data(dtype=jnp.float32)
    model = jax.tree.map(lambda x: x.astype(jnp.float32), solved(kind).model)
    narrow = kind(model).report(batch)
    assert narrow.edm < 1e-3
    np.testing.assert_allclose(narrow.aic, wide.aic, rtol=1e-5)
    for name in ("mean", "std", "power"):
        np.testing.assert_allclose(narrow[name].error, wide[name].error, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
def test_a_result_answers():
    trainer = GaussianFit(peak(0.2, 1.1, 3.8), optax.sgd(1e-4))
    result = trainer.fit(data(), 5)
    assert result.report(data()).stop_reason is vn.StopReason.STEPS_TAKEN
    assert trainer.report(data()).stop_reason is None
    assert result.table(data()) == result.trainer.table(data())
    assert result.table() == result.trainer.table()
    assert result.best_loss == result.trainer.best_loss
    assert result.params is result.trainer.params
    ours, theirs = result.standard_errors(data()), trainer.standard_errors(data())
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


class Line(vn.Trainer):
    """The data say nothing of `c`."""

    def residuals(self, model, batch):
        x, y = batch
        return (model["a"] + model["b"] * x + 0 * model["c"] - y) / 0.1


class LineNll(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Line.residuals(self, model, batch)))


# With their modes.
PRIORS_OF_C = {
    "none": (None, 0.3),
    "normal": ({"c": vn.Normal(0.3, 2.0)}, 0.3),
    "other": ({"c": dist.Gamma(2.0, 3.0)}, 1 / 3),
}


@pytest.mark.parametrize("prior", PRIORS_OF_C)
@pytest.mark.parametrize("cls", [Line, LineNll])
def test_what_a_prior_alone_constrains_takes_no_degree_of_freedom(cls, prior):
    x = np.linspace(0, 1, 30)
    y = 1 + 2 * x + 0.1 * np.random.default_rng(0).normal(size=30)
    (b, a), (chi_squared,), *_ = np.linalg.lstsq(np.vander(x, 2) / 0.1, y / 0.1)
    priors, c = PRIORS_OF_C[prior]
    model = jax.tree.map(jnp.asarray, {"a": a, "b": b, "c": c})
    report = cls(model, priors=priors).report((x, y), data_count=30)
    assert report.degrees_of_freedom == 28
    np.testing.assert_allclose(report.aic, chi_squared + 4, rtol=1e-6)
    np.testing.assert_allclose(report.bic, chi_squared + 2 * np.log(30), rtol=1e-6)


class Far(vn.Trainer):
    def residuals(self, model, batch):
        return model["a"] * batch


def test_squares_that_overflow_are_infinite_without_a_warning_of_numpy():
    trainer, batch = Far({"a": jnp.array(1e200)}), jnp.arange(1.0, 5.0)
    assert trainer.report(batch).chi_squared == np.inf
    assert "not at a minimum" in trainer.table(batch)
    many = vn.fit_many([trainer] * 2, batch, 1, solver=LM)
    assert np.isinf(many.to_dict(batch)["chi_squared"]).all()


# P-values that no right model has, with right error bars

LINE = jnp.linspace(0.0, 1.0, 200)
OF_LINE = (
    1.0 + 2.0 * LINE + 0.1 * jnp.asarray(np.random.default_rng(3).normal(size=200))
)


class LineFit(vn.Trainer):
    """Data whose error bars are 0.1; or counts, with an expected number of 20."""

    way: str

    def __init__(self, way, slope=2.0):
        self.way = way
        super().__init__({"at_zero": jnp.array(1.0), "slope": jnp.array(slope)})

    def residuals(self, model, batch):
        line = model["at_zero"] + model["slope"] * LINE
        return REPORTED[self.way][0](line, batch)


def counts_of(factor):
    """Counts that scatter so many times as those of Poisson do."""
    normal = np.random.default_rng(5).normal(size=200)
    rate = 10 + 20 * np.asarray(LINE)
    return jnp.asarray(np.round(np.fmax(rate + factor * np.sqrt(rate) * normal, 0)))


# By name: the residuals, the data, options of the report, what the note says if any.
REPORTED = {
    "right": (lambda line, y: (line - y) / 0.1, OF_LINE, {}, None),
    "few sigma off": (lambda line, y: (line - y) / 0.09, OF_LINE, {}, None),
    "small error bars": (
        *(lambda line, y: (line - y) / 0.01, OF_LINE, {}),
        r"p-value below 1e-06: the model does not describe the data, or their error",
    ),
    "large error bars": (
        *(lambda line, y: (line - y) / 0.5, OF_LINE, {}),
        r"p-value above 1 - 1e-06: .*their error bars say.*scale_errors=True",
    ),
    "none": (lambda line, y: line - y, OF_LINE, {}, r"none were given"),
    "of the scatter": (lambda line, y: line - y, OF_LINE, {"scale_errors": True}, None),
    "sandwich": (
        *(lambda line, y: (line - y) / 0.01, OF_LINE, {"kind": "sandwich"}, None),
    ),
    "robust": (lambda line, y: Robust((line - y) / 0.01), OF_LINE, {}, None),
    "forecast": (lambda line, y: line - y, 1.0 + 2.0 * LINE, {}, None),
    "counts": (lambda line, n: Poisson(10 * line, n), counts_of(1.0), {}, None),
    "counts that scatter": (
        *(lambda line, n: Poisson(10 * line, n), counts_of(3.0), {}),
        r"does not describe the counts, or these scatter more than those of Poisson",
    ),
    "smooth counts": (
        *(lambda line, n: Poisson(10 * line, n), counts_of(0.3), {}),
        r"scatter less than counts of Poisson do",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", REPORTED)
def test_a_note_says_what_an_impossible_p_value_means(way):
    _, batch, options, said = REPORTED[way]
    trainer = LineFit(way)
    if way != "forecast":
        solver = optx.BFGS(1e-8, 1e-8) if way == "robust" else LM
        trainer = trainer.solve(solver, batch).trainer
    note = trainer.report(batch, **options).note
    if said is None:
        assert note is None
    else:
        assert note is not None
        assert re.search(said, note)
    assert "p-value" not in trainer.table(batch, **options)


def test_what_is_not_at_a_minimum_is_told_alone():
    note = LineFit("right", 9.0).report(OF_LINE).note
    assert "not at a minimum" in note
    assert "p-value" not in note

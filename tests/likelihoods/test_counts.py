"""Counts, fitted by their Poisson likelihood, against iminuit and closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
import scipy.special
import scipy.stats
from iminuit import Minuit
from iminuit.cost import poisson_chi2

import vernal as vn
from models import Gaussian

X = np.linspace(-5, 5, 60)


class Spectrum(vn.Trainer):
    def residuals(self, model, batch):
        x, counts = batch
        rate = model["line"](x) + model["background"]
        return vn.likelihoods.Poisson(rate, counts, where=counts >= 0)


class SpectrumNll(vn.Trainer):
    def nll(self, model, batch):
        return Spectrum.residuals(self, model, batch).nll()


def model(power=8.0, mean=0.3, std=1.1, background=0.7, dtype=jnp.float64):
    parts = (jnp.asarray(x, dtype) for x in (mean, std, power))
    return {"line": Gaussian(*parts), "background": jnp.asarray(background, dtype)}


def rates_of(power, mean, std, background):
    return power * np.exp(-0.5 * ((X - mean) / std) ** 2) + background


def data(seed=0, dtype=np.float64, scale=1.0):
    rate = scale * rates_of(8.0, 0.3, 1.1, 0.7)
    return X.astype(dtype), np.random.default_rng(seed).poisson(rate)


def values(tree):
    line = tree["line"]
    return np.array([line.power, line.mean, line.std, tree["background"]], float)


@functools.cache
def minuit():
    counts = data()[1].astype(float)
    chi_squared = lambda *args: poisson_chi2(counts, rates_of(*args))
    found = Minuit(chi_squared, 8, 0.3, 1.1, 0.7, name=("p", "m", "s", "b"))
    found.errordef, found.tol = 1, 1e-6
    found.migrad()
    found.hesse()
    return found


STARTS = {
    "near": model(),
    "far": model(2.0, -2.0, 2.0, 3.0),
    "no line": model(0.01, 1.0, 3.0, 5.0),
    "flat": model(30.0, 0.0, 6.0, 0.01),
}
SOLVERS = {
    "LevenbergMarquardt": optx.LevenbergMarquardt(1e-10, 1e-10),
    "BFGS": optx.BFGS(1e-10, 1e-10),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_solve_ends_where_minuit_does_from_any_start(start):
    result = Spectrum(STARTS[start]).solve(SOLVERS["LevenbergMarquardt"], data())
    assert_solved(result)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("start", ["near", "far"])
def test_counts_are_whitened_at_any_start(start, solver):
    """The expected Fisher matrix has no negative eigenvalue; the Hessian may."""
    trainer = Spectrum(STARTS[start])
    assert np.linalg.eigvalsh(trainer.fisher(data()))[0] > 0
    if start == "far":
        observed = trainer.fisher(data(), kind="observed")
        assert np.linalg.eigvalsh(observed)[0] < 0
    assert_solved(trainer.whiten(data()).solve(SOLVERS[solver], data()))


def assert_solved(result):
    assert result.stop_reason is vn.StopReason.CONVERGED
    known, found = minuit(), values(result.model)
    np.testing.assert_allclose(2 * result.best_loss, known.fval, rtol=1e-8)
    # The sign of the width is not known.
    found[2] = abs(found[2])
    errors = np.asarray(known.errors)
    np.testing.assert_allclose(
        found, np.asarray(known.values), atol=1e-3 * errors.min()
    )


@pytest.fixture(scope="module")
def solved():
    batch = data()
    return Spectrum(model()).solve(SOLVERS["LevenbergMarquardt"], batch).trainer, batch


def test_observed_errors_are_those_of_minuit(solved):
    trainer, batch = solved
    found = values(trainer.standard_errors(batch, kind="observed"))
    np.testing.assert_allclose(found, np.asarray(minuit().errors), rtol=1e-3)
    hessian = trainer.fisher(batch, kind="observed")
    np.testing.assert_allclose(
        hessian, SpectrumNll(trainer.model).fisher(batch), rtol=1e-9, atol=1e-9
    )


def test_expected_errors_are_those_of_the_rates(solved):
    trainer, batch = solved
    flat, unravel = jax.flatten_util.ravel_pytree(trainer.params)
    rates = lambda flat: Spectrum.residuals(trainer, unravel(flat), batch).rate
    jac = np.asarray(jax.jit(jax.jacobian(rates))(flat))
    known = jac.T @ (jac / np.asarray(rates(flat))[:, None])
    for kind in (None, "expected"):
        np.testing.assert_allclose(
            trainer.fisher(batch, kind=kind), known, rtol=1e-10, atol=1e-8
        )
    errors = jax.flatten_util.ravel_pytree(trainer.standard_errors(batch))[0]
    np.testing.assert_allclose(
        errors, np.sqrt(np.diag(np.linalg.inv(known))), rtol=1e-8
    )


def test_the_three_kinds_agree_for_many_counts():
    batch = data(scale=1e5)
    start = model(8e5, background=0.7e5)
    trainer = Spectrum(start).solve(SOLVERS["LevenbergMarquardt"], batch).trainer
    expected = values(trainer.standard_errors(batch))
    for kind, rtol in {"observed": 0.02, "sandwich": 0.35}.items():
        found = values(trainer.standard_errors(batch, kind=kind))
        np.testing.assert_allclose(found, expected, rtol=rtol)


def test_a_report_has_cashs_statistic(solved):
    trainer, batch = solved
    x, counts = batch
    report = trainer.report(batch)
    rate = np.asarray(trainer.model["line"](x) + trainer.model["background"])
    cash = poisson_chi2(np.asarray(counts, float), rate)
    np.testing.assert_allclose(report.chi_squared, cash, rtol=1e-10)
    assert report.data_count == 60
    assert report.degrees_of_freedom == 56
    assert report.error_kind == "expected"
    masked = trainer.report((x, np.where(np.arange(60) < 7, -1, counts)))
    assert masked.data_count == 53
    with pytest.raises(ValueError, match='kind="sandwich"'):
        trainer.report(batch, scale_errors=True)


def test_a_fit_by_gradients_ends_there_too(solved):
    batch = data(dtype=np.float32)
    trainer = Spectrum(model(dtype=jnp.float32), optax.sgd(1.0)).whiten(batch)
    result = trainer.fit(batch, 200, progress=False)
    errors = values(solved[0].standard_errors(solved[1]))
    far = (values(result.model) - values(solved[0].model)) / errors
    assert abs(far).max() < 1e-2


def test_counts_stand_beside_other_data_ties_and_priors(solved):
    """Every part is as it is alone: what is minimised, and the Fisher matrix, add."""
    trainer, batch = solved

    class Both(vn.Trainer):
        def residuals(self, model, batch):
            counts, measured = batch
            left = (model["line"](jnp.array([0.0, 1.0])) - measured) / 0.5
            return {"counts": Spectrum.residuals(self, model, counts), "flux": left}

    class Flux(vn.Trainer):
        def residuals(self, model, batch):
            return (model["line"](jnp.array([0.0, 1.0])) - batch) / 0.5

    measured = jnp.array([7.0, 6.0])
    both, flux = Both(trainer.model), Flux(trainer.model)
    together = both.fisher((batch, measured))
    np.testing.assert_allclose(
        together, trainer.fisher(batch) + flux.fisher(measured), rtol=1e-12
    )
    report = both.report((batch, measured))
    assert report.data_count == 62
    parts = trainer.report(batch).chi_squared + flux.report(measured).chi_squared
    np.testing.assert_allclose(report.chi_squared, parts, rtol=1e-12)
    prior = Both(trainer.model, priors={"background": vn.Normal(0.5, 0.1)})
    report = prior.report((batch, measured))
    np.testing.assert_allclose(report.chi_squared, parts, rtol=1e-12)
    far = (float(trainer.model["background"]) - 0.5) / 0.1
    np.testing.assert_allclose(report.prior_penalty, far**2, rtol=1e-12)
    assert f"prior penalty         {far**2:.6g}" in str(report)


def test_many_have_the_errors_of_each():
    """At the truth, which is near enough to the minimum."""
    stack = np.stack([data(seed)[1] for seed in range(3)])
    stack[1, :5] = -1
    still = [Spectrum(model(), optax.sgd(1e-9))] * 3
    many = vn.fit_many(still, (X, stack), 1, data_axis=(None, 0))
    # A sandwich has the observed curvature in it; expected errors are compared in
    # `tests/many/test_results.py`.
    found = values(many.errors((X, stack), kind="sandwich"))
    for index in range(3):
        own = many.trainer(index)
        known = own.standard_errors((X, stack[index]), kind="sandwich")
        np.testing.assert_allclose(found[:, index], values(known), rtol=1e-6)


def test_a_negative_rate_is_told():
    with pytest.raises(ValueError, match=r"60 of 60 rates are negative, the first at"):
        Spectrum(model(power=-1.0, background=-1.0)).fisher(data())


def test_an_nll_has_no_scores(solved):
    trainer, batch = SpectrumNll(solved[0].model), solved[1]
    for kind in ("expected", "sandwich"):
        with pytest.raises(TypeError, match=f'`kind` is "{kind}".*Define `residuals`'):
            trainer.standard_errors(batch, kind=kind)
    with pytest.raises(TypeError, match='`kind` is "expected"'):
        trainer.fisher(batch, kind="expected")


@pytest.mark.own_words
def test_unknown_kinds_are_refused(solved):
    trainer, batch = solved
    with pytest.raises(ValueError, match="`kind` is 'sandwhich', but must be \"exp"):
        trainer.standard_errors(batch, kind="sandwhich")
    with pytest.raises(ValueError, match="`kind` is 'sandwich', but must be \"exp"):
        trainer.fisher(batch, kind="sandwich")


def test_a_stray_count_hides_no_distance():
    """Where the rate is next to nothing, the residual of scoring has no bound."""

    class Floor(vn.Trainer):
        def residuals(self, model, batch):
            x, counts = batch
            return vn.likelihoods.Poisson(model(x) + 1e-8, counts)

    counts = np.random.default_rng(3).poisson(rates_of(20.0, 0.0, 0.5, 0.0))
    counts[-2] = 1
    start = Gaussian(*(jnp.array(x) for x in (0.3, 0.4, 10.0)))
    batch = X, counts
    result = Floor(start).solve(SOLVERS["LevenbergMarquardt"], batch, max_steps=1)
    assert result.edm > 1
    assert result.stop_reason is vn.StopReason.MAX_STEPS
    assert "not at a minimum" in result.trainer.table(batch)


@pytest.mark.parametrize("kind", ["nll", "residuals", "scoring_residuals"])
def test_expected_counts_that_are_tiny_have_derivatives(kind):
    """Those of a peak's tails, whose squares underflow in single precision."""
    counts = np.array([1e-30, 1e-20, 1e-12, 1e-8, 1.0])
    scales, counts = map(np.ravel, np.meshgrid([0.3, 0.9, 1.05, 4.0], counts))

    def value(scale, count):
        return getattr(vn.likelihoods.Poisson(scale * count, count), kind)()

    both = lambda *args: (jax.grad(value)(*args), jax.grad(jax.grad(value))(*args))
    of = jax.jit(jax.vmap(both))
    narrow, wide = (
        np.asarray(of(scales.astype(dtype), counts.astype(dtype)))
        for dtype in (np.float32, np.float64)
    )
    # In units of the size that such a derivative has.
    unit = counts if kind == "nll" else counts**0.5
    np.testing.assert_allclose(narrow / unit, wide / unit, rtol=2e-4, atol=1e-5)


RATES = [1e-30, 1e-9, 1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0, 299.0, 301.0, 1e4]


@pytest.mark.parametrize("rate", RATES)
def test_the_moments_of_the_deviance(rate):
    """By sums over all counts that have a chance, and by differences of the mean."""
    spread = 40 * math.sqrt(rate) + 40
    n = np.arange(max(math.floor(rate - spread), 0), math.ceil(rate + spread))
    deviance = lambda rate: 2 * (rate - n + scipy.special.xlogy(n, n / rate))
    expect = lambda rate, values: np.sum(scipy.stats.poisson.pmf(n, rate) * values)
    mean_at = lambda rate: expect(rate, deviance(rate))
    mean, apart = mean_at(rate), deviance(rate) - mean_at(rate)
    step = 1e-3 * rate
    below, above = mean_at(rate - step), mean_at(rate + step)
    expected = {
        "mean": mean,
        "variance": expect(rate, apart**2),
        "covariance": math.sqrt(rate) * (above - below) / (2 * step),
        "curvature": rate * (above - 2 * mean + below) / step**2,
    }
    pearson = (n - rate) / math.sqrt(rate)
    powers = apart**3, apart**2 * pearson, apart * pearson**2, pearson**3
    cubes = np.array([expect(rate, power) for power in powers])
    # By one more count.
    changes = np.diff(deviance(rate))
    chances = rate * scipy.stats.poisson.pmf(n[:-1], rate)
    jumps = np.array([np.sum(chances * changes**j) for j in (1, 2, 3, 4)])
    there = np.array([True, True, False])
    rates = jnp.asarray([rate, rate, 7.0])
    found = vn.likelihoods.Poisson(rates, rates, where=there).deviance_moments()
    for name, value in expected.items():
        # With rates so small there is never a count, nor any deviance.
        known = 0 if rate < 1e-12 else value
        own = getattr(found, name)
        np.testing.assert_allclose(own[:2], known, rtol=2e-3, atol=2e-5)
        assert own[2] == 0
    known = np.zeros(4) if rate < 1e-12 else cubes
    # The series has the leading terms alone.
    np.testing.assert_allclose(found.cubes[:, 1], known, rtol=2e-2, atol=0.1)
    assert not found.cubes[:, 2].any()
    known = np.zeros(4) if rate < 1e-12 else jumps
    np.testing.assert_allclose(found.jumps[:, 1], known, rtol=5e-3, atol=2e-3)
    assert not found.jumps[:, 2].any()

"""What a report says of counts: a deviance, and how large it is to be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
import scipy.special
import scipy.stats

import vernal as vn

TOO_FEW = (
    "there are too few counts: the deviance has no known distribution, and no p-value"
)


class Exponential(vn.Trainer):
    def residuals(self, model, batch):
        x, counts = batch
        return vn.likelihoods.Poisson(jnp.exp(model["a"] + model["b"] * x), counts)


def simulated(rate, dtype, rng, size=400):
    x = np.linspace(-1, 1, size).astype(dtype)
    return x, rng.poisson(rate * np.exp(0.3 * x)).astype(dtype)


def truth(rate, dtype=np.float64):
    return {"a": jnp.asarray(np.log(rate), dtype), "b": jnp.asarray(0.3, dtype)}


def at_its_best(batch, rate, std=np.inf):
    """Of an exponential; `std` is the width of a prior of `b`."""
    x, counts = (np.asarray(part, float) for part in batch)

    def slopes(best):
        expected = np.exp(best[0] + best[1] * x)
        return expected, np.stack([expected, x * expected])

    return scored(slopes, (np.log(rate), 0.3), counts, batch[1].dtype, std)


def scored(slopes, start, counts, dtype=float, std=np.inf):
    """The best by scoring, from the rates and their derivatives."""
    start = best = np.array(start)
    prior = np.array([0, std**-2.0])
    for _ in range(30):
        rate, rows = slopes(best)
        slope = rows @ (counts / rate - 1) - prior * (best - start)
        best = best + np.linalg.solve(rows / rate @ rows.T + np.diag(prior), slope)
    return {key: jnp.asarray(x, dtype) for key, x in zip("ab", best, strict=True)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rate", [0.1, 0.3, 1.0, 100.0])
def test_a_model_that_is_right_has_any_p_value(rate, dtype):
    """By chi-squared, 95 % of right models would fail at a mean of one count."""
    rng = np.random.default_rng(1)
    batches = [simulated(rate, dtype, rng) for _ in range(40)]
    found = [Exponential(at_its_best(b, rate)).report(b).p_value for b in batches]
    # Of forty counts in 400 bins, hardly two are in one.
    found = [p for p in found if p is not None]
    assert len(found) > (20 if rate == 0.1 else 39)
    assert np.mean(np.array(found) < 0.05) < 0.2
    assert scipy.stats.kstest(found, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("rate", [0.05, 0.3, 3.0])
def test_the_deviance_to_expect_is_that_of_simulations(rate):
    """Its mean within its scatter, and what it scatters by."""
    rng = np.random.default_rng(2)
    batches = [simulated(rate, np.float64, rng, 800) for _ in range(40)]
    reports = [Exponential(at_its_best(b, rate)).report(b) for b in batches]
    pulls = [
        (r.chi_squared - r.expected_deviance[0]) / r.expected_deviance[1]
        for r in reports
    ]
    assert abs(np.mean(pulls)) < 4 / np.sqrt(len(pulls))
    assert 0.7 < np.std(pulls) < 1.4


class Line(vn.Trainer):
    def residuals(self, model, batch):
        x, counts = batch
        shape = jnp.exp(-0.5 * jnp.square(x / 0.01))
        rate = jnp.exp(model["a"]) * shape + jnp.exp(model["b"])
        return vn.likelihoods.Poisson(rate, counts)


def test_a_bright_line_on_next_to_nothing():
    """A bin that takes a parameter for itself leaves no scatter."""
    x, rng = np.linspace(-1, 1, 301), np.random.default_rng(9)
    shape, start = np.exp(-0.5 * (x / 0.01) ** 2), np.log([800.0, 0.03])

    def slopes(best):
        rows = np.exp(best)[:, None] * np.stack([shape, np.ones(301)])
        return rows.sum(axis=0), rows

    drawn = [rng.poisson(slopes(start)[0]) + 0.0 for _ in range(100)]
    found = [Line(scored(slopes, start, n)).report((x, n)) for n in drawn]
    pulls = [
        (r.chi_squared - r.expected_deviance[0]) / r.expected_deviance[1] for r in found
    ]
    assert 0.85 < np.std(pulls) < 1.25
    assert 0.01 < np.mean([r.p_value > 0.95 for r in found]) < 0.15


class Constant(vn.Trainer):
    def residuals(self, model, batch):
        return vn.likelihoods.Poisson(jnp.full(batch.shape, model["rate"]), batch)


@pytest.mark.parametrize(("size", "rate"), [(2000, 0.05), (200, 0.15)])
def test_a_model_that_is_right_has_seldom_a_small_p_value(size, rate):
    """What is left of the scatter is that of the few bins with two counts: skewed."""
    rng, found = np.random.default_rng(5), []
    for _ in range(120):
        counts = rng.poisson(rate, size).astype(float)
        trainer = Constant({"rate": jnp.asarray(counts.mean())})
        found.append(trainer.report(counts).p_value)
    found = np.array([p for p in found if p is not None])
    assert len(found) > 90
    assert np.mean(found < 0.01) < 0.035
    assert 0.01 < np.mean(found < 0.05) < 0.12


def test_of_many_counts_it_is_that_of_chi_squared():
    batch = simulated(1e6, np.float64, np.random.default_rng(3))
    report = Exponential(at_its_best(batch, 1e6)).report(batch)
    np.testing.assert_allclose(report.expected_deviance, (398, np.sqrt(796)), rtol=1e-4)
    assert report.p_value == pytest.approx(
        scipy.stats.chi2.sf(report.chi_squared, 398), rel=1e-3
    )


class Joint(vn.Trainer):
    """Counts between data of other kinds, of which some are missing."""

    def residuals(self, model, batch):
        x, counts, where = batch
        mean = model["a"] + 0 * x
        rate = jnp.exp(model["a"] + model["b"] * x)
        return [
            jax.lax.complex(mean, mean) - 0.3,
            vn.likelihoods.Poisson(rate, counts, where=where),
            vn.likelihoods.Gaussian(mean, mean * 0.9, where=where),
        ]


def test_counts_beside_other_data():
    """The moments of the parts add up, in the order of the rows."""
    x, counts = simulated(0.5, np.float64, np.random.default_rng(4), 60)
    where = np.arange(60) % 3 > 0
    trainer, batch = Joint(truth(0.5)), (x, counts, where)
    found = trainer.report(batch)
    rate = np.exp(np.log(0.5) + 0.3 * x)[where]
    moments = vn.likelihoods.Poisson(rate, rate).deviance_moments()
    rows = np.zeros((2, 4 * 60))
    rows[:, 120:180][:, where] = moments.covariance, moments.curvature
    jacobian = np.zeros((240, 2))
    jacobian[:60, 0] = jacobian[60:120, 0] = 1
    columns = np.stack([np.ones(40), x[where]], axis=1)
    jacobian[120:180][where] = np.sqrt(rate)[:, None] * columns
    jacobian[180:][where, 0] = 0.1
    inverse = np.linalg.inv(jacobian.T @ jacobian)
    hat = jacobian @ inverse @ jacobian.T
    mean = 120 + 40 + moments.mean.sum() - 2 - 0.5 * np.diag(hat) @ rows[1]
    # Normal data, of which some are missing, and counts: what the fit leaves of each.
    is_there = np.ones(240, bool)
    is_there[120:] = np.tile(where, 2)
    is_count = np.arange(240) // 60 == 2
    taken, left = hat @ rows[0], 1 - np.diag(hat)
    variances, cubes = 2.0 * is_there, 8.0 * is_there + 6 * taken**2
    own = taken[is_count & is_there]
    variances[is_count & is_there] = moments.variance
    weights = np.stack([own**0, -3 * own, 3 * own**2, -(own**3)])
    cubes[is_count & is_there] = (weights * moments.cubes).sum(axis=0)
    std = np.sqrt(left @ (variances - 2 * taken * rows[0] + taken**2))
    np.testing.assert_allclose(found.expected_deviance, (mean, std), rtol=1e-6)
    skewness = left @ cubes / std**3
    p_value = scipy.stats.pearson3.sf(found.chi_squared, skewness, mean, std)
    np.testing.assert_allclose(found.p_value, p_value, rtol=1e-6)


def test_with_priors_it_takes_the_share_of_the_data():
    """Simulated with the truth drawn from the priors, as its p-value is."""
    rng, found = np.random.default_rng(5), []
    for _ in range(60):
        slope = rng.normal(0.3, 0.2)
        x = np.linspace(-1, 1, 300)
        counts = rng.poisson(0.2 * np.exp(slope * x)).astype(float)
        best = at_its_best((x, counts), 0.2, std=0.2)
        trainer = Exponential(best, priors={"b": vn.Normal(0.3, 0.2)})
        report = trainer.report((x, counts))
        assert 1 < report.effective_count < 2
        found.append(report.p_value)
    assert scipy.stats.kstest(found, "uniform").pvalue > 1e-3


def test_a_report_of_counts_speaks_of_the_deviance():
    batch = simulated(3.0, np.float64, np.random.default_rng(6))
    report = Exponential(at_its_best(batch, 3.0)).report(batch)
    text = str(report)
    mean, std = report.expected_deviance
    assert f"expected deviance   {mean:.0f} ± {std:.0f}" in text
    assert "reduced deviance" in text
    assert "chi-squared" not in text
    assert "effective parameters" not in text
    assert report.to_dict()["expected_deviance"] == (mean, std)


def test_effective_parameters_are_shown_beside_priors():
    batch = simulated(3.0, np.float64, np.random.default_rng(6))
    best, priors = at_its_best(batch, 3.0, std=0.2), {"b": vn.Normal(0.3, 0.2)}
    report = Exponential(best, priors=priors).report(batch)
    assert report.free_count == 2
    assert report.aic == pytest.approx(report.chi_squared + 2 * report.effective_count)
    assert f"effective parameters  {report.effective_count:.3f}" in str(report)


@pytest.mark.parametrize("kind", [None, "observed", "sandwich"])
def test_data_that_are_not_whole_numbers_are_told(kind):
    """Those of rates; a sandwich takes its errors from their scatter."""
    x, counts = simulated(3.0, np.float64, np.random.default_rng(7))
    trainer = Exponential(at_its_best((x, counts / 2), 3.0))
    report = trainer.report((x, counts / 2), kind=kind)
    is_told = "data of `Poisson` are not whole numbers" in str(report)
    assert is_told == (kind != "sandwich")
    assert is_told == ("whole" in trainer.table((x, counts / 2), kind=kind))
    assert report.p_value is None
    assert "p-value" not in str(report)
    assert np.isnan(report.expected_deviance).all()


@pytest.mark.parametrize("count", [0, 1, 9])
def test_hardly_more_counts_than_parameters_have_no_p_value(count):
    x, counts = np.linspace(-1, 1, 30), np.zeros(30)
    counts[:count] = 1
    report = Exponential(truth(max(count, 1e-3) / 30)).report((x, counts))
    assert np.isnan(report.expected_deviance).all()
    assert report.p_value is None
    assert "reduced deviance" in str(report)
    assert "expected deviance" not in str(report)
    assert str(report).endswith(TOO_FEW)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("counts", "bins", "is_known"),
    [
        (5, 100, False),
        (6, 100, False),
        (12, 100, False),
        (20, 2000, False),
        (18, 6, True),
        (24, 4, True),
        (25, 100, True),
        (60, 100, True),
    ],
)
def test_a_deviance_of_few_values_has_no_p_value(counts, bins, is_known, dtype):
    """Such as that of 12 counts in 100 bins: half of the time, all are in others."""
    rng = np.random.default_rng(37)
    data = rng.multinomial(counts, np.ones(bins) / bins).astype(dtype)
    trainer = Constant({"rate": jnp.asarray(counts / bins, dtype)})
    report = trainer.report(data)
    # Five are exactly as many as are needed for this: rounding does not matter.
    assert np.isfinite(report.expected_deviance).all()
    assert (report.p_value is None) == (not is_known)
    assert (report.note == TOO_FEW) == (not is_known)
    if is_known:
        # With as many counts, as a fit of their mean has.
        drawn = rng.multinomial(counts, np.ones(bins) / bins, 20_000)
        expected = simulated_p_value(drawn, counts / bins, data)
        # One pair more or less among 25 counts makes a difference of as much.
        assert report.p_value == pytest.approx(expected, abs=4 / counts)


def simulated_p_value(drawn, rate, data):
    """The share of drawn counts with a deviance that is as large, or larger."""
    deviance = lambda n: 2 * (rate - n + scipy.special.xlogy(n, n / rate)).sum(axis=-1)
    return np.mean(deviance(drawn) >= deviance(data.astype(float)) - 1e-6)


class Signal(vn.Trainer):
    """A line above a background that is known."""

    def residuals(self, model, batch):
        background, counts = batch
        line = jnp.exp(-0.5 * jnp.square(jnp.linspace(-25, 25, 100)))
        rate = background + model["s"] * line.astype(background.dtype)
        return vn.likelihoods.Poisson(rate, counts)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("held_by", ["bound", "prior"])
@pytest.mark.parametrize("expected", [1e-4, 0.01, 0.1, 3.0])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_counts_of_known_rates_have_their_own_p_value(
    count, expected, held_by, dtype
):
    """Of equal rates, single counts have a deviance that grows with their number."""
    rate = np.full(100, expected / 100, dtype)
    counts = np.zeros(100, dtype)
    counts[:count] = 1
    options = {"bounds": {"s": (0, None)}}
    if held_by == "prior":
        options = {"priors": {"s": vn.Normal(0.0, 1e-7)}}
    report = Signal({"s": jnp.zeros((), dtype)}, **options).report((rate, counts))
    if held_by == "prior":
        assert report.effective_count < 1e-2
    else:
        assert report.parameters[0].status == "at its bound (0)"
    # P(N >= n), with next to nothing for less than n of which two are in one bin.
    known = scipy.stats.poisson.sf(count - 1, expected)
    assert report.p_value == pytest.approx(known, rel=0.1 if expected > 1 else 2e-3)
    assert report.note is None or TOO_FEW not in report.note
    assert report.to_dict()["p_value"] == report.p_value


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_few_counts_of_unlike_rates_are_simulated(seed):
    """Some bins expect more than one count, and may have several."""
    rng = np.random.default_rng(seed)
    rate = 1.5 * np.exp(-np.arange(100) / 3.0)
    counts = rng.poisson(rate).astype(float)
    bounds = {"s": (0, None)}
    trainer = Signal({"s": jnp.asarray(0.0)}, bounds=bounds)
    report = trainer.report((rate, counts))
    expected = simulated_p_value(rng.poisson(rate, (20_000, 100)), rate, counts)
    assert report.p_value == pytest.approx(expected, abs=0.02)


def test_data_without_counts_of_many_have_a_report():
    counts, rate = np.zeros((2, 100)), np.full(100, 1e-6)
    bounds, batch = {"s": (0, None)}, (rate, counts)
    trainers = [Signal({"s": jnp.asarray(0.0)}, optax.sgd(1e-9), bounds=bounds)] * 2
    result = vn.fit_many(trainers, batch, 1, data_axis=(None, 0))
    assert result.report(1, batch).p_value == pytest.approx(1)


def test_as_many_parameters_as_data_are_no_lack_of_counts():
    batch = np.array([-1.0, 1.0]), np.array([900.0, 1100.0])
    solver = optx.LevenbergMarquardt(1e-4, 1e-4)
    report = Exponential(truth(900.0)).solve(solver, batch).trainer.report(batch)
    assert report.degrees_of_freedom == 0
    assert report.p_value is None
    assert report.note is None


def test_a_count_of_data_that_cannot_be_theirs_is_refused():
    x, counts = simulated(3.0, np.float64, np.random.default_rng(8), 50)
    trainer = Exponential(truth(3.0))
    assert trainer.report((x, counts), data_count=50).data_count == 50
    with pytest.raises(ValueError, match="data_count` is 1, but the data constrain 2"):
        trainer.report((x, counts), data_count=1)
    with pytest.raises(ValueError, match="data_count` is 51, but there are 50 resid"):
        trainer.report((x, counts), data_count=51)
    with pytest.raises(ValueError, match=r"cannot stand .*Poisson\(\.\.\., where"):
        trainer.report((x, counts), data_count=40)

"""Degrees of freedom: what data and priors share counts in part."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optimistix as optx
import pytest
import scipy.stats
from numpyro.distributions import biject_to, constraints

import vernal as vn

LM = optx.LevenbergMarquardt(1e-12, 1e-12)
RNG = np.random.default_rng(5)


class Linear(vn.Trainer):
    def residuals(self, model, batch):
        matrix, target = batch
        return matrix @ model["x"] - target


class LinearNll(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Linear.residuals(self, model, batch)))


KINDS = {"residuals": Linear, "nll": LinearNll}


def smoother_trace(matrix, precision):
    """The trace of the hat matrix, by hand."""
    both = matrix.T @ matrix + precision
    return np.trace(matrix @ np.linalg.solve(both, matrix.T))


def turned(condition, rows=20, size=5):
    """A matrix of this condition, of which no unit of a parameter is the cause."""
    left, right = (np.linalg.qr(RNG.normal(size=(n, size)))[0] for n in (rows, size))
    return left * np.geomspace(1, 1 / condition, size) @ right.T


PLAIN = RNG.normal(size=(20, 5))
LINE = np.stack([np.ones(20), np.linspace(0, 1, 20)], axis=1)
WEAK = np.concatenate([LINE, 0.01 * RNG.normal(size=(20, 12))], axis=1)
WIDE = 0.3 * RNG.normal(size=(10, 25))
UNITS = np.array([1e20, 1e-20, 1.0, 1e10, 1e-10])
FREE = 1e8  # so wide that it is no prior

# A matrix, the widths of priors, and units of parameters.
CASES = {
    "comparable": (PLAIN, np.geomspace(0.05, 2, 5), 1.0),
    "weak nuisances": (WEAK, np.array([FREE] * 2 + [1.0] * 12), 1.0),
    "more than data": (WIDE, np.ones(25), 1.0),
    "units": (PLAIN, np.full(5, 0.2), UNITS),
    "narrow": (PLAIN, np.full(5, 1e-9), 1.0),
    "ill": (turned(1e5), np.full(5, 1e4), 1.0),
}


def reported(of, matrix, std, **options):
    rng = np.random.default_rng(1)
    noise = rng.normal(size=len(matrix))
    target = matrix @ (std * rng.normal(size=len(std))) + noise
    rows = np.concatenate([matrix, np.diag(1 / std)])
    scale = abs(rows).max(axis=0)
    both = np.append(target, np.zeros(len(std)))
    mode = np.linalg.lstsq(rows / scale, both, rcond=None)[0] / scale
    trainer = KINDS[of]({"x": jnp.asarray(mode)}, priors={"x": vn.Normal(0.0, std)})
    count = {} if of == "residuals" else {"data_count": len(matrix)}
    report = trainer.report((matrix, target), **count, **options)
    return report, np.sum((matrix @ mode - target) ** 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_fitted_is_the_trace_of_the_smoother(kind, case):
    matrix, std, units = CASES[case]
    fitted = smoother_trace(matrix, np.diag(std**-2.0))
    report, chi_squared = reported(kind, matrix * units, std / units)
    count = len(matrix)
    near = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(report.degrees_of_freedom, count - fitted, **near)
    np.testing.assert_allclose(report.aic, chi_squared + 2 * fitted, **near)
    bic = chi_squared + fitted * np.log(count)
    np.testing.assert_allclose(report.bic, bic, **near)
    if kind == "residuals":
        degrees = count - fitted
        np.testing.assert_allclose(
            report.reduced_chi_squared, chi_squared / degrees, **near
        )
        p_value = scipy.stats.chi2.sf(chi_squared, degrees)
        np.testing.assert_allclose(report.p_value, p_value, **near)
        shown = re.escape(f"{report.degrees_of_freedom:.6g}")
        assert re.search(f"degrees of freedom +{shown}", str(report))


def test_no_condition_number_is_too_large():
    matrix, std = turned(1e12), 1e11
    fitted = np.sum(1 / (1 + (std * np.geomspace(1, 1e-12, 5)) ** -2.0))
    report, _ = reported("residuals", matrix, np.full(5, std))
    np.testing.assert_allclose(20 - report.degrees_of_freedom, fitted, atol=1e-4)


@pytest.mark.parametrize("kind", ["observed", "sandwich"])
def test_it_does_not_depend_on_the_kind_of_errors(kind):
    args = "residuals", *CASES["comparable"][:2]
    report, other = (reported(*args, kind=own)[0] for own in (kind, "expected"))
    assert report.error_kind == kind
    np.testing.assert_allclose(report.degrees_of_freedom, other.degrees_of_freedom)


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_to_the_rank_as_priors_widen_and_to_none_as_they_narrow(kind):
    found = [
        20 - reported(kind, PLAIN, np.full(5, width))[0].degrees_of_freedom
        for width in (1e-12, 1e-3, 1e-1, 1.0, 1e3, 1e12)
    ]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_priors_it_is_whole(kind):
    x, y = np.linspace(0, 1, 9), np.arange(9.0) % 4
    trainer = KINDS[kind]({"x": jnp.zeros(2)})
    report = trainer.report((np.vander(x, 2), y), data_count=9)
    assert type(report.degrees_of_freedom) is int
    assert re.search(r"degrees of freedom +7\n", str(report))
    assert "degrees_of_freedom=7, " in repr(report)


def test_p_values_are_uniform():
    """Where the truth is drawn from the prior, as the prior says."""
    rng, many = np.random.default_rng(2), 300
    nuisances = 0.05 * rng.normal(size=(40, 20))
    matrix = np.concatenate([np.vander(np.linspace(0, 1, 40), 2), nuisances], axis=1)
    truth = np.concatenate([np.ones((2, many)), rng.normal(size=(20, many))])
    targets = matrix @ truth + rng.normal(size=(40, many))
    rows = np.concatenate([matrix, np.eye(20, 22, 2)])
    both = np.concatenate([targets, np.zeros((20, many))])
    modes = np.linalg.lstsq(rows, both, rcond=None)[0]
    left = np.sum((matrix @ modes - targets) ** 2, axis=0)

    priors = {"nu": vn.Normal(0.0, 1.0)}
    trainer = Nuisances({"ab": jnp.ones(2), "nu": jnp.zeros(20)}, priors=priors)
    report = trainer.solve(LM, (matrix, targets[:, 0])).report((matrix, targets[:, 0]))
    degrees = report.degrees_of_freedom
    p_values = scipy.stats.chi2.sf(left, degrees)
    np.testing.assert_allclose(report.p_value, p_values[0], rtol=1e-6)
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01
    # Each nuisance as a whole parameter:
    wrong = scipy.stats.chi2.sf(left, 18)
    assert scipy.stats.kstest(wrong, "uniform").pvalue < 1e-9


class Nuisances(vn.Trainer):
    def residuals(self, model, batch):
        matrix, target = batch
        return matrix @ jnp.concatenate([model["ab"], model["nu"]]) - target


def nuisances(target, precision=None, **options):
    """At the best, with a precision of the nuisances, or with these at zero."""
    size = 2 if precision is None else 14
    matrix, prior = (
        WEAK[:, :size],
        np.diag([0, 0, *[precision or 0] * 12])[:size, :size],
    )
    best = np.linalg.solve(matrix.T @ matrix + prior, matrix.T @ target)
    best = np.append(best, np.zeros(14 - size))
    model = {"ab": jnp.asarray(best[:2]), "nu": jnp.asarray(best[2:])}
    return Nuisances(model, **options)


def test_what_is_known_tightly_counts_as_what_is_frozen():
    batch = WEAK, WEAK[:, :2].sum(axis=1) + np.random.default_rng(3).normal(size=20)
    frozen = nuisances(batch[1], train="ab").report(batch)
    priors = {"nu": vn.Normal(0.0, 1e-3)}
    known = nuisances(batch[1], 1e6, priors=priors).report(batch)
    assert known.free_count == frozen.free_count + 12
    for name in ("p_value", "reduced_chi_squared", "aic", "bic"):
        ours, theirs = getattr(known, name), getattr(frozen, name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_that_of_many_is_that_of_one():
    rng = np.random.default_rng(4)
    targets = WEAK[:, :2].sum(axis=1) + rng.normal(size=(3, 20))
    priors = {"nu": vn.Normal(0.0, 1.0)}
    trainer = Nuisances({"ab": jnp.ones(2), "nu": jnp.zeros(12)}, priors=priors)
    data = WEAK, targets
    many = vn.fit_many([trainer] * 3, data, 50, solver=LM, data_axis=(None, 0))
    for index, target in enumerate(targets):
        ours = many.report(index, data)
        theirs = nuisances(target, 1.0, priors=priors).report((WEAK, target))
        np.testing.assert_allclose(ours.degrees_of_freedom, theirs.degrees_of_freedom)
        np.testing.assert_allclose(ours.p_value, theirs.p_value, rtol=1e-6)
        assert 17 < ours.degrees_of_freedom < 18


PRIORS = {
    "normal": lambda: dist.Normal(np.array([0.5, 0.5]), 0.3),
    "elements": lambda: dist.Gamma(3.0, np.array([2.0, 4.0])),
    "correlated": lambda: dist.MultivariateNormal(
        np.zeros(2), np.array([[0.04, 0.03], [0.03, 1]])
    ),
    "uniform": lambda: dist.Uniform(0.0, 9.0),
}
BATCH = LINE, LINE.sum(axis=1) + np.random.default_rng(6).normal(size=20)
POSITIVE = biject_to(constraints.positive)


@functools.cache
def at_the_mode(prior):
    """The mode, by Newton's method, and the curvature of the prior there."""
    matrix, target = BATCH
    penalty = lambda x: -jnp.sum(PRIORS[prior]().log_prob(x))
    both = lambda x: 0.5 * jnp.sum((matrix @ x - target) ** 2) + penalty(x)
    newton = lambda x: jnp.linalg.solve(jax.hessian(both)(x), jax.grad(both)(x))
    step, x = jax.jit(lambda x: x - newton(x)), jnp.ones(2)
    for _ in range(20):
        x = step(x)
    return x, np.asarray(jax.jit(jax.hessian(penalty))(x))


@pytest.mark.parametrize("is_bijected", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_priors_of_any_kind_count_by_their_curvature(prior, is_bijected):
    # In turn: each kind has priors with and without a bijection.
    kind = list(KINDS)[(list(PRIORS).index(prior) + is_bijected) % 2]
    bounds = {"x": POSITIVE} if is_bijected else {}
    options = {"priors": {"x": PRIORS[prior]()}, "bounds": bounds}
    mode, curvature = at_the_mode(prior)
    report = KINDS[kind]({"x": mode}, **options).report(BATCH, data_count=20)
    expected = 20 - smoother_trace(LINE, curvature)
    np.testing.assert_allclose(report.degrees_of_freedom, expected, rtol=1e-6)
    if prior == "uniform":
        assert report.degrees_of_freedom == 18


class Parts(vn.Trainer):
    def residuals(self, model, batch):
        x = jnp.concatenate([model["pair"], model["tied"]])
        return Linear.residuals(self, {"x": x}, batch)


class PartsNll(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Parts.residuals(self, model, batch)))


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("kind", [Parts, PartsNll])
def test_what_is_held_is_not_fitted_and_what_is_tied_is_fitted_once(kind, is_held):
    target = PLAIN[:, :4] @ np.array([-1.0, 1.0, -2.0, 2.0])
    matrix = (PLAIN[:, :2] + 2 * PLAIN[:, 2:4])[:, is_held:]
    precision = 25 * np.eye(matrix.shape[1])
    mode = np.linalg.solve(matrix.T @ matrix + precision, matrix.T @ target)
    pair = jnp.concatenate([jnp.zeros(is_held), mode])
    trainer = kind(
        {"pair": pair, "tied": 2 * pair},
        bounds={"pair": ([0.0 if is_held else -jnp.inf, -jnp.inf], None)},
        priors={"pair": vn.Normal(0.0, 0.2)},
        ties={"tied": lambda m: 2 * m["pair"]},
    )
    report = trainer.report((PLAIN[:, :4], target), data_count=20)
    fitted = smoother_trace(matrix, precision)
    assert report.free_count == 2 - is_held
    np.testing.assert_allclose(report.degrees_of_freedom, 20 - fitted, rtol=1e-6)


class Counts(vn.Trainer):
    def residuals(self, model, batch):
        matrix, counts, there = batch
        return vn.likelihoods.Poisson(matrix @ model["x"], counts, where=there)


def test_of_counts_the_curvature_is_the_expected_one_of_those_that_are_there():
    rate, there = LINE @ np.array([20.0, 30.0]), np.arange(20) != 7
    counts = np.random.default_rng(7).poisson(rate).astype(float)
    best = np.array([20.0, 30.0])
    for _ in range(20):  # by scoring
        rate = LINE @ best
        rows = (LINE / np.sqrt(rate)[:, None])[there]
        left = rows.T @ ((counts - rate) / np.sqrt(rate))[there] - (best - 25) / 9
        best = best + np.linalg.solve(rows.T @ rows + np.eye(2) / 9, left)
    fitted = smoother_trace(rows, np.eye(2) / 9)
    trainer = Counts({"x": jnp.asarray(best)}, priors={"x": vn.Normal(25.0, 3.0)})
    report = trainer.report((LINE, counts, there))
    np.testing.assert_allclose(report.degrees_of_freedom, 19 - fitted, rtol=1e-6)


class Downwards(vn.Trainer):
    """Of `x` the data curve downwards, and of `y` upwards."""

    def nll(self, model, batch):
        return 0.5 * (batch * model["y"] ** 2 - 0.5 * model["x"] ** 2)


def test_it_is_between_none_and_all_where_the_data_curve_downwards():
    model, batch = {"x": jnp.array(0.0), "y": jnp.array(0.0)}, jnp.array(1.0)
    priors = {"x": vn.Normal(0.0, 1.0), "y": vn.Normal(0.0, 1.0)}
    report = Downwards(model, priors=priors).report(batch, data_count=4)
    assert report.degrees_of_freedom == pytest.approx(3.5)

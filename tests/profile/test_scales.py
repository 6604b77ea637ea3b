"""Profiles of parameters whose scales are far apart."""

import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

import vernal as vn
import vernal.plot

X = np.linspace(-5, 5, 40)
RATE = lambda p, of=np: p["a"] * of.exp(-0.5 * ((X - p["c"]) / p["w"]) ** 2) + p["b"]


class Counts(vn.Trainer):
    def residuals(self, model, batch):
        return vn.likelihoods.Poisson(RATE(model, jnp), batch)


def by_hand(b, counts):
    """Minimises the negative log-likelihood with the background held."""

    def nll(p):
        rate = RATE(dict(zip("acw", p, strict=True), b=b))
        if min(p[0], p[2]) <= 0:
            return np.inf
        rate = np.maximum(rate, 1e-300)
        return np.sum(rate - counts + scipy.special.xlogy(counts, counts / rate))

    point = np.array([6.8, -0.83, 0.44])
    for _ in range(3):
        options = {"xatol": 1e-9, "fatol": 1e-11, "maxiter": 4000}
        found = scipy.optimize.minimize(
            nll, point, method="Nelder-Mead", options=options
        )
        point = found.x
    return found


def test_a_background_at_its_bound_hides_no_rise():
    """Without counts the rate between the lines sets a unit next to zero."""
    truth = {"a": 6.7, "c": -0.9, "w": 0.45, "b": 0.0}
    counts = np.random.default_rng(0).poisson(RATE(truth)).astype(float)
    bounds = {"a": (0, None), "c": (-4, 4), "w": (0.2, 3), "b": (0, None)}
    best = by_hand(0.0, counts)
    model = dict(zip("acw", map(jnp.asarray, best.x), strict=True), b=jnp.asarray(0.0))
    solver, values = optx.LevenbergMarquardt(1e-6, 1e-6), [1e-3, 1e-2, 0.1, 0.3]
    profile = Counts(model, bounds=bounds).profile(solver, counts, "b", values)
    expected = [2 * (by_hand(b, counts).fun - best.fun) for b in values]
    np.testing.assert_allclose(profile.delta, expected, rtol=1e-3)
    assert all(profile.converged)


class Narrow(vn.Trainer):
    """Counts of a line so narrow that beside it the rate is 1e-60."""

    def residuals(self, model, batch):
        line, counts = batch
        return vn.likelihoods.Poisson(model["a"] * line + model["b"], counts)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_background_at_its_bound_has_a_limit(dtype):
    """Its error there is 1e-30: in steps of that the likelihood seems to be flat."""
    line, counts = np.exp(-0.5 * (X / 0.3) ** 2), np.zeros(X.size)
    counts[17:23] = 1, 5, 9, 8, 4, 2

    def least(b):
        nll = lambda a: np.sum(a * line + b - scipy.special.xlogy(counts, a * line + b))
        return scipy.optimize.minimize_scalar(nll, (5, 10), tol=1e-10)

    def limit(rise):
        away = lambda b: 2 * (least(b).fun - least(0.0).fun) - rise
        return scipy.optimize.brentq(away, 0, 1)

    batch = line.astype(dtype), counts.astype(dtype)
    best = {"a": jnp.asarray(least(0.0).x, dtype), "b": jnp.asarray(0, dtype)}
    solver = optx.LevenbergMarquardt(1e-6, 1e-6)
    trainer = Narrow(best, bounds={"b": (0, None)})
    for level in (0.683, 0.954):
        low, high = trainer.intervals(solver, batch, "b", level)["b"]
        assert low == 0
        expected = limit(scipy.stats.chi2.ppf(level, 1))
        np.testing.assert_allclose(high, expected, rtol=1e-4)
    profile = trainer.profile(solver, batch, "b")
    np.testing.assert_allclose(profile.values[[0, -1]], [0, limit(9.0)], rtol=1e-4)
    assert all(profile.converged)
    ax = vernal.plot.contour(trainer, solver, batch, "a", "b", levels=0.954)
    (path,) = ax.collections[0].get_paths()
    highest = limit(scipy.stats.chi2.ppf(0.954, 2))
    np.testing.assert_allclose(path.vertices[:, 1].max(), highest, rtol=1e-2)

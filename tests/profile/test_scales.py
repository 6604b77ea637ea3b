"""Profiles of parameters whose scales are far apart."""

import jax.numpy as jnp
import numpy as np
import optimistix as optx
import scipy.optimize
import scipy.special

import vernal as vn

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
    return found.fun


def test_a_background_at_its_bound_hides_no_rise():
    """Without counts the rate between the lines sets a unit next to zero."""
    truth = {"a": 6.7, "c": -0.9, "w": 0.45, "b": 0.0}
    counts = np.random.default_rng(0).poisson(RATE(truth)).astype(float)
    bounds = {"a": (0, None), "c": (-4, 4), "w": (0.2, 3), "b": (0, None)}
    start = {k: jnp.asarray(v + 0.1 * (k == "b")) for k, v in truth.items()}
    solver = optx.LevenbergMarquardt(1e-6, 1e-6)
    trainer = Counts(start, bounds=bounds).whiten(counts)
    trainer = trainer.solve(solver, counts).trainer
    assert trainer.model["b"] == 0
    values = [1e-3, 1e-2, 0.1, 0.3]
    profile = trainer.profile(solver, counts, "b", values)
    least = by_hand(0.0, counts)
    expected = [2 * (by_hand(b, counts) - least) for b in values]
    np.testing.assert_allclose(profile.delta, expected, rtol=1e-3)
    assert all(profile.converged)

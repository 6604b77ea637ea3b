"""Where a parameter is held at its bound, others may do nothing: no minimum yet."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
import scipy.optimize

import vernal as vn

INF = np.inf
T = np.linspace(0.0, 10.0, 60)
NOISE = 0.1 * np.random.default_rng(0).normal(size=60)
WAVE = 2 * np.sin(2 * T + 0.5) + NOISE


def wave(of, x, times=2 * T):
    return x[0] * of.sin(of.asarray(times, x.dtype) + x[1])


def orbit(of, x):
    """To first order in the eccentricity, without which only `w + m` counts."""
    speed, e, w, m = of.asarray(x)
    anomaly = T + m
    return speed * (of.cos(anomaly + 2 * e * of.sin(anomaly) + w) + e * of.cos(w))


# The model, what is measured, the start, and the bounds.
HELD = {
    "amplitude and phase": (
        lambda of, x: wave(of, x) + x[2],
        WAVE + 1,
        [1.0, -2.5, 0.0],
        ([0, -INF, -INF], [INF] * 3),
    ),
    "nothing else": (wave, WAVE, [1.0, -2.5], ([0, -INF], [INF] * 2)),
    "an upper bound": (
        lambda of, x: 2 * x[2] - wave(of, x),
        WAVE + 1,
        [-1.0, -2.5, 0.0],
        ([-INF] * 3, [0, INF, INF]),
    ),
    "two waves": (
        lambda of, x: wave(of, x) + wave(of, x[2:], 3 * T),
        WAVE + np.sin(3 * T - 1),
        [0.0, -2.5, 0.0, 2.0],
        ([0, -INF, 0, -INF], [INF] * 4),
    ),
    "eccentricity and periapsis": (
        orbit,
        orbit(np, [3.0, 0.2, 0.4, 1.0]) + NOISE,
        [3.0, 0.0, -2.6, 4.0],
        ([0, 0, -INF, -INF], [INF, 0.9, INF, INF]),
    ),
}
# Where nothing can be gained, though something is held and something else idle.
OPTIMA = {
    "no other sign": (
        lambda of, x: x[0] * (x[1] ** 2 + 1) + x[2],
        NOISE - T / 10,
        [1.0, -2.5, 0.0],
        ([0, -INF, -INF], [INF] * 3),
    ),
    "idle anyway": (
        lambda of, x: x[0] * of.asarray(T, x.dtype) + 0 * x[1] + x[2],
        NOISE - T / 10,
        [1.0, -2.5, 0.0],
        ([0, -INF, -INF], [INF] * 3),
    ),
    "a bounded phase": (
        lambda of, x: wave(of, x) + x[2],
        WAVE + 1,
        [1.0, -2.5, 0.0],
        ([0, -3.0, -INF], [INF, -2.2, INF]),
    ),
    "degenerate": (
        lambda of, x: x[0] * of.asarray(T, x.dtype) + (x[1] + x[2]),
        NOISE - T / 10,
        [1.0, -2.5, 0.0],
        ([0, -INF, -INF], [INF] * 3),
    ),
}
CASES = {**HELD, **OPTIMA}
SOLVERS = {
    "LevenbergMarquardt": optx.LevenbergMarquardt(1e-8, 1e-8),
    "BFGS": optx.BFGS(1e-8, 1e-8),
}


def of_size(size):
    """The cases of so many parameters, which share programs."""
    return [name for name, case in CASES.items() if len(case[2]) == size]


class Wave(vn.Trainer):
    """The batch says which of the cases of its size it is."""

    def __init__(self, name, dtype=jnp.float64):
        _, _, start, bounds = CASES[name]
        # Far off instead of none, so that other bounds are the same program.
        low, high = np.clip(bounds, -100, 100)
        start = jnp.asarray(start, dtype)
        super().__init__(start, optax.adam(0.02), bounds={"": (low, high)})

    def differences(self, model, batch):
        index, measured = batch
        curves = [
            lambda x, fn=CASES[name][0]: jnp.broadcast_to(fn(jnp, x), T.shape)
            for name in of_size(model.size)
        ]
        return (jax.lax.switch(index, curves, model) - measured) / 0.1


class Fit(Wave):
    def residuals(self, model, batch):
        return self.differences(model, batch)


class Likelihood(Wave):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(self.differences(model, batch) ** 2)


def data(name, dtype=jnp.float64):
    _, measured, start, _ = CASES[name]
    index = of_size(len(start)).index(name)
    return jnp.asarray(index), jnp.asarray(measured, dtype)


def lowest(name):
    """The lowest loss that SciPy finds."""
    fn, measured, start, (low, high) = CASES[name]
    rows = lambda x: (fn(np, np.asarray(x)) - measured) / 0.1
    inside = np.clip(start, np.add(low, 1e-3), np.subtract(high, 1e-3))
    return scipy.optimize.least_squares(rows, inside, bounds=(low, high)).cost


# By BFGS those of three parameters, which share a program.
@pytest.mark.parametrize(
    ("name", "solver"),
    [(name, "LevenbergMarquardt") for name in CASES]
    + [(name, "BFGS") for name in of_size(3)],
)
def test_solvers_leave_a_plateau(name, solver):
    result = Fit(name).solve(SOLVERS[solver], data(name))
    np.testing.assert_allclose(float(result.best_loss), lowest(name), rtol=1e-6)
    assert result.stop_reason is vn.StopReason.CONVERGED


WAYS = {
    "nll": (Likelihood, "BFGS", jnp.float64),
    "whitened": (
        lambda name: Fit(name).whiten(data(name)),
        "LevenbergMarquardt",
        jnp.float64,
    ),
    "float32": (lambda name: Fit(name, jnp.float32), "BFGS", jnp.float32),
}


@pytest.mark.parametrize("way", WAYS)
def test_any_trainer_leaves_it(way):
    name = "nothing else"
    make, solver, dtype = WAYS[way]
    result = make(name).solve(SOLVERS[solver], data(name, dtype))
    np.testing.assert_allclose(float(result.best_loss), lowest(name), rtol=1e-5)


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6, 7, 8])
def test_a_solve_without_steps_left_has_not_converged(steps):
    name = "amplitude and phase"
    result = Fit(name).solve(SOLVERS["BFGS"], data(name), max_steps=steps)
    is_best = result.best_loss < 2 * lowest(name)
    assert is_best or result.stop_reason is not vn.StopReason.CONVERGED


@pytest.mark.parametrize("name", CASES)
def test_a_fit_that_ends_on_it_has_stopped_short(name):
    stop = vn.Converged(1e-8, 20)
    result = Fit(name).fit(data(name), 5_000, stop=stop, progress=False)
    told = "The loss is flat here, and lower across, along [" in result.explain()
    assert told == (name in HELD)
    assert not told or result.stop_reason is vn.StopReason.STALLED


def test_where_the_loss_is_not_finite_nothing_is_looked_for():
    """One of the parameters starts on its bound."""
    index, measured = data("two waves")
    batch = index, jnp.full_like(measured, jnp.nan)
    result = Fit("two waves").solve(SOLVERS["LevenbergMarquardt"], batch)
    assert result.stop_reason is vn.StopReason.NON_FINITE
    assert "flat" not in result.explain()

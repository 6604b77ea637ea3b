"""Minima of symmetric models, where residuals have no slope."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from scipy.optimize import brentq
from scipy.stats import chi2

import vernal as vn

PLACES = np.linspace(-5.0, 5.0, 60)
NOISE = 0.05
STOP = vn.Converged(1e-9, 30)
SOLVERS = {
    "BFGS": optx.BFGS(1e-8, 1e-8),
    "LevenbergMarquardt": optx.LevenbergMarquardt(1e-8, 1e-8),
}


def width(height, width, x):
    """A line as broad as the instrument, and its own width."""
    variance = width**2 + 1
    return height / variance**0.5 * math.exp(-0.5) ** (x**2 / variance)


def phase(height, phase, x):
    """The symmetric point is not zero."""
    return height + jnp.cos(phase - 3) * jnp.sin(x)


def stars(height, half, x):
    """Two stars, which are one."""
    bell = lambda place: math.exp(-0.5) ** ((x - place) ** 2)
    return height * (bell(half) + bell(-half)) / 2


# A model, its second parameter at the symmetric point, the seed of the data. With other
# seeds the data are best fitted elsewhere.
MODELS = {
    "width": (width, 0.0, 1),
    "phase": (phase, 3.0, 1),
    "stars": (stars, 0.0, 1),
}
PRIORS = {"height": vn.Normal(1.0, 0.5)}
KINDS = {"float64": (jnp.float64, None), "float32, priors": (jnp.float32, PRIORS)}


class Symmetric(vn.Trainer):
    name: str

    def __init__(self, name, dtype=jnp.float64, **options):
        start = {"height": 0.9, "shape": MODELS[name][1] + 0.7}
        start = {key: jnp.asarray(value, dtype) for key, value in start.items()}
        super().__init__(start, optax.adam(0.02), **options)
        self.name = name

    def residuals(self, model, batch):
        x = jnp.asarray(PLACES, batch.dtype)
        fitted = MODELS[self.name][0](model["height"], model["shape"], x)
        return (fitted - batch) / jnp.asarray(NOISE, batch.dtype)


def measured(name, dtype=jnp.float64, seed=None):
    fn, best, own = MODELS[name]
    noise = np.random.default_rng(own if seed is None else seed).normal(size=60)
    return jnp.asarray(fn(1.0, best, PLACES) + NOISE * noise, dtype)


@functools.cache
def derivatives_by_hand(name, kind):
    """The gradient and the Hessian of what is minimised, as a function."""
    dtype, priors = KINDS[kind]
    fn, data = MODELS[name][0], np.asarray(measured(name, dtype), float)

    def loss(params):
        squares = jnp.sum(((fn(*params, PLACES) - data) / NOISE) ** 2)
        return 0.5 * (squares + (((params[0] - 1) / 0.5) ** 2 if priors else 0))

    return jax.jit(lambda params: (jax.grad(loss)(params), jax.hessian(loss)(params)))


@pytest.mark.parametrize(
    ("name", "solver", "kind"),
    [
        ("phase", "LevenbergMarquardt", "float32, priors"),
        ("stars", "LevenbergMarquardt", "float64"),
        ("width", "BFGS", "float32, priors"),
        ("phase", "BFGS", "float64"),
    ],
)
def test_a_minimum_without_slopes_is_one(name, solver, kind):
    dtype, priors = KINDS[kind]
    trainer, batch = Symmetric(name, dtype, priors=priors), measured(name, dtype)
    result = trainer.solve(SOLVERS[solver], batch)
    assert result.stop_reason is vn.StopReason.CONVERGED
    assert result.edm < 1e-3

    best, by_hand = MODELS[name][1], derivatives_by_hand(name, kind)
    np.testing.assert_allclose(result.model["shape"], best, atol=1e-3)
    slope, _ = by_hand(np.array([result.model["height"], best], float))
    np.testing.assert_allclose(slope, 0, atol=1e-4 if dtype == jnp.float64 else 0.1)

    report = result.report(batch)
    assert "hardly any slope here, along shape (" in report.note
    assert report["shape"].error > 10
    with pytest.warns(UserWarning, match="`standard_errors`: residuals have") as told:
        result.trainer.standard_errors(batch)
    assert report.note in str(told[0].message)
    assert told[0].filename == __file__
    report, point = result.report(batch, kind="observed"), result.model.values()
    _, hessian = by_hand(np.array([*point], float))
    errors = [report["height"].error, report["shape"].error]
    expected = np.sqrt(np.diag(np.linalg.inv(hessian)))
    np.testing.assert_allclose(errors, expected, rtol=2e-2)
    assert report.note is None


@pytest.mark.parametrize("is_exact", [False, True])
def test_intervals_there_are_those_by_hand(is_exact):
    name = "width"
    solver, batch = SOLVERS["LevenbergMarquardt"], measured(name)
    (fn, best, _), trainer = MODELS[name], Symmetric(name)
    if is_exact:
        start = {"height": jnp.asarray(0.9), "shape": jnp.asarray(best)}
        trainer = trainer.replace(model=start)
    trainer = trainer.solve(solver, batch).trainer
    low, high = trainer.intervals(solver, batch)["shape"]
    # By default a profile goes to three errors.
    values = trainer.profile(solver, batch, "shape").values
    assert 1 < (values[-1] - best) / (high - best) < 10

    def least(shape):
        unit, rest = (np.asarray(fn(h, shape, PLACES)) for h in (1.0, 0.0))
        unit, rest = unit - rest, batch - rest
        return (rest @ rest - (unit @ rest) ** 2 / (unit @ unit)) / NOISE**2

    goal = least(best) + chi2.ppf(0.683, 1)
    end = brentq(lambda shape: least(shape) - goal, best, best + 1.5)
    np.testing.assert_allclose((low, high), (2 * best - end, end), rtol=1e-5)


def test_fits_of_one_and_of_many_arrive_there():
    seeds = (1, 3, 5)
    each = [measured("width", seed=seed) for seed in seeds]
    result = Symmetric("width").fit(each[0], 3000, stop=STOP, progress=False)
    assert result.stop_reason is vn.StopReason.CONVERGED
    assert abs(float(result.model["shape"])) < 1e-3
    trainers, batch = [Symmetric("width") for _ in seeds], jnp.stack(each)
    for options in (
        {"solver": SOLVERS["LevenbergMarquardt"]},
        {"stop": STOP, "progress": False},
    ):
        many = vn.fit_many(trainers, batch, 3000, data_axis=0, **options)
        assert set(many.stop_reasons) == {vn.StopReason.CONVERGED}
        assert (many.edms < 1e-3).all()


def test_an_angle_beside_a_parameter_at_its_bound():
    bounds = {"height": (0.0, 1.0), "shape": (-3.0, 3.0)}
    model = {"height": jnp.asarray(1.0), "shape": jnp.asarray(0.0)}
    trainer, batch = Product(model, bounds=bounds), jnp.asarray(1.1 * PLACES)
    # The residuals have no slope at all, where one is held and the other is zero.
    solver = SOLVERS["LevenbergMarquardt"]
    for start in (0.0, 0.5):
        begun = trainer.replace(model={**model, "shape": jnp.asarray(start)})
        result = begun.solve(solver, batch)
        assert result.stop_reason is vn.StopReason.CONVERGED
        np.testing.assert_allclose(result.model["shape"], 0, atol=1e-6)
        ends = result.trainer.intervals(solver, batch)["shape"]
        # The height stays at its bound.
        tilts = np.cos([0.0, *ends])
        squares = (PLACES @ PLACES) * ((tilts - 1.1) / NOISE) ** 2
        rises = squares[1:] - squares[0]
        np.testing.assert_allclose(rises, chi2.ppf(0.683, 1), rtol=1e-5)


class Product(vn.Trainer):
    """A slope as it is seen at an angle."""

    def residuals(self, model, batch):
        return (model["height"] * jnp.cos(model["shape"]) * PLACES - batch) / NOISE


class Fleeing(vn.Trainer):
    """A line far from the data, which the first of them only drives farther away."""

    def residuals(self, model, batch):
        x = jnp.asarray(PLACES, batch.dtype)
        return (jnp.exp(-0.5 * (x - model) ** 2) - batch) / jnp.asarray(0.05)


def test_what_flees_the_data_is_at_no_minimum():
    batch = jnp.zeros(60).at[0].set(-0.2)
    trainer = Fleeing(jnp.asarray(-14.0))
    # The loss is convex there, and the step of Newton gains nothing.
    apart = PLACES + 14.0
    line = np.exp(-0.5 * apart**2)
    left, rows = line - batch, apart * line
    slope = left @ rows / 0.05**2
    curvature = (rows @ rows + left @ (line * (apart**2 - 1))) / 0.05**2
    assert 0 < 0.5 * slope**2 / curvature < 1e-9
    result = trainer.solve(SOLVERS["LevenbergMarquardt"], batch)
    assert result.stop_reason is vn.StopReason.NO_MINIMUM
    assert "start from elsewhere" in result.explain()


class FleeingALevel(vn.Trainer):
    """The same, and a level that the data know."""

    def residuals(self, model, batch):
        x = jnp.asarray(PLACES, batch.dtype)
        line = jnp.exp(-0.5 * (x - model["place"]) ** 2)
        return (model["level"] + line - batch) / jnp.asarray(NOISE, batch.dtype)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_nor_is_it_beside_what_the_data_know(dtype):
    batch = jnp.zeros(60, dtype).at[0].set(-0.2)
    level, solver = jnp.asarray(-0.2 / 60, dtype), SOLVERS["LevenbergMarquardt"]
    for place in (-11.0, -12.0, -13.0, -14.0):
        start = {"level": level, "place": jnp.asarray(place, dtype)}
        result = FleeingALevel(start).solve(solver, batch)
        assert result.stop_reason is not vn.StopReason.CONVERGED


class Refusing(Symmetric):
    """Its model has an error close by."""

    def residuals(self, model, batch):
        is_bad = (model["shape"] < -1e-3) & (model["height"] < 2)
        model = eqx.error_if(model, is_bad, "negative")
        return super().residuals(model, batch)


def test_where_nothing_can_be_seen_the_answer_is_that_of_gauss_and_newton():
    start = {"height": jnp.asarray(1.0), "shape": jnp.asarray(1e-9)}
    trainer, batch = Refusing("width").replace(model=start), measured("width")
    result = trainer.solve(SOLVERS["LevenbergMarquardt"], batch)
    assert result.stop_reason is vn.StopReason.STALLED

"""`Trainer.profile`: the lowest likelihood along one element."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import vernal as vn
from inside import cache_size, plane, run_points
from models import GaussianFit, gaussian, gaussian_batch, line

LM = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
X = jnp.linspace(-1.0, 1.0, 12)
BATCH = X, 2 * X + 1 + 0.3 * jnp.sin(40 * X), jnp.full(12, 0.2)


def solved(**options):
    return GaussianFit(line(), **options).solve(LM, BATCH).trainer


def test_of_a_line_it_is_the_parabola_of_the_error():
    trainer = solved()
    found = trainer.profile(LM, BATCH, "slope")
    value, error = (
        float(x.slope) for x in (trainer.params, trainer.standard_errors(BATCH))
    )
    assert found.name == "slope"
    assert found.converged.all()
    np.testing.assert_allclose((found.value, found.error), (value, error), rtol=1e-6)
    np.testing.assert_allclose(found.values, value + error * np.linspace(-3, 3, 21))
    parabola = ((found.values - value) / error) ** 2
    np.testing.assert_allclose(found.delta, parabola, rtol=1e-6, atol=1e-9)
    assert "'slope', 21 values" in repr(found)


def test_the_models_are_those_of_the_losses_in_the_order_of_the_values():
    trainer = GaussianFit(gaussian()).solve(LM, gaussian_batch()).trainer
    batch, values = gaussian_batch(), [1.7, 1.3, 1.5, 1.4]
    found = trainer.profile(LM, batch, "power", values)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_allclose(found.models.power, values, rtol=1e-12)

    @jax.jit
    @jax.vmap
    @jax.value_and_grad
    def both(model):
        return 0.5 * jnp.sum(trainer.residuals(model, batch) ** 2)

    nll, slope = both(found.models)
    np.testing.assert_allclose(found.losses, nll, rtol=1e-9, atol=1e-12)
    # All others are at their best.
    np.testing.assert_allclose((slope.mean, slope.std), 0, atol=1e-4)
    order = np.argsort(values)
    alone = [trainer.profile(LM, batch, "power", [v]).losses[0] for v in values[:2]]
    np.testing.assert_allclose(found.losses[:2], alone, rtol=1e-8)
    assert found.delta[order][0] > 0


def test_it_stays_within_the_bounds():
    trainer = solved(bounds={"slope": (None, 2.02)})
    found = trainer.profile(LM, BATCH, "slope")
    assert found.values.max() == 2.02
    assert len(found.values) == 21
    with pytest.raises(ValueError, match="outside of the bounds of 'slope'"):
        trainer.profile(LM, BATCH, "slope", [2.0, 2.1])


def test_its_error_is_that_of_the_report():
    """With what is at its bound held there."""
    trainer = solved(bounds={"slope": (None, 1.9)})
    found = trainer.profile(LM, BATCH, "offset")
    np.testing.assert_allclose(found.error, trainer.standard_errors(BATCH).offset)
    assert np.isnan(trainer.profile(LM, BATCH, "slope").error)


def test_another_batch_and_other_values_compile_nothing():
    trainer, values = solved(), np.linspace(1, 3, 5)
    trainer.profile(LM, BATCH, "slope", values)
    before, batch = cache_size(run_points), (X, BATCH[1] + 0.1, BATCH[2])
    other = GaussianFit(line()).solve(LM, batch).trainer
    other.profile(LM, batch, "slope", values + 0.1)
    other.profile(LM, batch, "offset", values - 1)
    assert cache_size(run_points) == before


def test_one_program_finds_the_points_of_all_elements_and_both_ends():
    batch = gaussian_batch()
    trainer = GaussianFit(gaussian()).solve(LM, batch).trainer
    run_points.forget()
    every = trainer.profile(LM, batch)
    assert list(every) == ["mean", "std", "power"]
    some = trainer.profile(LM, batch, ["power", "mean"], {"power": [1.4, 1.6]})
    assert list(some) == ["power", "mean"]
    np.testing.assert_array_equal(some["power"].values, [1.4, 1.6])
    alone = trainer.profile(LM, batch, "std")
    ends = trainer.intervals(LM, batch)
    plane(trainer, LM, batch, ("mean", "power"), 1.0)
    assert cache_size(run_points) == 1
    for own in (every["std"], some["mean"]):
        assert own.converged.all()
    np.testing.assert_allclose(every["std"].losses, alone.losses, rtol=1e-9)
    np.testing.assert_allclose(every["mean"].delta, some["mean"].delta, rtol=1e-9)
    for name, (low, high) in ends.items():
        found = trainer.profile(LM, batch, name, [low, high])
        np.testing.assert_allclose(found.delta, 1, rtol=2e-3)


class Kinds(vn.Trainer):
    def residuals(self, model, batch):
        return jnp.append(model["wfe"] - batch, 0 * model["dark"])


@pytest.mark.own_words
@pytest.mark.parametrize(
    ("name", "values", "error", "match"),
    [
        ("wfe", None, ValueError, "'wfe' names 3 elements"),
        ("wfe[3]", None, vn.UnknownPathError, r"no element 'wfe\[3\]'"),
        ("wve[0]", None, vn.UnknownPathError, r"Did you mean 'wfe\[0\]'"),
        ("dark", None, ValueError, "do not constrain 'dark'"),
        (3, None, TypeError, "name"),
        ((np.zeros(9), "dark"), None, TypeError, "selector of type `ndarray`"),
        (["wfe[0]"], [1.0], ValueError, "must be a dictionary by their names"),
        (["wfe[0]"], {"dark": [1.0]}, ValueError, r"names: 'wfe\[0\]'"),
        ("wfe[0]", [], ValueError, "`values`"),
        ("wfe[0]", [[1.0]], ValueError, "`values`"),
        ("wfe[0]", [1.0, np.nan], ValueError, "`values` are not all finite"),
    ],
)
def test_what_has_no_profile(name, values, error, match):
    batch = jnp.arange(3.0)
    trainer = Kinds({"dark": jnp.zeros(()), "wfe": batch})
    with pytest.raises(error, match=match):
        trainer.profile(LM, batch, name, values)


class Level(vn.Trainer):
    def residuals(self, model, batch):
        return vn.likelihoods.Poisson(jnp.broadcast_to(model["mu"], batch.shape), batch)


def test_a_likelihood_of_zero_is_said_to_be_zero():
    counts, best = jnp.asarray([2.0, 1.0]), {"mu": jnp.asarray(1.5)}
    bounded = Level(best, bounds={"mu": (0, None)})
    # Without a warning: at the bound it is right.
    found = bounded.profile(LM, counts, "mu")
    assert found.values[0] == 0
    assert found.delta[0] == np.inf
    with pytest.warns(UserWarning, match="infinite at mu = 0: the likelihood is zero"):
        Level(best, bounds={"mu": (-1, None)}).profile(LM, counts, "mu", found.values)


def test_where_the_solver_finds_no_minimum_is_said():
    batch = gaussian_batch()
    trainer = GaussianFit(gaussian()).solve(LM, batch).trainer
    with pytest.warns(UserWarning, match="found no minimum at std = "):
        found = trainer.profile(LM, batch, "std", [3.0, 0.1], max_steps=1)
    assert not found.converged.all()


class InUnits(vn.Trainer):
    """A straight line, whose parameters are in other units than each other."""

    def residuals(self, model, batch):
        x, y, (of_a, of_b) = batch
        return (model["a"] / of_a + model["b"] / of_b * x - y) / 0.1


# In single precision numbers end at 3e38: squares would overflow, or ratios.
UNITS = (1e-25, 1.0), (1e25, 1.0), (2e30, 1.0), (1e-20, 1e20), (1e25, 1e-25)


@functools.cache
def in_units(of_a, of_b, bound):
    """How far the deviance has risen at some values, and the intervals."""
    x = np.linspace(0, 1, 30, dtype=np.float32)
    noise = np.random.default_rng(0).normal(scale=0.1, size=30)
    y = (1 + 2 * x + noise).astype(np.float32)
    solver = optx.LevenbergMarquardt(1e-6, 1e-6)
    model = {"a": jnp.asarray(of_a, jnp.float32), "b": jnp.asarray(of_b, "float32")}
    data = x, y, (np.float32(of_a), np.float32(of_b))
    bounds = None if bound is None else {"b": (0, bound * of_b)}
    trainer = InUnits(model, bounds=bounds).whiten(data).solve(solver, data).trainer
    values = {"a": np.array([0.95, 1.05]) * of_a, "b": np.array([1.8, 1.85]) * of_b}
    of_each = trainer.profile(solver, data, list(values), values).values()
    ends = trainer.intervals(solver, data)
    assert all(own.converged.all() for own in of_each)
    deltas = np.concatenate([own.delta for own in of_each])
    return [*deltas, *np.divide(ends["a"], of_a), *np.divide(ends["b"], of_b)]


@pytest.mark.parametrize("bound", [None, 5.0, 1.9], ids=["free", "wide", "held"])
@pytest.mark.parametrize("units", UNITS)
def test_units_do_not_matter(units, bound):
    found, known = in_units(*units, bound), in_units(1.0, 1.0, bound)
    np.testing.assert_allclose(found, known, rtol=1e-3, atol=1e-4)

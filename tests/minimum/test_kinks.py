"""Minima without curvature: at kinks, and where all but what is held is flat."""

import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

REASON = vn.StopReason
BFGS, NELDER_MEAD = optx.BFGS(1e-8, 1e-8), optx.NelderMead(1e-8, 1e-8)
Y = np.random.default_rng(0).laplace(size=101)
MEDIAN, SPREAD = np.median(Y), np.mean(abs(Y - np.median(Y)))


class Laplace(vn.Trainer):
    def nll(self, model, batch):
        apart = jnp.abs(batch - model["place"]) / model["scale"]
        return jnp.sum(apart + jnp.log(2 * model["scale"]))


class LaplaceLoss(vn.Trainer):
    def loss(self, model, batch):
        apart = jnp.abs(batch - model["place"]) / model["scale"]
        return jnp.mean(apart + jnp.log(2 * model["scale"]))


def made(kind, place, scale, unit=1.0):
    model = {"place": jnp.asarray(place * unit), "scale": jnp.asarray(scale * unit)}
    return kind(model, optax.adam(0.01)), jnp.asarray(Y * unit)


@pytest.mark.parametrize("kind", [Laplace, LaplaceLoss])
@pytest.mark.parametrize("solver", [BFGS, NELDER_MEAD])
def test_the_minimum_of_absolute_values_is_one(kind, solver):
    trainer, batch = made(kind, 0.3, 1.0)
    result = trainer.solve(solver, batch)
    np.testing.assert_allclose(result.model["place"], MEDIAN, atol=1e-5)
    np.testing.assert_allclose(result.model["scale"], SPREAD, atol=1e-4)
    assert result.stop_reason is REASON.CONVERGED
    assert "elsewhere" not in result.explain()


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_start_at_the_minimum_in_any_unit(unit):
    trainer, batch = made(Laplace, MEDIAN, SPREAD, unit)
    assert trainer.solve(NELDER_MEAD, batch).stop_reason is REASON.CONVERGED


def test_each_of_many():
    trainers = [made(Laplace, place, 1.0)[0] for place in (0.3, 0.0)]
    batch = jnp.asarray(Y)
    result = vn.fit_many(trainers, batch, 200, solver=NELDER_MEAD)
    assert result.stop_reasons == (REASON.CONVERGED,) * 2
    assert result.failed == ()


def test_beside_a_kink_there_is_no_minimum():
    trainer, batch = made(Laplace, MEDIAN + 0.5, SPREAD)
    result = trainer.solve(BFGS, batch, max_steps=1)
    assert result.stop_reason is not REASON.CONVERGED


def test_errors_there_are_refused_in_the_right_words():
    trainer, batch = made(Laplace, MEDIAN, SPREAD)
    with pytest.raises(ValueError, match="a kink, and there are no errors") as told:
        trainer.standard_errors(batch)
    for said in (str(told.value), trainer.table(batch), trainer.report(batch).note):
        assert "a kink, and there are no errors" in said
        assert "Otherwise this is no minimum." in said
        assert "place" in said


X = np.linspace(-1.0, 1.0, 30)
BELOW = -0.3 + 0.05 * np.cos(40 * X)  # no line of a positive flux fits


class Line(vn.Trainer):
    def residuals(self, model, batch):
        shape = jnp.exp(-0.5 * jnp.square((X - model["centre"]) / 0.2))
        return (model["flux"] * shape - batch) / 0.1


class LineLikelihood(Line):
    residuals = None

    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Line.residuals(self, model, batch)))


LINES = {
    "residuals": (Line, optx.LevenbergMarquardt(1e-8, 1e-8)),
    "nll": (LineLikelihood, BFGS),
}


@pytest.mark.parametrize("name", LINES)
def test_what_is_held_at_its_bound_may_be_all_that_matters(name):
    kind, solver = LINES[name]
    model = {"flux": jnp.asarray(0.5), "centre": jnp.asarray(0.2)}
    trainer = kind(model, bounds={"flux": (0, None)})
    result = trainer.solve(solver, jnp.asarray(BELOW))
    assert result.model["flux"] == 0
    words = "is flat here in all that is not held at its bound: unless that bound is"
    assert words in result.explain()
    table = result.table(jnp.asarray(BELOW))
    assert f"perhaps not at a minimum: the loss {words}" in table
    # So far away nothing is held.
    model = {"flux": jnp.asarray(0.5), "centre": jnp.asarray(20.0)}
    far = kind(model, bounds={"flux": (0, None)}).solve(solver, jnp.asarray(BELOW))
    assert far.explain().endswith("The loss is flat here: start from elsewhere.")

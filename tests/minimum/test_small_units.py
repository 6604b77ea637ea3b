"""Residuals whose squares are too small for float32: nothing may count as a minimum."""

import warnings

import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

X = np.linspace(-5, 5, 41)
NOISE = 0.05 * np.sin(7 * X)
LM = optx.LevenbergMarquardt(1e-6, 1e-6)
STALLED = vn.StopReason.STALLED
SMALL, NAMES = 1e-26, ("peak", "centre", "width")

pytestmark = [
    pytest.mark.loose_dtypes,
    pytest.mark.filterwarnings("ignore:.*squares are zero in float32"),
    pytest.mark.filterwarnings("ignore:.*far from the minimum"),
]


class Spectrum(vn.Trainer):
    def residuals(self, model, batch):
        z = (batch[0] - model["centre"]) / model["width"]
        return model["peak"] * jnp.exp(-0.5 * z**2) - batch[1]


def data(unit, dtype=jnp.float32):
    y = 2 * np.exp(-0.5 * ((X - 0.3) / 0.9) ** 2) + NOISE
    return jnp.asarray(X, dtype), jnp.asarray(unit * y, dtype)


def trainer(unit, dtype=jnp.float32):
    values = zip(NAMES, (1.2 * unit, 0.0, 1.5), strict=True)
    return Spectrum({name: jnp.asarray(value, dtype) for name, value in values})


def adam(start, batch):
    whitened = start.whiten(batch, optimiser=optax.adam(0.3))
    return whitened.fit(batch, 200, stop=vn.Converged(1e-6, 20))


# The functions of a trainer and its data that say whether it is at a minimum.
ENDS = {
    "solve": lambda t, batch: t.solve(LM, batch),
    "whiten, solve": lambda t, batch: t.whiten(batch).solve(LM, batch),
    "fit": adam,
}


@pytest.mark.parametrize("name", ENDS)
def test_it_has_stopped_short(name):
    result = ENDS[name](trainer(SMALL), data(SMALL))
    assert result.stop_reason is STALLED
    assert "edm" in result.explain()


def test_the_remedy_is_named():
    batch = data(SMALL)
    with pytest.warns(UserWarning, match="`solve`: the residuals are .*larger units"):
        result = trainer(SMALL).whiten(batch).solve(LM, batch)
    for said in (result.explain(), result.trainer.table(batch)):
        assert "smallest number of float32: compute in float64" in said
    with pytest.warns(UserWarning, match="`fit`: the residuals are"):
        trainer(SMALL).replace(optimiser=optax.sgd(0.0)).fit(batch, 3)


def test_many_have_stopped_short_and_keep_their_errors():
    batch = data(SMALL)
    many = vn.fit_many([trainer(SMALL)] * 2, batch, 20, solver=LM)
    assert set(many.stop_reasons) == {STALLED}
    own = trainer(SMALL).standard_errors(batch, scale_errors=True)
    for name, errors in many.errors(batch, scale_errors=True).items():
        np.testing.assert_allclose(errors, np.asarray(own[name]), rtol=1e-4)


def test_the_distance_is_that_in_units_of_one():
    """In units of the loss; and in float64 the fit has the parameters of that one."""
    far = trainer(SMALL).report(data(SMALL)).edm
    one = trainer(1.0).report(data(1.0)).edm
    np.testing.assert_allclose(far, one * SMALL**2, rtol=1e-3)
    ends, solver = [], optx.LevenbergMarquardt(1e-8, 0.0)
    for unit in (SMALL, 1.0):
        batch = data(unit, jnp.float64)
        result = trainer(unit, jnp.float64).whiten(batch).solve(solver, batch)
        assert result.stop_reason is vn.StopReason.CONVERGED
        units = unit, 1, 1
        ends.append([result.model[n] / u for n, u in zip(NAMES, units, strict=True)])
    np.testing.assert_allclose(*ends, rtol=1e-4)


class Faint(vn.Trainer):
    """Far away the line has no effect: its width, however large, hides nothing."""

    def residuals(self, model, batch):
        return model["level"] + 0 * model["width"] - batch


@pytest.mark.parametrize("width", [1.0, 1e20])
def test_a_parameter_without_effect_hides_no_distance(width):
    values = {"level": 1.0, "width": width}
    model = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    batch = jnp.asarray(2 + 0.1 * NOISE, jnp.float32)
    assert "not at a minimum" in Faint(model).table(batch)


class Exact(vn.Trainer):
    def residuals(self, model, batch):
        return jnp.atleast_1d(model["a"] - 1)


def test_a_model_that_is_right_is_not_told():
    """Its residuals are small beside what the model adds to them."""
    a = jnp.asarray(1.0, jnp.float32)

    class Nearly(vn.Trainer):
        def residuals(self, model, batch):
            return model["a"] * jnp.asarray([1.0, 0.0], "float32") - batch

    batch = jnp.asarray([1.0, 1e-25], jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Nearly({"a": a}, optax.sgd(0.0)).fit(batch, 3)
        Exact({"a": a}, optax.sgd(0.0)).fit(batch, 3)


# Without residuals: what a user squares.


class Squares(vn.Trainer):
    def loss(self, model, batch):
        return jnp.mean(Spectrum.residuals(self, model, batch) ** 2)


class Likelihood(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(Spectrum.residuals(self, model, batch) ** 2)


GO_ON = {
    "fit": lambda t, batch: t.fit(batch, 3),
    "solve": lambda t, batch: t.solve(optx.BFGS(1e-6, 1e-6), batch),
    "fit_many": lambda t, batch: vn.fit_many([t, t], batch, 3),
}


@pytest.mark.parametrize("kind", [Squares, Likelihood])
@pytest.mark.parametrize("name", GO_ON)
def test_a_loss_that_is_zero_in_these_units_is_told(name, kind):
    start = trainer(SMALL)
    with pytest.warns(UserWarning, match=f"`{name}`.*: the loss is .*e-5., which is"):
        GO_ON[name](kind(start.model, optax.sgd(0.0)), data(SMALL))


@pytest.mark.parametrize("name", GO_ON)
def test_a_loss_of_zero_at_the_truth_is_not_told(name):
    start = trainer(1.0)
    x = jnp.asarray(X, jnp.float32)
    exact = x, start.residuals(start.model, (x, jnp.zeros_like(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GO_ON[name](Squares(start.model, optax.sgd(0.0)), exact)

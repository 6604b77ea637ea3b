"""Slopes without curvature: losses that fall for ever, kinks, and powers."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from jax.scipy.special import xlogy

import vernal as vn

REASON = vn.StopReason
BFGS, NELDER_MEAD = optx.BFGS(1e-8, 1e-8), optx.NelderMead(1e-8, 1e-8)
X = np.linspace(0.0, 1.0, 25)
Y = 1 + 2 * X + 0.3 * np.random.default_rng(4).laplace(size=25)


def straight(model, _):
    return 5 * jnp.sum((model["u"] - 1) ** 2) + model["v"] + 100


def empty_bin(model, counts):
    rate = model["rate"]
    return jnp.sum(rate - xlogy(counts, jnp.where(counts > 0, rate, 1.0)))


def collapsed(model, datum):
    bell = 0.5 * ((datum - model["centre"]) / jnp.exp(model["log"])) ** 2
    return jnp.sum(bell + model["log"])


def absolute(model, batch):
    x, y = batch
    return jnp.sum(jnp.abs(model["a"] + model["b"] * x - y)) / 0.3


def median(model, data):
    return jnp.sum(jnp.abs(model["x"] - data))


def power(model, order):
    return (model["x"] - 1) ** order.shape[0]


NLLS = {
    "straight": straight,
    "many": straight,
    "empty bin": empty_bin,
    "collapsed": collapsed,
    "absolute": absolute,
    "median": median,
    "power": power,
}
ONE = np.zeros(1)

# The parameters, the data, and which of the former falls without end.
FALLING = {
    "straight": ({"u": 1.0, "v": 0.0}, ONE, "v (-1)"),
    "many": ({"u": np.ones(600), "v": 0.0}, ONE, "v (-1)"),
    "empty bin": (
        {"rate": np.array([5.0, 3.0, -7.0])},
        np.array([5.0, 3.0, 0.0]),
        "rate[2] (-1)",
    ),
    "collapsed": ({"centre": 3.0, "log": -20.0}, np.array([3.0]), "log (-1)"),
    "absolute": ({"a": 100.0, "b": 0.0}, (X, Y), "a (-1)"),
}


class Likelihood(vn.Trainer):
    name: str

    def __init__(self, name, start, dtype=np.float64, **options):
        start = {key: jnp.asarray(value, dtype) for key, value in start.items()}
        super().__init__(start, optax.sgd(1e-9), **options)
        self.name = name

    def nll(self, model, batch):
        return NLLS[self.name](model, batch)


class Loss(Likelihood):
    nll = None

    def loss(self, model, batch):
        return NLLS[self.name](model, batch)


@functools.cache
def falling(name, dtype, kind=Likelihood):
    start, batch, _ = FALLING[name]
    priors = {"b": vn.Normal(2.0, 0.2)} if name == "absolute" else None
    if isinstance(batch, tuple):
        batch = tuple(jnp.asarray(x, dtype) for x in batch)
    else:
        batch = jnp.asarray(batch, dtype)
    return kind(name, start, dtype, priors=priors), batch


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", FALLING)
def test_a_loss_that_falls_for_ever_is_at_no_minimum(name, dtype):
    trainer, batch = falling(name, dtype)
    result = trainer.solve(BFGS, batch, max_steps=1)
    said = f"falls along {FALLING[name][2]}, without curvature: fit on, or give a prior"
    assert result.stop_reason is REASON.MAX_STEPS
    assert np.isnan(result.edm)
    assert said in result.explain()
    if name != "many":
        assert said in trainer.table(batch)


def test_wherever_it_is_asked():
    name = "straight"
    trainer, batch = falling(name, np.float64)
    with pytest.raises(ValueError, match=r"falls along v \(-1\), without curvature"):
        trainer.intervals(BFGS, batch)
    stop = vn.Converged(1e-6, 3)
    result = trainer.fit(batch, 20, stop=stop)
    assert result.stop_reason is REASON.STALLED
    assert "falls along v (-1), without curvature" in result.explain()
    many = vn.fit_many([trainer] * 2, batch, 20, stop=stop)
    assert set(many.stop_reasons) == {REASON.STALLED}
    assert "falls along v (-1), without curvature" in many.explain(1)
    loss, _ = falling(name, np.float64, Loss)
    result = loss.solve(BFGS, batch, max_steps=3)
    assert result.stop_reason is REASON.MAX_STEPS


@pytest.mark.parametrize("solver", [BFGS, NELDER_MEAD], ids=["BFGS", "simplex"])
def test_a_kink_beside_a_curved_term_is_a_minimum(solver):
    """Where it is by linear programming, and by a fine simplex."""
    trainer, batch = falling("absolute", np.float64)
    trainer = trainer.replace(model={"a": jnp.asarray(1.0), "b": jnp.asarray(2.0)})
    result = trainer.solve(solver, batch, max_steps=2000)
    assert result.stop_reason is REASON.CONVERGED
    assert result.edm < 1e-3
    np.testing.assert_allclose(result.model["a"], 1.07065945, atol=1e-5)
    np.testing.assert_allclose(result.model["b"], 2.01111110, atol=1e-4)


BOTTOMS = {
    "fourth power": ("power", 1.0, 4),
    "between two data": ("median", 0.3, np.array([0.0, 1.0])),
    "inflection": ("power", 1.0, 3),
    "at a step's edge": ("median", 2.0, np.zeros(0)),
}


@pytest.mark.parametrize("name", BOTTOMS)
def test_a_flat_point_is_a_minimum_if_the_loss_rises_around_it(name):
    law, start, data = BOTTOMS[name]
    batch = jnp.zeros(data) if law == "power" else jnp.asarray(data)
    result = Likelihood(law, {"x": start}).solve(BFGS, batch)
    is_one = name in ("fourth power", "between two data")
    assert result.stop_reason is (REASON.CONVERGED if is_one else REASON.STALLED)
    assert ("start from elsewhere" in result.explain()) != is_one

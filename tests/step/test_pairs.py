"""Losses that sum over all pairs of data, since a column meets a vector."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

pytestmark = [pytest.mark.loose_dtypes, pytest.mark.loose_ranks]

N = 5
LINE, COLUMN = np.linspace(0.5, 1.5, N), np.linspace(0.5, 1.5, N)[:, None]
FEATURES, SQUARE = np.ones((N, 3)), np.ones((N, N))


def off(m, b):
    return m["net"](b["x"]) - b["y"]


def kernel(m, x, other):
    return jnp.exp(-((m["net"].a * x - other) ** 2))


def by_kernel(matrix, y):
    whole = matrix + jnp.eye(N)
    return y @ jnp.linalg.solve(whole, y) + jnp.linalg.slogdet(whole)[1]


class Scale(eqx.Module):
    a: jax.Array

    def __call__(self, x):
        return self.a * x


class Net(eqx.Module):
    layers: eqx.nn.MLP

    def __init__(self, out="scalar", size=3):
        self.layers = eqx.nn.MLP(size, out, 4, 1, key=jax.random.key(0))

    def __call__(self, x):
        return jax.vmap(self.layers)(x)


SCALE = Scale(jnp.asarray(2.0))
COLUMNS = {"x": LINE, "y": COLUMN}
mean = lambda m, b: jnp.mean(off(m, b) ** 2)

# The loss, what it is of, and the data.
PAIRS = {
    "column beside a vector": (mean, SCALE, COLUMNS),
    "vector beside a column": (mean, SCALE, {"x": COLUMN, "y": LINE}),
    "column of error bars": (
        lambda m, b: jnp.sum((off(m, b) / b["s"]) ** 2 + 2 * jnp.log(b["s"])),
        SCALE,
        {"x": LINE, "y": LINE, "s": COLUMN},
    ),
    "weights": (lambda m, b: jnp.sum(b["x"] * off(m, b) ** 2), SCALE, COLUMNS),
    "a mask": (
        lambda m, b: jnp.sum(jnp.where(b["y"] > 0, off(m, b) ** 2, 0.0)),
        SCALE,
        COLUMNS,
    ),
    "column of a network": (mean, Net(1), {"x": FEATURES, "y": LINE}),
    "network of a vector": (
        lambda m, b: jnp.mean((m["net"](b["x"][:, None]) - b["y"]) ** 2),
        Net(1, 1),
        {"x": LINE, "y": LINE},
    ),
    "Huber": (
        lambda m, b: jnp.mean(optax.huber_loss(m["net"](b["x"]), b["y"])),
        Net(1),
        {"x": FEATURES, "y": LINE},
    ),
    "entropy": (
        lambda m, b: jnp.mean(
            optax.sigmoid_binary_cross_entropy(m["net"](b["x"]), b["y"])
        ),
        Net(1),
        {"x": FEATURES, "y": np.round(LINE)},
    ),
    "Poisson": (
        lambda m, b: -jnp.sum(jax.scipy.stats.poisson.logpmf(b["y"], m["net"](b["x"]))),
        SCALE,
        {"x": LINE, "y": np.round(COLUMN)},
    ),
    "flat": (lambda m, b: jnp.mean(off(m, b).ravel() ** 2), SCALE, COLUMNS),
    "within a function": (jax.jit(mean), SCALE, COLUMNS),
}
ALONE = {
    "vectors": (mean, SCALE, {"x": LINE, "y": LINE}),
    "columns": (mean, SCALE, {"x": COLUMN, "y": COLUMN}),
    "one datum": (mean, SCALE, {"x": COLUMN[:1], "y": LINE[:1]}),
    "a number": (mean, SCALE, {"x": COLUMN, "y": 1.0}),
    "a network": (mean, Net(), {"x": FEATURES, "y": LINE}),
    "a network of columns": (mean, Net(1), {"x": FEATURES, "y": COLUMN}),
    "a kernel of a vector": (
        lambda m, b: by_kernel(kernel(m, b["x"][:, None], b["x"]), b["y"]),
        SCALE,
        {"x": LINE, "y": LINE},
    ),
    "a kernel of a column": (
        lambda m, b: by_kernel(kernel(m, b["x"], b["x"].T), b["y"]),
        SCALE,
        {"x": COLUMN, "y": LINE},
    ),
    "a sum over pairs": (
        lambda m, b: jnp.sum(kernel(m, b["x"][:, None], b["x"])),
        SCALE,
        {"x": LINE},
    ),
    "an image from two axes": (
        lambda m, b: jnp.mean((m["net"](b["x"]) * b["y"] - b["z"]) ** 2),
        SCALE,
        COLUMNS | {"z": SQUARE},
    ),
    "a sum of such an image": (
        lambda m, b: (
            jnp.sum(m["net"](b["x"]) * b["y"])
            - jnp.sum(b["z"] * jnp.log(m["net"](b["x"]) * b["y"]))
        ),
        SCALE,
        COLUMNS | {"z": SQUARE},
    ),
    "a covariance": (
        lambda m, b: off(m, b) @ b["c"] @ off(m, b),
        SCALE,
        {"x": LINE, "y": LINE, "c": SQUARE},
    ),
}


def trainer_of(loss, net, name="nll"):
    kind = type("Fit", (vn.Trainer,), {name: lambda self, m, batch: loss(m, batch)})
    return kind({"net": net}, optax.sgd(1e-3))


BFGS = optx.BFGS(1e-3, 1e-3)
# A step is looked at where it is traced; so nothing is compiled.
LOOK = lambda trainer, batch: eqx.filter_make_jaxpr(trainer.step)(batch)
FIT = lambda trainer, batch: trainer.fit(batch, 1, progress=False)
MINIBATCHES = lambda batch: vn.Minibatches(batch, 3, key=jax.random.key(0))
ENTRANCES = {
    "step": lambda trainer, batch: trainer.step(batch),
    "fit": FIT,
    "minibatches": lambda trainer, batch: FIT(trainer, MINIBATCHES(batch)),
    "stream": lambda trainer, batch: FIT(trainer, vn.Stream([batch])),
    "unroll": lambda trainer, batch: vn.unroll(trainer, batch, 1),
    "unrolled minibatches": lambda trainer, batch: vn.unroll(
        trainer, MINIBATCHES(batch), 1
    ),
    "solve": lambda trainer, batch: trainer.solve(BFGS, batch, max_steps=1),
    "many": lambda trainer, batch: vn.fit_many(
        [trainer, trainer], batch, 1, progress=False
    ),
    "solve many": lambda trainer, batch: vn.fit_many(
        [trainer, trainer], batch, 1, solver=BFGS
    ),
}


def heard(entrance, trainer, batch):
    """The warnings of two calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            entrance(trainer, batch)
    return [x for x in caught if "pairs" in str(x.message)]


@pytest.mark.parametrize("name", PAIRS)
def test_a_sum_over_pairs_is_warned_of(name):
    loss, net, batch = PAIRS[name]
    (said,) = heard(LOOK, trainer_of(loss, net), batch)
    assert f"The loss of `Fit` sums over {N} x {N} pairs" in str(said.message)
    assert said.filename == __file__


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_each_entrance_warns(entrance):
    (said,) = heard(ENTRANCES[entrance], trainer_of(mean, SCALE, "loss"), COLUMNS)
    size = 3 if "minibatches" in entrance else N
    assert f"sums over {size} x {size} pairs" in str(said.message)
    assert said.filename == __file__


@pytest.mark.parametrize("entrance", ["one", "many"])
def test_a_validation_is_looked_at(entrance):
    def fit(trainer, batch):
        fits = vn.fit_many if entrance == "many" else vn.Trainer.fit
        who = [trainer, trainer] if entrance == "many" else trainer
        fits(who, batch, 1, validation=(COLUMNS, 1), progress=False)

    trainer = trainer_of(mean, SCALE, "loss")
    (said,) = heard(fit, trainer, {"x": LINE, "y": LINE})
    assert "The score of the validation of `Fit` sums over" in str(said.message)
    assert said.filename == __file__


@pytest.mark.parametrize("name", ALONE)
def test_nothing_is_said_of_others(name):
    loss, net, batch = ALONE[name]
    assert not heard(LOOK, trainer_of(loss, net), batch)


def test_a_loss_is_looked_at_once():
    traces = []

    def counted(m, batch):
        traces.append(1)
        return mean(m, batch)

    trainer, batch = trainer_of(counted, SCALE, "loss"), {"x": LINE, "y": LINE}
    trainer.fit(batch, 1, progress=False)
    once = len(traces)
    trainer.fit(batch, 1, progress=False)
    assert len(traces) == once


def test_a_loss_whose_helper_has_changed_is_looked_at(monkeypatch):
    trainer = trainer_of(mean, SCALE)
    aligned = lambda m, b: m["net"](b["x"]) - b["y"][:, 0]
    monkeypatch.setitem(globals(), "off", aligned)
    assert not heard(FIT, trainer, COLUMNS)
    monkeypatch.undo()
    assert heard(FIT, trainer, COLUMNS)

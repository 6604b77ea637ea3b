"""An `nll` that is a mean over its data, and not a sum."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn

pytestmark = [pytest.mark.loose_dtypes, pytest.mark.loose_ranks]

N, SAMPLES = 12, 7
X = np.linspace(0.5, 1.5, N)
BATCH = {"x": X, "y": X**2, "s": np.full(N, 0.1)}
IMAGES = {"x": X[:, None] + np.arange(3), "y": np.ones((N, 3))}
NORMAL = np.linspace(-1, 1, SAMPLES)


def squares(m, b):
    return ((m["a"] * b["x"] - b["y"]) / m["s"]) ** 2


def of_each(m, b):
    return 0.5 * squares(m, b) + jnp.log(m["s"])


# The `nll`, the data, and over how many of them it is a mean.
MEANS = {
    "jnp.mean": (lambda m, b: jnp.mean(of_each(m, b)), BATCH, N),
    "a method": (lambda m, b: of_each(m, b).mean(), BATCH, N),
    "half of it": (lambda m, b: 0.5 * jnp.mean(squares(m, b)), BATCH, N),
    "two means": (
        lambda m, b: jnp.mean(squares(m, b)) / 2 + jnp.mean(jnp.log(m["s"] + b["s"])),
        BATCH,
        N,
    ),
    "less a mean": (lambda m, b: m["a"] / N - jnp.mean(of_each(m, b)), BATCH, N),
    "divided": (lambda m, b: jnp.sum(of_each(m, b)) / len(b["x"]), BATCH, N),
    "multiplied": (lambda m, b: (1 / N) * jnp.sum(of_each(m, b)), BATCH, N),
    "vdot": (lambda m, b: jnp.vdot(b["y"], m["a"] * b["x"]) / N, BATCH, N),
    "a mask": (
        lambda m, b: jnp.mean(of_each(m, b), where=b["y"] > 0.5),
        BATCH,
        N,
    ),
    "jnp.nanmean": (lambda m, b: jnp.nanmean(of_each(m, b)), BATCH, N),
    "jnp.average": (
        lambda m, b: jnp.average(of_each(m, b), weights=b["x"]),
        BATCH,
        N,
    ),
    "vdot with weights": (
        lambda m, b: jnp.vdot(b["x"], of_each(m, b)) / b["x"].sum(),
        BATCH,
        N,
    ),
    "vmap": (
        lambda m, b: jnp.mean(
            jax.vmap(lambda x, y: of_each(m, {"x": x, "y": y}))(b["x"], b["y"])
        ),
        BATCH,
        N,
    ),
    "jit": (jax.jit(lambda m, b: jnp.mean(of_each(m, b))), BATCH, N),
    "jit of a function": (
        lambda m, b: jax.jit(lambda x, n: -jnp.sum(x) / n)(-of_each(m, b), 12.0),
        BATCH,
        N,
    ),
    "images": (lambda m, b: jnp.mean(of_each(m, b)), IMAGES, 3 * N),
    "sums of each": (lambda m, b: jnp.mean(of_each(m, b).sum(axis=1)), IMAGES, N),
    "means of each": (lambda m, b: of_each(m, b).mean(axis=1).mean(), IMAGES, N),
    "entropies": (
        lambda m, b: jnp.mean(
            optax.sigmoid_binary_cross_entropy(m["a"] * b["x"], b["y"])
        ),
        BATCH,
        N,
    ),
    "a baseline beside it": (
        lambda m, b: jnp.mean((b["y"] - jnp.mean(b["y"]) - m["a"] * b["x"]) ** 2),
        BATCH,
        N,
    ),
    "a penalty beside it": (
        lambda m, b: jnp.mean(of_each(m, b)) + jnp.sum(m["many"] ** 2),
        BATCH,
        N,
    ),
}

SUMS = {
    "a sum": (lambda m, b: jnp.sum(of_each(m, b)), BATCH),
    "half a sum": (lambda m, b: 0.5 * jnp.sum(squares(m, b)), BATCH),
    "a mean times its number": (lambda m, b: N * jnp.mean(of_each(m, b)), BATCH),
    "half of that": (lambda m, b: 0.5 * N * jnp.mean(squares(m, b)), BATCH),
    "one that data give": (lambda m, b: b["n"] * jnp.mean(of_each(m, b)), BATCH),
    "two data": (
        lambda m, b: jnp.sum(squares(m, b)) / 2,
        {"x": X[:2], "y": X[:2]},
    ),
    "known errors": (lambda m, b: jnp.sum(squares(m, b)) / (2 * 0.1**2), BATCH),
    "an average times its weight": (
        lambda m, b: b["x"].sum() * jnp.average(of_each(m, b), weights=b["x"]),
        BATCH,
    ),
    "divided by what is fitted": (
        lambda m, b: jnp.sum(squares(m, b)) / jnp.sum(m["many"]),
        BATCH,
    ),
    "a mean of parameters": (
        lambda m, b: jnp.sum(of_each(m, b)) + jnp.mean(m["many"] ** 2),
        BATCH,
    ),
    "a penalty of the model": (
        lambda m, b: (
            jnp.sum(of_each(m, b)) + 0.5 * jnp.mean(jnp.square(m["a"] * b["x"]))
        ),
        BATCH,
    ),
    "a baseline": (
        lambda m, b: jnp.sum((b["y"] - jnp.mean(b["y"]) - m["a"] * b["x"]) ** 2),
        BATCH,
    ),
    "a mean beside a loop over data": (
        lambda m, b: (
            jnp.mean(jnp.square(m["a"] * b["x"]))
            + jax.lax.scan(lambda c, y: (c + (y - m["a"]) ** 2, None), 0.0, b["y"])[0]
        ),
        BATCH,
    ),
    "a mean of data": (
        lambda m, b: (jnp.mean(b["y"]) - m["a"]) ** 2 / 2,
        BATCH,
    ),
    "a logarithm of a mean": (
        lambda m, b: N / 2 * jnp.log(jnp.mean(squares(m, b))),
        BATCH,
    ),
    "samples within a sum": (
        lambda m, b: (
            -jnp.sum(
                jnp.log(
                    jnp.mean(jnp.exp(-of_each(m, b) - NORMAL[:, None] ** 2), axis=0)
                )
            )
        ),
        BATCH,
    ),
    "samples of a sum": (
        lambda m, b: jnp.mean(
            jax.vmap(lambda z: jnp.sum(of_each({**m, "a": m["a"] + z}, b)))(NORMAL)
        ),
        BATCH,
    ),
    "as many samples": (
        lambda m, b: jnp.mean(
            jax.vmap(lambda z: jnp.sum(of_each({**m, "a": m["a"] + z}, b)))(X)
        ),
        BATCH,
    ),
    "means of pixels": (lambda m, b: jnp.sum(of_each(m, b).mean(axis=0)), IMAGES),
    "a scan": (
        lambda m, b: jax.lax.scan(
            lambda total, x: (total + of_each(m, b | {"x": x})[0], None), 0.0, b["x"]
        )[0],
        BATCH,
    ),
}


def heard(nll, batch, name="nll"):
    """The warnings of two steps, which are traced only."""
    kind = type("Fit", (vn.Trainer,), {name: lambda self, m, b: nll(m, b)})
    model = {"a": jnp.array(2.0), "s": jnp.array(0.1), "many": jnp.ones(N)}
    trainer = kind(model, optax.sgd(1e-3))
    batch = {"n": jnp.array(12.0), **batch}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            eqx.filter_make_jaxpr(trainer.step)(batch)
    return [x for x in caught if "is a mean over" in str(x.message)]


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_is_warned_of(name):
    nll, batch, size = MEANS[name]
    (said,) = heard(nll, batch)
    assert f"`nll` of `Fit` is a mean over {size} data" in str(said.message)
    assert said.filename == __file__


@pytest.mark.parametrize("name", SUMS)
def test_nothing_is_said_of_sums(name):
    assert not heard(*SUMS[name])


def test_a_loss_may_be_a_mean():
    nll, batch, _ = MEANS["jnp.mean"]
    assert not heard(nll, batch, "loss")

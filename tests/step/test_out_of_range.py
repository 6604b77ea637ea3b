"""Integers of the data that index beyond a parameter, of which JAX says nothing."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

FROM_0, FROM_1 = np.array([0, 1, 1, 0]), np.array([1, 2, 2, 1])
PAIRS = np.stack([FROM_0, FROM_0 + 7], axis=1)
Y = np.linspace(0.0, 1.0, 4)


class Fit(vn.Trainer):
    """Each datum has the offset of its instrument, found in some way."""

    find: object

    def __init__(self, find):
        self.find = find
        model = {
            "offset": jnp.zeros(2),
            "table": jnp.zeros((3, 2)),
            "one": jnp.zeros(()),
        }
        super().__init__(model, optax.sgd(1e-3))

    def residuals(self, model, batch):
        return self.find(model, batch["n"]) + model["one"] - batch["y"]


def each(m, n):
    return jax.vmap(lambda n: jnp.exp(m["offset"][n]))(n)


def by_bounds(m, n):
    return m["offset"][jnp.clip(n, 0, 1)]


def masked(m, n):
    return m["offset"][jnp.where(n < 2, n, 0)]


def turn_by_turn(m, n):
    return jax.lax.scan(lambda i, _: (i + 1, m["offset"][i % 2]), n[0], length=4)[1]


# How the offset is found, the numbers, and what is said of them.
OUT = {
    "in brackets": (lambda m, n: m["offset"][n], FROM_1, "up to 2.*1 is the largest"),
    "far out": (lambda m, n: m["offset"][n], FROM_1 + 20, "up to 22.*1 is the largest"),
    "negative": (
        lambda m, n: m["offset"][n],
        FROM_0 - 3,
        "down to -3.*-2 is the least",
    ),
    "shifted": (lambda m, n: m["offset"][n - 1], FROM_1 + 1, "up to 3.*2 is the larg"),
    "shifted up": (lambda m, n: m["offset"][1 + n], FROM_1, "up to 2.*0 is the larg"),
    "computed": (lambda m, n: jnp.exp(m["offset"])[n], FROM_1, "indexes 'offset' by"),
    "each by itself": (each, FROM_1, "indexes 'offset' by them along an axis of 2,"),
    "compiled": (jax.jit(lambda m, n: m["offset"][n]), FROM_1, "up to 2"),
    "again": (jax.checkpoint(lambda m, n: m["offset"][n]), FROM_1, "up to 2"),
    "one number": (lambda m, n: m["offset"][n], np.array(2), "up to 2"),
    "of no sign": (lambda m, n: m["offset"][n], FROM_1.astype(np.uint8), "up to 2"),
    "a row": (lambda m, n: m["table"][n].sum(1), FROM_1 + 1, "'table' by.*axis of 3"),
    "a column": (lambda m, n: m["table"][:, n].sum(0), FROM_1, "'table' by.*axis of 2"),
    "two axes": (lambda m, n: m["table"][n, n], FROM_1, "'table' by.*axis of 2"),
    "several": (
        lambda m, n: (m["offset"] * m["table"][0])[n],
        FROM_1,
        "indexes 'offset' and 'table' by",
    ),
}
WITHIN = {
    "from 0": (lambda m, n: m["offset"][n], FROM_0),
    "shifted": (lambda m, n: m["offset"][n - 1], FROM_1),
    "from the end": (lambda m, n: m["offset"][n], FROM_0 - 2),
    "another axis": (lambda m, n: m["table"][n].sum(1), FROM_1),
    "on purpose": (lambda m, n: m["offset"].at[n].get(mode="clip"), FROM_1),
    "by bounds": (by_bounds, FROM_1),
    "masked": (masked, FROM_1),
    "in turn": (lambda m, n: m["offset"][n % 2], FROM_1),
    "turn by turn": (turn_by_turn, FROM_1),
    "a part": (lambda m, n: m["offset"][n[:, 0]], PAIRS),
    "a constant": (lambda m, n: jnp.zeros(2)[n] * m["one"], FROM_1),
    "a number": (lambda m, n: m["offset"].sum() * n.astype(float), FROM_1),
    "no numbers": (lambda m, n: m["offset"].sum() + 0 * n.sum(), np.zeros(0, int)),
}


def look(trainer, data):
    """Before its first step a fit has looked."""
    trainer.fit(data, 0)


def told(find, n, work=look):
    data = {"n": jnp.asarray(n), "y": jnp.asarray(Y)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work(Fit(find), data)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.loose_dtypes
@pytest.mark.loose_ranks
@pytest.mark.parametrize("name", OUT)
def test_what_is_beyond_is_told(name):
    find, n, said = OUT[name]
    (message,) = told(find, n)
    assert message.startswith("`data['n']` has numbers ")
    assert re.search(said, message)


@pytest.mark.loose_dtypes
@pytest.mark.loose_ranks
@pytest.mark.parametrize("name", WITHIN)
def test_nothing_is_said_of_what_is_within(name):
    assert told(*WITHIN[name]) == []


def minibatches(trainer, data):
    trainer.fit(vn.Minibatches(data, 2, key=jax.random.key(0)), 1)


def solve(trainer, data):
    trainer.solve(optx.LevenbergMarquardt(1e-3, 1e-3), data)


def many(trainer, data):
    own = {"n": jnp.stack([jnp.asarray(FROM_0), data["n"]]), "y": data["y"]}
    vn.fit_many([trainer] * 2, own, 1, data_axis={"n": 0, "y": None})


def often(trainer, data):
    trainer.fit(data, 1).trainer.fit(data, 1)


@pytest.mark.parametrize("work", [minibatches, solve, many, often])
def test_it_is_told_once_wherever_the_data_are_given(work):
    (message,) = told(lambda m, n: m["offset"][n], FROM_1, work)
    assert "['n']` has numbers up to 2" in message


def test_the_loss_is_looked_at_once():
    traces = []

    def find(m, n):
        traces.append(n)
        return m["offset"][n - 1]

    def fits(trainer, data):
        trainer.fit(data, 1)
        # What a loss itself writes to is known from then on.
        trainer.fit(data, 1)
        before = len(traces)
        trainer.fit(data, 1)
        # Other data may be out of range.
        with pytest.warns(UserWarning, match="up to 3, .* 2 is the largest"):
            trainer.fit(data | {"n": data["n"] + 1}, 1)
        assert len(traces) == before

    assert told(find, FROM_1, fits) == []

"""Checkpoints of the first format, and of leaves whose names are alike."""

import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import Line, LineFit, line, line_batch

FIRST = Path(__file__).parent / "files" / "checkpoints_1.zip"
"""50 steps of `make()`, with checkpoints every 10 and the slope recorded."""


def make():
    model = Line(jnp.asarray(1.0), jnp.asarray(0.0, jnp.float32))
    rules = {
        "slope": optax.adam(1e-2),
        "offset": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    }
    return LineFit(model, vn.ParamOptimiser(rules))


def fit(steps, folder=None):
    x = jnp.linspace(0, 1, 20)
    checkpoints = folder and vn.Checkpoints(folder, every=10)
    options = {"record": "slope", "checkpoint": checkpoints}
    return make().fit((x, 2 * x + 1), steps, **options)


def same(result, other):
    for a, b in zip(
        jax.tree.leaves(result.trainer.params),
        jax.tree.leaves(other.trainer.params),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.fixture
def folder(tmp_path):
    with zipfile.ZipFile(FIRST) as archive:
        archive.extractall(tmp_path / "fit")
    return tmp_path / "fit"


@pytest.mark.loose_dtypes
def test_a_fit_goes_on(folder):
    whole, resumed = fit(100), fit(80, folder)
    np.testing.assert_array_equal(resumed.history.steps, np.arange(80))
    for name in ("loss", "slope"):
        np.testing.assert_allclose(
            resumed.history[name], whole.history[name][:80], rtol=1e-6
        )
    # What it writes then is of the present format.
    resumed = fit(100, folder)
    same(resumed, whole)
    np.testing.assert_array_equal(resumed.history.steps, np.arange(100))


@pytest.mark.loose_dtypes
def test_a_damaged_history_costs_no_step(folder):
    path = folder / "history.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="50 of 50 rows are lost"):
        resumed = fit(100, folder)
    same(resumed, fit(100))
    np.testing.assert_array_equal(resumed.history.steps, np.arange(50, 100))


class Counting(LineFit):
    def loss(self, model, batch, *, state):
        return super().loss(model, batch), jax.tree.map(lambda x: x + 1, state)


class Keeping(LineFit):
    def loss(self, model, batch, *, state):
        return super().loss(model, batch), state


def test_names_that_are_alike(tmp_path):
    zero = jnp.zeros(1)
    state = {"a.b": zero, "a": {"b": zero + 100}, "a.b#2": zero + 200}
    trainer = Counting(line(), optax.adam(0.1), state=state)
    checkpoints = vn.Checkpoints(tmp_path / "fit", every=5)
    fit = lambda steps: trainer.fit(line_batch(), steps, checkpoint=checkpoints)
    fit(10)
    found = fit(20).trainer.state
    assert [found["a.b"], found["a"]["b"], found["a.b#2"]] == [20, 120, 220]


def test_many_numbers_of_few_bits(tmp_path):
    # Orbax itself does not write all of these dtypes.
    names = "int4", "uint4", "float8_e4m3", "float8_e5m2"
    state = [(jnp.arange(2**17) % 4).astype(name) for name in names]
    trainer = Keeping(line(), optax.adam(0.1), state=state)
    checkpoints = vn.Checkpoints(tmp_path / "fit", every=5)
    fit = lambda steps: trainer.fit(line_batch(), steps, checkpoint=checkpoints)
    first = fit(5)
    again = fit(5)
    assert again.stop_reason is vn.StopReason.TAKEN_BEFORE
    for a, b in zip(first.trainer.state, again.trainer.state, strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

"""Where there is not memory for two states, one is overwritten: the fit's own alone."""

import os
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from meshes import FITS, Settled, mesh_of, starts
from models import GaussianFit, gaussian, gaussian_batch, same
from vernal._data.sources import as_source
from vernal._devices.placement import ANYWHERE
from vernal._fit import run as _running
from vernal._loop.chunk import LoopState, Task, run_chunk, run_chunk_in_place
from vernal._loop.monitor import Monitor
from vernal._loop.record import Record
from vernal._step import config_of

AS_COMPILED = pytest.mark.as_compiled
BATCH = gaussian_batch(24)


@pytest.fixture(autouse=True)
def in_place(monkeypatch):
    """As on an accelerator, with a model that is large."""
    monkeypatch.setattr(_running, "_is_worth_reuse", lambda progress: True)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("minibatches", None),
        ("stream", mesh_of(2)),
        ("stops", mesh_of(2)),
        ("state", None),
        pytest.param("state", mesh_of(2), marks=AS_COMPILED),
    ],
)
def test_a_fit_is_the_same(name, mesh, monkeypatch):
    trainer, data, options = FITS[name]()
    before = jax.tree.map(jnp.copy, trainer)
    options |= {"mesh": mesh}
    own = trainer.fit(data, 30, chunk=7, **options)
    assert same(trainer, before)
    # Where somebody looks on, nothing of what is seen is overwritten.
    seen = []
    look = lambda trainer, history: seen.append(trainer)
    _, data, _ = FITS[name]()
    other = trainer.fit(data, 30, chunk=7, callback=look, **options)
    assert all(np.isfinite(there.params.mean) for there in seen)
    assert same(own.trainer, other.trainer)
    np.testing.assert_array_equal(own.history.loss, other.history.loss)


def test_many_are_the_same():
    many = vn.fit_many(starts(), BATCH, 30, chunk=7)
    alone = starts()[2].fit(BATCH, 30)
    np.testing.assert_allclose(many.trainer(2).params.mean, alone.model.mean)


def test_ctrl_c_loses_nothing():
    """It comes while a chunk is computed, when what was before is gone already."""

    class Interrupted(GaussianFit):
        def residuals(self, model, batch):
            jax.debug.callback(interrupt, self.step_count)
            return super().residuals(model, batch)

    def interrupt(step):
        if step == 40:
            os.kill(os.getpid(), signal.SIGINT)

    trainer = Interrupted(gaussian(), optax.adam(0.01))
    result = trainer.fit(BATCH, 10**6, chunk=50)
    assert result.stop_reason is vn.StopReason.INTERRUPTED
    steps = int(result.trainer.step_count)
    assert steps >= 50
    assert len(result.history) == steps
    assert np.isfinite(result.model.mean)


@pytest.mark.parametrize("mesh", [None, mesh_of(2)], ids=["one", "two"])
def test_a_criterion_may_hold_the_parameters(mesh):
    trainer = GaussianFit(gaussian(), optax.adam(0.01))
    options = {"stop": Settled(), "chunk": 3, "mesh": mesh}
    result = trainer.fit(BATCH, 9, **options)
    assert np.isfinite(trainer.params.mean)
    assert int(result.trainer.step_count) == 9


def test_an_error_is_not_hidden():
    class Broken(GaussianFit):
        def residuals(self, model, batch):
            residuals = super().residuals(model, batch)
            return eqx.error_if(residuals, self.step_count == 7, "the lamp has gone")

    trainer = Broken(gaussian(), optax.adam(0.01))
    with pytest.raises(Exception, match="the lamp has gone") as caught:
        trainer.fit(BATCH, 20, chunk=3)
    assert "in place" in caught.value.__notes__[-1]
    assert np.isfinite(trainer.params.mean)


@pytest.mark.seams
@AS_COMPILED
def test_the_state_is_there_once():
    class Large(vn.Trainer):
        def loss(self, model, batch):
            return jnp.sum(jnp.square(model - batch))

    trainer = Large(jnp.zeros(10_000), optax.adam(0.1))
    record, source = Record(trainer, (), lambda: None), as_source(jnp.array(1.0))
    count = jnp.asarray(np.int32(5))
    parts = config_of(trainer), source, Monitor(None, None), record
    task, state = Task(*parts, count, count, 16), LoopState(trainer._progress, None)
    alias = {
        name: run.lower(task, state, ANYWHERE)
        .compile()
        .memory_analysis()
        .alias_size_in_bytes
        for name, run in {"new": run_chunk, "in place": run_chunk_in_place}.items()
    }
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer._progress))
    assert alias["new"] == 0
    assert alias["in place"] >= 0.99 * size

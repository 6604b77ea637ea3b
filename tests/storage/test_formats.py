"""Files and checkpoints of the present formats load in all versions to come.

Run as a program, this file writes them to `files`: once, for a new format.
"""

import functools
import shutil
import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn

WRITTEN_FILES = Path(__file__).parent / "files" / "formats_2.zip"
"""`trainer.vernal` and a directory `fit` of checkpoints, both after `WRITTEN` steps."""

WRITTEN = 20
BATCH = np.asarray(0.5)


class Noisy(vn.Trainer):
    """Has each thing that a fit changes, and a step that is not finite."""

    def loss(self, model, batch, *, key, state):
        target = batch + 0.01 * jax.random.normal(key)
        loss = sum(jnp.sum((leaf - target) ** 2) for leaf in model.values())
        bad = jnp.where(self.step_count == 7, jnp.nan, 1.0)
        return loss * bad, {"seen": state["seen"] + 1}


@functools.cache
def make():
    model = {
        "broad": jnp.tile(jnp.arange(4, dtype="float32"), 5_000),
        "small": jnp.asarray([1.0, -2.0, 3.0]),
        # This name cannot be that of a member of an archive.
        "with/slash": jnp.asarray([3, -1], jnp.bfloat16),
    }
    rules = {
        "broad": optax.inject_hyperparams(optax.sgd)(1 / 16, momentum=0.5),
        "small": optax.adam(1 / 8),
        "with/slash": vn.window(optax.sgd(1 / 32), start=10),
    }
    fmat = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 2.0]])
    return Noisy(
        model,
        vn.ParamOptimiser(rules),
        nan_policy=vn.SkipStep() | vn.StopAfter(4),
        projector=vn.EigenProjector.from_blocks({"small": fmat}, model),
        key=jax.random.key(3),
        state={"seen": jnp.asarray(0)},
    )


def fit(trainer, steps, **options):
    """Goes on to a number of steps, counted from the beginning."""
    return trainer.fit(
        BATCH,
        steps - int(trainer.step_count),
        record=("small", "with/slash"),
        validation=(np.asarray(0.25), 5),
        stop=vn.Patience(500),
        chunk=5,
        **options,
    )


@functools.cache
def expected(steps):
    return fit(make(), steps)


def values(trainer):
    parts = trainer.params, trainer.opt_state, trainer.best, trainer.state
    return jax.tree.leaves(parts)


def require_close(found, others):
    for leaf, other in zip(found, others, strict=True):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(
            np.asarray(leaf, float), np.asarray(other, float), rtol=1e-4
        )


def require_written(trainer):
    """These are the values that were written."""
    assert trainer.step_count == WRITTEN
    assert trainer.state["seen"] == WRITTEN - 1
    assert trainer.nan_report()["loss"] == vn.NanCount(1, 7)
    np.testing.assert_allclose(trainer.best_loss, BEST_LOSS, rtol=1e-6)
    for name, written in PARAMS.items():
        found = np.asarray(trainer.params[name], float)[:4]
        np.testing.assert_allclose(found, written, rtol=1e-6)


BEST_LOSS = 1191.6023026534365
PARAMS = {
    "broad": [0.4985050857067108, 0.496667742729187, 0.49483048915863037, 0.4929931163],
    "small": [0.7504116564244188, -0.14924921845572925, 1.4185190814001156],
    "with/slash": [1.8984375, -0.33984375],
}


@pytest.fixture
def folder(tmp_path):
    with zipfile.ZipFile(WRITTEN_FILES) as archive:
        archive.extractall(tmp_path)
    return tmp_path


@pytest.mark.loose_dtypes
def test_a_file(folder):
    loaded = vn.load(folder / "trainer.vernal", make())
    require_written(loaded)
    require_close(values(loaded), values(expected(WRITTEN).trainer))
    found = fit(loaded, 2 * WRITTEN).trainer
    require_close(values(found), values(expected(2 * WRITTEN).trainer))


@pytest.mark.loose_dtypes
def test_a_directory_of_checkpoints(folder):
    checkpoints = vn.Checkpoints(folder / "fit", every=10)
    restored = fit(make(), WRITTEN, checkpoint=checkpoints)
    assert restored.stop_reason is vn.StopReason.TAKEN_BEFORE
    require_written(restored.trainer)
    for steps in WRITTEN, 2 * WRITTEN:
        found = fit(make(), steps, checkpoint=checkpoints)
        require_close(values(found.trainer), values(expected(steps).trainer))
        columns, others = found.history.to_dict(), expected(steps).history.to_dict()
        assert list(columns) == list(others)
        require_close(columns.values(), others.values())


def write():
    result = fit(make(), WRITTEN)
    with tempfile.TemporaryDirectory() as folder:
        vn.save(Path(folder) / "trainer.vernal", result.trainer)
        checkpoints = vn.Checkpoints(Path(folder) / "fit", every=10, keep=2)
        fit(make(), WRITTEN, checkpoint=checkpoints)
        # It holds the path of the folder, and nothing that is read.
        for path in Path(folder).rglob("commit_success.txt"):
            path.write_text("Checkpoint commit was successful.")
        shutil.make_archive(str(WRITTEN_FILES.with_suffix("")), "zip", folder)
    print("BEST_LOSS =", float(result.trainer.best_loss))
    leaves = result.trainer.params.items()
    print({name: np.asarray(leaf, float)[:4].tolist() for name, leaf in leaves})


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    write()

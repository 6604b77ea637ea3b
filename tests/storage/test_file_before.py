"""Files that the first versions wrote still load, each leaf to the bit."""

import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import same

FILES = Path(__file__).parent / "files"


class Bowl(vn.Trainer):
    def loss(self, model, batch, *, key):
        a, b = model["a"].astype("float32"), model["b"]
        return jnp.sum((a - batch) ** 2) + (b + 2) ** 2


def trainer(rate=0.125):
    model = {
        "a": jnp.asarray([3, -1], jnp.bfloat16),
        "b": jnp.asarray(0.5, "float32"),
        "frozen": jnp.ones(3),
    }
    late = vn.window(optax.inject_hyperparams(optax.sgd)(rate), start=1)
    rules = {"a": optax.adam(0.25), "b": late}
    policy = vn.SkipStep() | vn.StopAfter(4)
    optimiser = vn.ParamOptimiser(rules)
    return Bowl(model, optimiser, nan_policy=policy, key=jax.random.key(3))


def tree():
    return {
        "keys": [jax.random.key(3), jax.random.split(jax.random.key(4, impl="rbg"), 2)],
        "small": (jnp.asarray([1.5, -2], jnp.bfloat16), jnp.asarray([-3, 7], jnp.int4)),
        "swapped": np.arange(3, dtype=">f8"),
        "numbers": {"a": 1, "b": 2.5, "c": True, "d": 1 + 2j},
        # The first versions did not write text, not even that of an array.
        "left out": np.asarray(["one", "two"]),
        "a.b": jnp.ones(2),
        "a": {"b": jnp.zeros(2)},
        "../x/": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "": np.float32(-0.0),
    }


def listed(path):
    with zipfile.ZipFile(path) as archive:
        header = json.loads(archive.read("vernal.json"))
    return [(leaf["path"], leaf["shape"], leaf["dtype"]) for leaf in header["leaves"]]


def test_a_tree_of_before():
    loaded = vn.load(FILES / "tree.vernal", tree())
    assert jax.tree.structure(loaded) == jax.tree.structure(tree())
    assert same(loaded, tree())
    assert loaded["numbers"] == tree()["numbers"]
    assert loaded[""].tobytes() == np.float32(-0.0).tobytes()
    assert loaded["left out"].tolist() == ["one", "two"]


def test_a_trainer_of_before_and_how_it_goes_on():
    loaded = vn.load(FILES / "trainer.vernal", trainer())
    assert loaded.step_count == 3
    assert loaded.params["a"].astype("float32").tolist() == [2.25, -0.25390625]
    assert loaded.params["b"] == -0.59375
    assert loaded.best["a"].astype("float32").tolist() == [2.5, -0.5]
    assert loaded.best_loss == 12.015625
    batch = jnp.asarray([1.0, 2.0], "float32")
    new, expected = (
        fitted.fit(batch, 6 - int(fitted.step_count)).trainer
        for fitted in (loaded, trainer())
    )
    for leaf, other in zip(
        *(jax.tree.leaves((t.params, t.opt_state, t.best)) for t in (new, expected)),
        strict=True,
    ):
        # A machine rounds bfloat16 in its own way, at each of the six steps.
        np.testing.assert_allclose(
            np.asarray(leaf, float), np.asarray(other, float), rtol=2e-2, atol=2e-2
        )


def test_rates_of_the_program_are_taken_with_a_file_of_before():
    for rate in (0.5, np.float64(0.5)):
        loaded = vn.load(FILES / "trainer.vernal", trainer(rate))
        rates = loaded.opt_state.groups[1].inner_state.hyperparams
        assert rates["learning_rate"] == 0.5


@pytest.mark.parametrize("name", ["tree", "trainer"])
def test_a_leaf_is_named_as_before(name, tmp_path):
    like = {"tree": tree, "trainer": trainer}[name]()
    vn.save(tmp_path / "file", like)
    added = [("left out", [2], "<U3"), ("scored_on", [], "uint32")]
    new = [leaf for leaf in listed(tmp_path / "file") if leaf not in added]
    assert new == listed(FILES / f"{name}.vernal")

"""What is asked of a trainer by name says which names are like one that is missing."""

import copy
import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from vernal._tree import ByName

LM = optx.LevenbergMarquardt(1e-8, 1e-8)
BATCH = jnp.array([1.0, 2.0, 4.0])


class Levels(vn.Trainer):
    def residuals(self, model, batch):
        return model["log_V"] - batch


@functools.cache
def solved():
    trainer = Levels({"log_V": jnp.zeros(3)}, optax.sgd(0.1))
    return trainer.solve(LM, BATCH).trainer


# What has names, one that it has and one that it has not, and what that is told.
ELEMENTS = "log_V[0]", "log_V", "Did you mean 'log_V[2]' or 'log_V[1]' or 'log_V[0]'?"
PATHS = "log_V", "log_V[2]", "Did you mean 'log_V'?"
NAMED = {
    "report": (lambda t: t.report(BATCH), *ELEMENTS),
    "intervals": (lambda t: t.intervals(LM, BATCH), *ELEMENTS),
    "profiles": (lambda t: t.profile(LM, BATCH, ["log_V"]), *ELEMENTS),
    "nan_report": (lambda t: t.nan_report(), *PATHS),
    "learning_rates": (lambda t: t.learning_rates(), *PATHS),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_missing_name_is_told_its_neighbours(name):
    make, present, missing, told = NAMED[name]
    found = make(solved())
    assert found[present] is not None
    with pytest.raises(vn.UnknownPathError) as error:
        found[missing]
    assert isinstance(error.value, KeyError)
    assert str(error.value).endswith(told)


def test_else_it_is_a_dictionary():
    plain = {"b": (1.0, 2.0), "a": (0.0, 3.0)}
    named = ByName(plain)
    assert named == plain
    assert repr(named) == repr(plain)
    assert json.dumps(named) == json.dumps(plain)
    assert "c" not in named
    assert named.get("c") is None
    with pytest.raises(KeyError, match=r"There is no 0\. There is 'b', 'a'\."):
        named[0]
    for again in (pickle.loads(pickle.dumps(named)), copy.deepcopy(named)):
        assert type(again) is ByName
        assert list(again) == ["b", "a"]
    ours, theirs = map(jax.tree_util.tree_leaves_with_path, (named, plain))
    assert ours == theirs
    assert jax.tree.map(lambda x: -x, named) == {"a": (0.0, -3.0), "b": (-1.0, -2.0)}
    assert type(jax.tree.map(np.negative, named)) is ByName


def test_intervals_can_be_bounds():
    start = {"log_V": jnp.array(0.0)}
    ends = Levels(start).solve(LM, BATCH).trainer.intervals(LM, BATCH)
    low, high = ends["log_V"]
    again = Levels({"log_V": jnp.array(low)}, bounds=ends).solve(LM, BATCH + 9)
    assert float(again.model["log_V"]) == pytest.approx(high)

"""A projector of another origin: the parameters stay what they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

FISHER = np.array([[2.0, 1.0], [1.0, 2.0]]) * 1e4
SOLVER = optx.LevenbergMarquardt(1e-6, 1e-6)


class Sums(vn.Trainer):
    """Both parameters and their sum are measured, with the Fisher matrix above."""

    def residuals(self, model, batch):
        a, b = model["a"], model["b"]
        return 100.0 * (jnp.stack([a, b, a + b]) - batch)


START = {"a": 1.0, "b": 2.0}
BATCH = np.array([2.03, 1.017, 3.05])
# The solution of the normal equations.
BEST = np.linalg.solve(
    FISHER, 1e4 * np.array([BATCH[0] + BATCH[2], BATCH[1] + BATCH[2]])
)


def single(values):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)


def at(a, b, on=None):
    """By one matrix; or by a block for `a` alone, with `b` as it is."""
    origin = single({"a": a, "b": b})
    if on is None:
        return vn.EigenProjector.from_fisher(FISHER.astype(np.float32), origin)
    return vn.EigenProjector.from_blocks({on: np.float32(FISHER[:1, :1])}, origin)


MADE = {
    "projector=": lambda p: Sums(single(START), optax.sgd(0.1), projector=p),
    "reproject": lambda p: Sums(single(START), optax.sgd(0.1)).reproject(p),
}
MADE["replace"] = lambda p: Sums(p.origin, optax.sgd(0.1), projector=p).replace(
    model=single(START)
)
ORIGINS = {
    "here": (1.0, 2.0),
    "zero": (0.0, 0.0),
    "far": (1e4, -1e4),
    "farther": (1e7, -1e7),
    "one far": (1.0, 1e6),
}


@pytest.mark.parametrize("how", MADE)
@pytest.mark.parametrize("name", ORIGINS)
@pytest.mark.parametrize("on", [None, "a"])
def test_an_origin_moves_no_parameters(name, how, on):
    trainer, batch = MADE[how](at(*ORIGINS[name], on)), jnp.asarray(BATCH, jnp.float32)
    found = [float(trainer.params[name]) for name in "ab"]
    np.testing.assert_allclose(found, [1.0, 2.0], rtol=1e-5)
    solved = trainer.solve(SOLVER, batch).model
    found = [float(solved[name]) for name in "ab"]
    np.testing.assert_allclose(found, BEST, rtol=3e-6)


@pytest.mark.parametrize("how", MADE)
def test_a_direction_that_was_dropped_stays_where_it_is(how):
    origin = single({"a": 0.0, "b": 0.0})
    projector = vn.EigenProjector.from_fisher(np.diag(np.float32([2, 0])), origin)
    assert MADE[how](projector).params == single(START)


@pytest.mark.parametrize("how", MADE)
def test_an_origin_nearby_is_kept(how):
    trainer = MADE[how](at(1.5, 1.0))
    assert trainer.projector.origin == single({"a": 1.5, "b": 1.0})


def test_each_of_many_has_its_own_origin():
    origins = jnp.asarray([0.0, 1e7], jnp.float32)
    moved = jax.vmap(
        lambda a: MADE["reproject"](at(0.0, 0.0).at({"a": a, "b": -a})).params
    )(origins)
    np.testing.assert_allclose(moved["a"], [1.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(moved["b"], [2.0, 2.0], rtol=1e-5)


def test_a_model_for_each_of_many_is_kept():
    batch = jnp.asarray(BATCH, jnp.float32)
    starts = [MADE["projector="](at(x, -x).at(single(START))) for x in (1.0, 2.0)]
    trainers = vn.fit_many(starts, batch, 3).trainers
    far = trainers.replace(model=single({"a": 1e7, "b": 1e7}))
    rows = single({"a": np.array([1.1, 1.2]), "b": np.array([2.3, 2.4])})
    near = far.replace(model=rows)
    shapes = lambda t: jax.tree.map(jnp.shape, jax.tree.leaves(t))
    assert shapes(near) == shapes(trainers)
    for name in "ab":
        np.testing.assert_allclose(near.params[name], rows[name], rtol=1e-5)
    again = vn.fit_many(near, batch, 300).trainers.params
    for name, best in zip("ab", BEST, strict=True):
        np.testing.assert_allclose(again[name], best, rtol=1e-5)


@pytest.mark.parametrize("how", ["projector=", "reproject"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_an_origin_that_is_not_finite_is_refused(how, bad):
    with pytest.raises(ValueError, match=r"`projector`.* finite in 'b'.*projector\.at"):
        MADE[how](at(1.0, bad))

"""Arguments that are taken apart once: found by identity, and never out of date."""

import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import vernal as vn
from inside import prepared
from models import LineFit, line, line_batch, same

BATCH = line_batch()


class Owner(eqx.Module):
    value: jax.Array


def owner():
    return Owner(jnp.array(1.0))


def test_found_again_by_identity():
    one, other = owner(), (jnp.array(2.0), None)
    first = prepared(one, other)
    assert prepared(one, other) is first
    assert prepared(one, (jnp.array(2.0), None)) is not first
    assert prepared(owner(), other) is not first


def test_within_a_program_it_is_the_tree():
    one = owner()
    found, _ = prepared(one, None)
    add = jax.jit(lambda tree: tree.value + 1)
    assert add(found) == add(one) == 2


@pytest.mark.parametrize("tree", [[jnp.array(1.0)], {"a": jnp.array(1.0)}])
def test_what_may_change_is_left_as_it_is(tree):
    assert prepared(owner(), (tree,))[1][0] is tree


def test_nothing_is_kept_alive():
    one = owner()
    gone, (found, _) = weakref.ref(one), prepared(one, None)
    assert prepared(one, None)[0] is found
    del one, found
    gc.collect()
    assert gone() is None


def test_a_step_sees_another_optimiser():
    trainer = LineFit(line(), optax.sgd(0.1))
    trainer, _ = trainer.step(BATCH)
    faster = trainer.replace(optimiser=optax.sgd(0.2))
    moved = lambda trainer: trainer.step(BATCH)[0].params.slope - trainer.params.slope
    assert jnp.allclose(moved(faster), 2 * moved(trainer))
    assert same(trainer.step(BATCH)[0], trainer.step(BATCH)[0])


class Chosen(vn.Trainer):
    weights: dict

    def loss(self, model, batch):
        return self.weights["of loss"] * jnp.square(model - batch)


def test_a_step_sees_what_was_changed_in_place():
    weights = {"of loss": jnp.array(1.0)}

    class Weighted(Chosen):
        def __init__(self):
            self.weights = weights
            super().__init__(jnp.array(2.0), optax.sgd(0.1))

    trainer = Weighted()
    before = trainer.step(jnp.array(0.0))[1].loss
    trainer.weights["of loss"] = jnp.array(3.0)
    assert trainer.step(jnp.array(0.0))[1].loss == 3 * before

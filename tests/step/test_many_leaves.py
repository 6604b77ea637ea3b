"""A step of many leaves, rules or blocks: what it costs to compile, and its values.

Time to compile is proportional to the number of operations, which are counted here.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn


class Sum(vn.Trainer):
    def loss(self, model, batch):
        flat = jnp.concatenate([leaf.ravel() for leaf in model.values()])
        return jnp.sum(jnp.square(flat * batch - 1))


def model(count):
    return {f"p{i:03}": jnp.asarray(np.arange(2.0) + i) for i in range(count)}


def batch(count):
    return np.linspace(1.0, 2.0, 2 * count)


def matrix(seed):
    factor = np.random.default_rng(seed).normal(size=(5, 2))
    return factor.T @ factor


def with_leaves(count):
    return Sum(model(count), optax.sgd(1e-3))


def with_rules(count):
    rates = np.linspace(1e-3, 2e-3, count)
    rules = {path: optax.sgd(r) for path, r in zip(model(count), rates, strict=True)}
    return Sum(model(count), vn.ParamOptimiser(rules))


def with_blocks(count):
    trainer = with_leaves(count)
    blocks = {path: matrix(seed) for seed, path in enumerate(model(count))}
    return trainer.reproject(vn.EigenProjector.from_blocks(blocks, trainer.params))


def is_program(param):
    return hasattr(param, "eqns")


def operations(jaxpr):
    """Counts the operations of a program and of all programs within it."""
    counts = Counter()
    for eqn in jaxpr.eqns:
        counts[eqn.primitive.name] += 1
        for inner in filter(is_program, jax.tree.leaves(eqn.params)):
            counts += operations(inner)
    return counts


def of_step(make, count):
    trainer = make(count)
    closed = jax.make_jaxpr(lambda t, b: t.step(b))(trainer, batch(count))
    return operations(closed.jaxpr)


# The most operations for one more leaf, of which its SGD and its loss have eight.
@pytest.mark.parametrize(
    ("make", "most"), [(with_leaves, 15), (with_rules, 16), (with_blocks, 36)]
)
def test_a_step_has_a_fixed_number_of_operations_for_each_leaf(make, most):
    few, more, many = (of_step(make, count) for count in (17, 18, 19))
    assert many - more == more - few
    assert (many - more).total() <= most
    # What is costly is there once for all of them.
    added = set(many - few)
    assert not added & {"dot_general", "reduce_max", "is_finite", "cond", "while"}


def test_blocks_in_a_program_are_those_outside_of_one():
    projector, params = with_blocks(20).projector, model(20)
    latent = jax.tree.map(jnp.cos, projector.to_latent(params))
    for fn, given in (
        (projector.to_params, latent),
        (projector.to_latent, jax.tree.map(jnp.sin, params)),
        (projector.pull_back, params),
        (projector.precondition, params),
    ):
        eager, compiled = fn(given), jax.jit(lambda x, fn=fn: fn(x))(given)
        assert jax.tree.structure(eager) == jax.tree.structure(compiled)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-5), eager, compiled
        )


def test_of_many_leaves_the_report_names_the_bad_one():
    class RootOfOne(vn.Trainer):
        def loss(self, model, batch):
            return sum(jnp.sum(jnp.sqrt(leaf)).astype(float) for leaf in model.values())

    alone = {"half": np.ones((), np.float16), "single": np.ones((), np.float32)}
    leaves = model(20) | alone | {"large": np.ones(2000)}
    for path in ("p007", *alone, "large"):
        start = {name: np.asarray(leaf) + 1 for name, leaf in leaves.items()}
        start[path] = np.zeros_like(start[path])
        start = jax.tree.map(jnp.asarray, start)
        report = RootOfOne(start, optax.sgd(1e-3)).step(None)[0].nan_report()
        assert {name for name, found in report.items() if found.total} == {path}

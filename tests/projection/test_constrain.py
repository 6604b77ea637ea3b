"""`constrain` in a metric that couples parameters ends at the constrained optimum."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import lsq_linear

import vernal as vn
from inside import project
from models import Line

INF = np.inf


class Linear(vn.Trainer):
    """A x = b within bounds, for a flat vector or for two leaves of a dictionary."""

    low: jax.Array
    high: jax.Array

    def __init__(self, model, optimiser=None, low=0.0, high=INF, **options):
        super().__init__(model, optimiser, **options)
        # After `super().__init__`: nothing may ask for them before.
        self.low, self.high = jnp.asarray(low), jnp.asarray(high)

    def residuals(self, model, batch):
        matrix, data = batch
        flat, _ = jax.flatten_util.ravel_pytree(model)
        return matrix @ flat - data

    def constrain(self, model):
        clip = lambda leaf: jnp.clip(leaf, self.low, self.high).astype(leaf.dtype)
        return jax.tree.map(clip, model)


def problem(size, seed, dtype=np.float64):
    random = np.random.default_rng(seed)
    mixed = np.eye(size) + 0.9 * random.normal(size=(size, size))
    matrix, data = random.normal(size=(30, size)) @ mixed, 3 * random.normal(size=30)
    return matrix.astype(dtype), data.astype(dtype)


def excess(model, batch, low, high):
    """How much worse it is than SciPy's answer, and whether it is within."""
    matrix, data = (np.asarray(x, np.float64) for x in batch)
    flat = np.asarray(jax.flatten_util.ravel_pytree(model)[0], np.float64)
    assert np.all((flat >= np.float32(low)) & (flat <= np.float32(high)))
    reference = lsq_linear(matrix, data, (low, high), tol=1e-13)
    assert np.any(reference.active_mask), "the case has no bound that matters"
    return 0.5 * np.sum((matrix @ flat - data) ** 2) - reference.cost


CASES = {
    "eight": (8, 2, 0.0, INF, np.float64, optax.sgd(0.5), 200),
    "both sides": (8, 1, -0.1, 0.1, np.float64, optax.sgd(0.5), 200),
    "float32": (8, 2, 0.0, INF, np.float32, optax.sgd(0.5), 200),
    "adam": (
        *(8, 3, 0.0, INF, np.float64),
        *(optax.adam(optax.exponential_decay(0.3, 100, 0.3)), 1000),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_whitened_fit_ends_at_the_constrained_optimum(name):
    size, seed, low, high, dtype, optimiser, steps = CASES[name]
    batch = problem(size, seed, dtype)
    trainer = Linear(jnp.zeros(size, dtype), low=low, high=high)
    result = trainer.whiten(batch, optimiser=optimiser).fit(batch, steps)
    tolerance = 1e-4 if dtype is np.float32 else 1e-9
    assert abs(excess(result.model, batch, low, high)) < tolerance


SPLIT = {"a": jnp.zeros(2), "b": {"c": jnp.zeros(())}, "d": None, "e": jnp.zeros(1)}


def test_whatever_the_blocks_and_the_leaves():
    """One block of two leaves, and one of its own."""
    batch = problem(4, 4)
    trainer = Linear(SPLIT, low=-0.3, high=0.3)
    blocks = ("a", "b.c"), "e"
    whitened = trainer.whiten(batch, optimiser=optax.sgd(0.3), blocks=blocks)
    result = whitened.fit(batch, 500)
    assert abs(excess(result.model, batch, -0.3, 0.3)) < 1e-9


def test_of_many_each_is_projected():
    batch = problem(4, 1)
    starts = [
        Linear(jnp.full(4, v)).whiten(batch, optimiser=optax.sgd(0.5))
        for v in (0.0, 1.0)
    ]
    result = vn.fit_many(starts, batch, 100)
    for index in range(2):
        model = result.trainer(index).model
        assert abs(excess(model, batch, 0.0, INF)) < 1e-9


def test_the_nearest_point_in_the_metric():
    """Also where bounds on both sides make the search change its mind."""
    clip = lambda x, low, high: jnp.clip(x, low, high)
    solve = jax.jit(lambda p, x, *b: project(lambda v: clip(v, *b), p, x))
    for seed in range(20):
        random = np.random.default_rng(seed)
        root = random.normal(size=(8, 8))
        matrix = root @ root.T + 1e-3 * np.eye(8)
        low, high = -random.uniform(0, 0.5, 8), random.uniform(0, 0.5, 8)
        low[0], high[1] = -INF, INF
        point = random.normal(size=8)
        projector = vn.EigenProjector.from_fisher(jnp.asarray(matrix), jnp.zeros(8))
        found, is_other = solve(projector, jnp.asarray(point), low, high)
        upper = np.linalg.cholesky(matrix).T
        expected = lsq_linear(upper, upper @ point, (low, high), tol=1e-14)
        distance = 0.5 * np.sum((upper @ (np.asarray(found) - point)) ** 2)
        assert is_other
        assert distance - expected.cost < 1e-9


def test_within_the_bounds_nothing_is_touched():
    batch = problem(3, 0)
    free = Linear(jnp.zeros(3), low=-INF).whiten(batch, optimiser=optax.adam(0.1))
    model = free.fit(batch, 20).model

    class Unconstrained(Linear):
        constrain = vn.Trainer.constrain

    trainer = Unconstrained(jnp.zeros(3)).whiten(batch, optimiser=optax.adam(0.1))
    np.testing.assert_allclose(model, trainer.fit(batch, 20).model, rtol=1e-12)


@eqx.filter_jit
@eqx.filter_value_and_grad
def unrolled(rate_and_low, start, batch):
    """A sum of the model after three steps, and its derivatives."""
    rate, low = rate_and_low
    trainer = start.reproject(start.projector, optax.sgd(rate))
    trainer = eqx.tree_at(lambda t: t.low, trainer, low)
    after, _ = vn.unroll(trainer, batch, 3)
    return jnp.sum(after.model * jnp.arange(1.0, 4.0))


@pytest.mark.parametrize("high", [INF, 0.05])
def test_a_gradient_through_the_projection(high):
    batch = problem(3, 4)
    start = Linear(jnp.zeros(3), low=-0.1, high=high).whiten(batch)
    point = np.array([0.3, -0.1])
    found = unrolled(tuple(point), start, batch)[1]
    for slope, step in zip(found, 1e-6 * np.eye(2), strict=True):
        ends = [unrolled(tuple(point + s * step), start, batch)[0] for s in (-1, 1)]
        np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-6, rtol=1e-5)
        assert slope != 0


# What is refused.


class Normalised(Linear):
    def constrain(self, model):
        return model / jnp.linalg.norm(model)


class PositiveOffset(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model(x) - y

    def constrain(self, model):
        return eqx.tree_at(lambda m: m.offset, model, jnp.maximum(model.offset, 0))


X = np.linspace(0, 5, 20)
LINE = X, 2 * X - 1


def positive(optimiser=None):
    return PositiveOffset(Line(jnp.ones(()), jnp.ones(())), optimiser)


def preconditioned(wrap, **blocks):
    trainer = positive()
    fmat = trainer.fisher(LINE, **blocks)
    of = vn.EigenProjector.from_blocks if blocks else vn.EigenProjector.from_fisher
    return positive(wrap(vn.precondition(of(fmat, trainer.params))))


RULES = {"slope": optax.sgd(0.5), "offset": optax.sgd(0.5)}
PRECONDITIONED = {
    "first": lambda tx: vn.ParamOptimiser(RULES, first=tx),
    "chain": lambda tx: optax.chain(tx, optax.sgd(0.5)),
    "rule": lambda tx: vn.ParamOptimiser(
        {("slope", "offset"): optax.chain(optax.clip(1e9), tx, optax.sgd(0.5))}
    ),
    "window": lambda tx: vn.window(optax.chain(tx, optax.sgd(0.5)), 1),
}


@pytest.mark.parametrize("name", PRECONDITIONED)
def test_a_preconditioner_that_mixes_is_refused(name):
    trainer = preconditioned(PRECONDITIONED[name])
    for take in (lambda: trainer.fit(LINE, 5), lambda: trainer.step(LINE)):
        with pytest.raises(ValueError, match=r"'offset'.*`precondition` mixes"):
            take()


def test_a_block_of_its_own_is_the_remedy():
    wrap = PRECONDITIONED["first"]
    trainer = preconditioned(wrap, blocks=("slope", "offset"))
    model = trainer.fit(LINE, 200).model
    reference = lsq_linear(np.stack([X, np.ones(20)], 1), LINE[1], ([-INF, 0], INF))
    np.testing.assert_allclose([model.slope, model.offset], reference.x, atol=1e-8)


def test_a_constraint_that_mixes_is_refused_beside_a_projector():
    batch = problem(3, 0)
    trainer = Normalised(jnp.ones(3), optax.sgd(0.1))
    assert trainer.fit(batch, 2).model.shape == (3,)
    with pytest.raises(ValueError, match=r"`constrain` mixes elements.*`projector`"):
        trainer.whiten(batch).fit(batch, 2)


OTHERS = {
    "a reflection": jnp.abs,
    "a wrapping": lambda p: jnp.mod(p, 2 * jnp.pi),
    "a shrinkage": lambda p: 0.9 * p,
    "a threshold": lambda p: jnp.sign(p) * jnp.maximum(jnp.abs(p) - 0.1, 0),
    "a rounding": jnp.round,
    "a saturation": jnp.tanh,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_than_a_clip_is_refused_beside_a_projector(name):
    class Other(Normalised):
        def constrain(self, model):
            return OTHERS[name](model)

    batch = problem(3, 0)
    trainer = Other(jnp.ones(3), optax.sgd(0.1))
    if name == "a reflection":
        trainer.step(batch)  # beside none it is taken
    with pytest.raises(ValueError, match=r"`constrain` does more than clip"):
        trainer.whiten(batch)
    fmat = Normalised(jnp.ones(3)).fisher(batch)  # the same, in one program for all
    projector = vn.EigenProjector.from_fisher(fmat, trainer.params)
    with pytest.raises(ValueError, match=r"`constrain` does more than clip"):
        Other(jnp.ones(3), optax.sgd(0.1), projector=projector).fit(batch, 2)

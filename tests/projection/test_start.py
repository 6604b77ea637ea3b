"""A start is not the data: what it does not see keeps a scale of its own."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

import vernal as vn

X = jnp.linspace(0.0, 5.0, 80)
SIGMA = 0.1


def peak(m, x):
    return m["power"] * jnp.exp(-0.5 * ((x - m["mean"]) / m["std"]) ** 2)


def decay(m, x):
    return m["height"] * jnp.exp(-m["rate"] * x) + m["floor"]


def line(m, x):
    nested = m["line"]
    top = nested["height"] * jnp.exp(-0.5 * ((x - nested["mean"]) / 0.3) ** 2)
    return top + m["level"] + m["slope"] * x


# The model, the truth, a start, and how many directions are null there.
BLIND = {
    "peak of no height": (
        peak,
        {"power": 4.0, "mean": 2.5, "std": 0.8},
        {"power": 0.0, "mean": 2.2, "std": 1.0},
        2,
    ),
    "decay of no rate": (
        decay,
        {"height": 3.0, "rate": 0.8, "floor": 1.0},
        {"height": 2.0, "rate": 0.0, "floor": 0.5},
        1,
    ),
    "line of no height": (
        line,
        {"line": {"height": 3.0, "mean": 2.5}, "level": 1.0, "slope": 0.5},
        {"line": {"height": 0.0, "mean": 2.3}, "level": 0.5, "slope": 0.0},
        1,
    ),
}


def arrays(model, dtype=jnp.float64):
    return jax.tree.map(lambda value: jnp.asarray(value, dtype), model)


class Fit(vn.Trainer):
    name: str = eqx.field(static=True)

    def __init__(self, name, *args, **options):
        self.name = name
        super().__init__(*args, **options)

    def residuals(self, model, batch):
        x, y = batch
        return (BLIND[self.name][0](model, x) - y) / SIGMA


@functools.cache
def compiled(name):
    """A model by a flat vector, its derivative, and the truth."""
    function, truth, *_ = BLIND[name]
    vector, unravel = ravel_pytree(arrays(truth))
    curve = lambda vector: function(unravel(vector), X)
    return jax.jit(curve), jax.jit(jax.jacfwd(curve)), np.asarray(vector)


def problem(name, dtype=jnp.float64):
    curve, _, truth = compiled(name)
    noise = SIGMA * np.random.default_rng(0).normal(size=X.size)
    y = np.asarray(curve(truth)) + noise
    start = arrays(BLIND[name][2], dtype)
    return Fit(name, start), (jnp.asarray(X, dtype), jnp.asarray(y, dtype))


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, jnp.float64) for name in BLIND), ("line of no height", jnp.float32)],
)
def test_whiten_keeps_what_the_start_does_not_see(name, dtype):
    trainer, batch = problem(name, dtype)
    white = trainer.whiten(batch)
    size, nullity = white.projector.latent_size, BLIND[name][-1]
    assert size == len(jax.tree.leaves(trainer.params))
    assert white.projector.rank == size - nullity
    assert len(white.projector.null_space()) == nullity
    # Every direction moves, a null one by the parameters' own scale.
    steps = np.asarray(white.projector.matrix, float)
    assert np.linalg.matrix_rank(steps / np.abs(steps).max(axis=1)[:, None]) == size
    fisher = np.asarray(trainer.fisher(batch), float)
    scale = np.where(np.diag(fisher) > 0, np.diag(fisher), 1) ** -0.5
    null = np.linalg.norm(steps[:, size - nullity :] / scale[:, None], axis=0)
    np.testing.assert_allclose(null, 1, rtol=1e-4)
    # What is told of errors is what the data say.
    assert np.isinf(jax.tree.leaves(white.standard_errors(batch))).sum() >= nullity
    assert "unconstrained" in white.table(batch)
    assert trainer.whiten(batch, on_null="drop").projector.latent_size == size - nullity


@pytest.mark.parametrize("name", BLIND)
def test_whitened_again_and_again_it_arrives(name):
    """Four times with a bare solver; no whitening but the first compiles anything."""
    trainer, batch = problem(name)
    curve, slopes, truth = compiled(name)
    residuals = lambda b: np.asarray(curve(b) - batch[1]) / SIGMA
    jacobian = lambda b: np.asarray(slopes(b)) / SIGMA
    best = scipy.optimize.least_squares(residuals, truth, jacobian, xtol=1e-12)
    for _ in range(4):
        trainer = trainer.whiten(batch)
        trainer = trainer.solve(optx.BFGS(1e-8, 1e-8), batch).trainer
    found = residuals(np.array(jax.tree.leaves(trainer.params)))
    np.testing.assert_allclose(np.sum(found**2), 2 * best.cost, rtol=1e-6)
    assert np.isfinite(jax.tree.leaves(trainer.standard_errors(batch))).all()


def test_no_shape_depends_on_the_point():
    trainer, batch = problem("peak of no height")
    seeing = trainer.replace(model=arrays(BLIND["peak of no height"][1]))
    blocks = ("power", ("mean", "std"))
    for options in ({}, {"blocks": blocks}):
        blind, sighted = (t.whiten(batch, **options) for t in (trainer, seeing))
        assert jax.tree.structure(blind) == jax.tree.structure(sighted)
        shapes = [
            [(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (blind, sighted)
        ]
        assert shapes[0] == shapes[1]
        assert (blind.projector.rank, sighted.projector.rank) == (1, 3)


def test_whitening_under_jit_vmap_and_in_a_loop():
    trainer, batch = problem("peak of no height")
    powers = jnp.asarray([0.0, 2.0])

    def whitened(power):
        model = {**trainer.model, "power": power}
        white = trainer.replace(model=model).whiten(batch)
        errors = white.standard_errors(batch)
        return white.projector, white.projector.rank, errors["mean"]

    mapped, ranks, errors = jax.vmap(whitened)(powers)
    np.testing.assert_array_equal(ranks, [1, 3])
    np.testing.assert_array_equal(mapped.rank, [1, 3])
    np.testing.assert_array_equal(jnp.isinf(errors), [True, False])
    jitted, rank, error = eqx.filter_jit(whitened)(powers[1])
    assert rank == jitted.rank == 3
    np.testing.assert_allclose(error, errors[1])
    np.testing.assert_allclose(mapped.condition_number[1], jitted.condition_number)
    np.testing.assert_allclose(
        jitted.log_abs_det, jnp.log(abs(jnp.linalg.det(jitted.matrix)))
    )

    def again(carry):
        count, white = carry
        moved = {**white.params, "power": white.params["power"] + 1.0}
        projector = white.projector.at(moved)
        white = white.replace(model=projector.to_params(jnp.zeros(3)))
        return count + 1, white.whiten(batch)

    loop = eqx.filter_jit(
        lambda t: eqx.internal.while_loop(
            lambda carry: carry[0] < 2, again, (0, t), kind="lax"
        )
    )
    _, end = loop(trainer.whiten(batch))
    np.testing.assert_allclose(end.model["power"], 2.0)
    assert end.projector.rank == 3


def test_a_fit_that_is_whitened_again_compiles_nothing():
    traces = 0

    class Counted(Fit):
        def residuals(self, model, batch):
            nonlocal traces
            traces += 1
            return super().residuals(model, batch)

    name = "peak of no height"
    _, batch = problem(name)
    trainer = Counted(name, arrays(BLIND[name][2]), optax.sgd(0.1)).whiten(batch)
    trainer = trainer.fit(batch, 3).trainer
    once = traces
    again = trainer.replace(model=arrays(BLIND[name][1])).whiten(batch)
    again.fit(batch, 3)
    assert (trainer.projector.rank, again.projector.rank) == (1, 3)
    assert traces == once

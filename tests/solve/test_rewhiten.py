"""`solve` whitens again where its space has gone stale, and says where it is stuck."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import vernal as vn

X = jnp.linspace(0.1, 10.0, 40)
NOISE = 0.1 * jax.random.normal(jax.random.key(0), X.shape)
BFGS = optx.BFGS(1e-8, 1e-8)
LM = optx.LevenbergMarquardt(1e-8, 1e-8)
CONVERGED, STALLED = vn.StopReason.CONVERGED, vn.StopReason.STALLED


class Growth(vn.Trainer):
    def residuals(self, model, batch):
        return (model["a"] * jnp.exp(model["b"] * X) - batch) / 0.1


class Process(vn.Trainer):
    """A Gaussian process: how high, and how noisy."""

    def nll(self, model, batch):
        near = jnp.exp(-0.5 * jnp.square(X[:, None] - X[None]))
        noise = model["noise"] ** 2 * jnp.eye(len(X))
        factor = jnp.linalg.cholesky(model["height"] ** 2 * near + noise)
        white = jax.scipy.linalg.solve_triangular(factor, batch, lower=True)
        return 0.5 * white @ white + jnp.sum(jnp.log(jnp.diag(factor)))


def growth(a, b, cls=Growth, **options):
    return cls({"a": jnp.asarray(a), "b": jnp.asarray(b)}, **options)


Y = 2 * jnp.exp(0.3 * X) + NOISE
BEST = 0.5 * jnp.sum(jnp.square(NOISE / 0.1))


@eqx.filter_jit
def slope(method, trainer, batch):
    return jax.grad(lambda model: method(trainer, model, batch))(trainer.model)


def gradient(result, method, batch):
    """In error bars."""
    trainer = result.trainer
    slopes = slope(method, trainer, batch)
    errors = trainer.standard_errors(batch)
    return max(float(abs(slopes[key] * errors[key])) for key in slopes)


def chi_squared(trainer, model, batch):
    return 0.5 * jnp.sum(jnp.square(trainer.residuals(model, batch)))


@pytest.mark.parametrize("space", ["whole", "blocks"])
def test_another_space_goes_on_where_the_first_is_stale(space):
    blocks = None if space == "whole" else (("a", "b"),)
    trainer = growth(1.0, 2.0).whiten(Y, blocks=blocks)
    stale = trainer.solve(BFGS, Y, rewhiten=False)
    assert stale.stop_reason is STALLED
    assert stale.edm > 100
    assert stale.trainer.projector.origin["b"] == 2.0
    result = trainer.solve(BFGS, Y)
    assert result.stop_reason is CONVERGED
    assert result.trainer.best_loss < BEST
    # It is one history, in which the first part is that of the other.
    count = len(stale.history)
    np.testing.assert_array_equal(result.history.loss[:count], stale.history.loss)
    np.testing.assert_array_equal(
        result.history.steps, np.arange(int(result.trainer.step_count))
    )
    np.testing.assert_allclose(result.best["b"], result.model["b"])
    # The trainer goes on where it was whitened last.
    assert result.trainer.projector.origin["b"] != 2.0
    point = result.trainer.projector.to_params(result.trainer.latent)
    np.testing.assert_allclose(point["b"], result.model["b"], rtol=1e-12)
    # All rounds share the steps.
    short = trainer.solve(BFGS, Y, max_steps=count + 3)
    assert len(short.history) <= count + 3
    assert short.stop_reason in (vn.StopReason.MAX_STEPS, STALLED)


@pytest.mark.parametrize("solver", [BFGS, LM], ids=["BFGS", "LM"])
@pytest.mark.filterwarnings("ignore:.*far from the minimum")
@pytest.mark.parametrize("start", [(1.0, 5.0), (1.0, 2.0), (-1.0, 1.0)])
def test_it_arrives_or_says_that_it_did_not(start, solver):
    result = growth(*start).whiten(Y).solve(solver, Y)
    if result.stop_reason is CONVERGED:
        assert result.trainer.best_loss < BEST
    else:
        assert gradient(result, chi_squared, Y) > 1e-2
        assert "could still fall" in result.explain()


def test_a_process_from_far_too_little_noise():
    batch = jnp.sin(X) + NOISE
    start = {"height": jnp.asarray(1.0), "noise": jnp.asarray(1e-5)}
    result = Process(start).whiten(batch).solve(BFGS, batch)
    assert result.stop_reason is CONVERGED
    assert gradient(result, Process.nll, batch) < 0.1


def test_the_rounds_compile_once_and_draw_the_same_numbers():
    traces = 0

    class Counted(Growth):
        def residuals(self, model, batch, key):
            nonlocal traces
            traces += 1
            drawn = 1e-3 * jax.random.normal(key, X.shape)
            return super().residuals(model, batch) + drawn

    trainer = growth(1.0, 2.0, Counted, key=jax.random.key(4)).whiten(Y)
    trainer.solve(BFGS, Y, rewhiten=False)
    once = traces
    result = trainer.solve(BFGS, Y)
    assert len(result.history) > 30
    assert traces == once
    assert result.stop_reason is CONVERGED
    # At the end, too, the numbers are those of the first step.
    key = jax.random.fold_in(trainer.key, 0)
    residuals = Growth.residuals(trainer, result.model, Y)
    drawn = 1e-3 * jax.random.normal(key, X.shape)
    loss = 0.5 * jnp.sum(jnp.square(residuals + drawn))
    np.testing.assert_allclose(result.trainer.best_loss, loss, rtol=1e-9)


def test_a_space_of_another_making_is_left_alone():
    start = growth(1.0, 2.0)
    cov = jnp.diag(jnp.asarray([1e-4, 1e-6]))
    dropped = vn.EigenProjector.from_fisher(start.fisher(Y), start.params, rank=1)
    for projector in (
        dropped,
        vn.EigenProjector.from_covariance(cov, start.params, rank=1),
    ):
        trainer = start.reproject(projector)
        result = trainer.solve(BFGS, Y)
        assert result.trainer.projector.latent_size == 1
        np.testing.assert_array_equal(result.trainer.projector.matrix, projector.matrix)


def test_on_a_mesh():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    trainer = growth(1.0, 2.0).whiten(Y)
    one, two = trainer.solve(BFGS, Y), trainer.solve(BFGS, Y, mesh=mesh)
    assert two.stop_reason is CONVERGED
    np.testing.assert_allclose(two.model["b"], one.model["b"], rtol=1e-6)
    assert two.trainer.projector.matrix.devices() == one.trainer.params["a"].devices()


@jax.custom_vjp
def squares(x):
    return 0.5 * jnp.sum(jnp.square(x))


squares.defvjp(lambda x: (squares(x), x), lambda x, slope: (slope * x,))


class FirstOrder(vn.Trainer):
    """Its derivatives have no derivatives in forward mode."""

    def nll(self, model, batch):
        a, b = model
        return squares(jnp.stack([10 * (b - a**2), 1 - a]))


class Root(vn.Trainer):
    """Where it begins, its second derivative is infinite."""

    def nll(self, model, batch):
        a, b = model
        return jnp.abs(a) ** 1.5 - a + 50 * (b - a) ** 2 + b**4


UNWHITENED = {"first order": (FirstOrder, (-1.2, 1.0)), "root": (Root, (0.0, 3.0))}


@pytest.mark.parametrize("name", UNWHITENED)
def test_without_another_space_it_goes_on_in_the_one_it_has(name):
    kind, start = UNWHITENED[name]
    start = tuple(jnp.array(x) for x in start)
    projector = vn.EigenProjector.from_fisher(jnp.diag(jnp.array([1.0, 4.0])), start)
    trainer = kind(start, projector=projector)
    solver = optx.GradientDescent(2e-3, rtol=1e-12, atol=1e-12)
    found, alone = (
        trainer.solve(solver, 0.0, max_steps=600, rewhiten=again)
        for again in (True, False)
    )
    assert len(found.history) == len(alone.history) == 600
    assert found.stop_reason is alone.stop_reason is vn.StopReason.MAX_STEPS
    # It learns its rate once more.
    np.testing.assert_allclose(found.best_loss, alone.best_loss, rtol=0.2)

"""JAX's own flags: the same results, whichever of them a user has set."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn


class Parabola(eqx.Module):
    slope: jax.Array
    rest: dict
    nothing: None = None

    def __call__(self, x):
        return self.slope * x + self.rest["offset"][0] + self.rest["offset"][1] * x * x


class ByLoss(vn.Trainer):
    def loss(self, model, batch):
        x, y = batch
        residuals = model(x) - y
        return jnp.mean(residuals**2), {"worst": jnp.max(jnp.abs(residuals))}


class ByResiduals(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return (model(x) - y) * 10


class Slope(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model["a"] * x - y


class Clipped(ByResiduals):
    def constrain(self, model):
        return eqx.tree_at(lambda m: m.slope, model, jnp.clip(model.slope, 0, 1.5))


class ByLikelihood(vn.Trainer):
    def nll(self, model, batch, *, key=None):
        x, y = batch
        return jnp.sum(((model(x) - y) * 10) ** 2) / 2


class Logarithm(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sum(jnp.log(model["a"] - batch))


def parabola(dtype=jnp.float64):
    offset = jnp.asarray([0.1, 0.2], dtype)
    return Parabola(jnp.asarray(0.5, dtype), {"offset": offset})


def data(dtype=jnp.float64):
    x = np.linspace(-1, 1, 8)
    return jnp.asarray(x, dtype), jnp.asarray(1.2 * x + 1 + 0.3 * x**2, dtype)


def momentum():
    return optax.sgd(1e-2, momentum=0.5)


def rules(**options):
    later = vn.window(optax.sgd(vn.delay(1e-2, 1)), start=1)
    return vn.ParamOptimiser({"slope": optax.sgd(1e-2), "rest": later}, **options)


def a_fit_in_float32():
    dtype = jnp.float32
    trainer = ByLoss(parabola(dtype), rules(), nan_policy=vn.SkipStep() | vn.StopFit())
    result = trainer.fit(
        vn.Minibatches(data(dtype), 4, key=jax.random.key(0)),
        6,
        record=("grad_norm", "slope", "worst", "grad_norms", "update_ratios"),
        every=2,
        validation=(data(dtype), 2),
        stop=vn.Converged(1e-9, 9, atol=1e-9) | vn.Patience(9),
    )
    return result.best, [result.history[name] for name in ("grad_norm", "worst")]


def a_step():
    trainer = ByLikelihood(parabola(), momentum(), key=jax.random.key(0))
    trainer, info = trainer.step(data())
    return trainer.params, info.loss, info.grad_norm


def many():
    starts = [ByLoss(parabola(), optax.sgd(rate)) for rate in (1e-2, 1e-3)]
    return vn.fit_many(starts, data(), 3).losses


def unrolled():
    trainer = ByLoss(parabola(), momentum(), nan_policy=vn.ZeroNans())
    return vn.unroll(trainer, data(), 3)[1]


def least_squares():
    whitened = ByResiduals(parabola()).whiten(data())
    result = whitened.solve(optx.LevenbergMarquardt(1e-5, 1e-5), data())
    return result.model, whitened.projector.covariance(), result.edm < 1e-3


def in_few_steps():
    trainer = Slope({"a": jnp.asarray(0.5)})
    return trainer.solve(optx.GaussNewton(1e-5, 1e-5), data()).model


def minimised():
    return ByLikelihood(parabola()).solve(optx.BFGS(1e-6, 1e-6), data()).model


def of_the_hessian():
    trainer = ByLikelihood(parabola())
    projector = vn.EigenProjector.from_fisher(trainer.fisher(data()), trainer.params)
    return projector.standard_errors(), projector.log_abs_det, projector.null_space()


def by_blocks():
    trainer = ByResiduals(parabola())
    blocks = trainer.fisher(data(), blocks=["slope", "rest"])
    projector = vn.EigenProjector.from_blocks(blocks, trainer.params)
    clipped = Clipped(parabola(), rules(), projector=projector)
    return clipped.step(data())[0].model


def low_rank():
    trainer = ByResiduals(parabola())
    residuals = lambda p: trainer.residuals(eqx.combine(p, trainer.model), data())
    product = vn.gauss_newton_matvec(residuals, trainer.params)
    key = jax.random.key(1)
    projector = vn.EigenProjector.from_matvec(product, trainer.params, 2, key=key)
    return projector.precondition(trainer.params), projector.standard_errors()


def the_seed():
    tree = {"a": jnp.asarray(1.0), "b": jnp.asarray([1.0, 2.0])}
    keys = {"a": optax.sgd(0.1), "b": optax.sgd(vn.delay(0.1, 2, 3))}
    optimiser, state = vn.map_optimisers(tree, keys)
    updates, _ = optimiser.update(tree, state, tree)
    matrix = jnp.asarray([[2.0, 0.1], [0.1, 3.0]])
    whitening = vn.eigen_projection(matrix)
    return updates, vn.zero_nan_check(tree), whitening @ whitening.T


def a_file(folder):
    trainer = ByLoss(parabola(), momentum())
    vn.save(folder / "trainer", trainer)
    return vn.load(folder / "trainer", trainer).params


WORK = (
    *(a_fit_in_float32, a_step, many, unrolled),
    *(of_the_hessian, by_blocks, low_rank, the_seed),
)


@contextlib.contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@contextlib.contextmanager
def debugged():
    with jax.debug_nans(True), jax.debug_infs(True), jax.enable_checks(True):
        yield


def numbers(tree):
    return [np.asarray(leaf, float) for leaf in jax.tree.leaves(tree)]


def agree(found, expected):
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.loose_dtypes
@pytest.mark.loose_ranks
@pytest.mark.parametrize("work", WORK)
def test_the_same_under_each_flag(work):
    expected = work()
    with strict(), debugged():
        found = work()
    agree(found, expected)


@pytest.mark.loose_dtypes
@pytest.mark.loose_ranks
def test_solvers_find_the_answer_of_numpy_under_each_flag():
    x, y = map(np.asarray, data())
    columns = np.stack([x, np.ones(8), x**2], axis=1)
    best = np.linalg.lstsq(columns, y, rcond=None)[0]
    model = best[0], best[1:]
    with strict(), debugged():
        agree(minimised(), model)
        agree(least_squares(), (model, np.linalg.inv(columns.T @ columns) / 100, True))


# Where all is traced anew, and where each operation is compiled by itself.
@pytest.mark.parametrize(
    ("flags", "work"),
    [(jax.checking_leaks, a_step), (jax.disable_jit, in_few_steps)],
)
def test_without_leaks_and_without_programs(flags, work):
    expected = work()
    with flags():
        found = work()
    agree(found, expected)


def test_files_under_the_flags(tmp_path):
    with strict(), debugged():
        agree(a_file(tmp_path), parabola())


def test_steps_transfer_nothing_of_themselves():
    trainer, batch = ByLoss(parabola(), momentum()), data()
    with jax.transfer_guard("disallow"):
        trainer.step(batch)
        trainer.fit(batch, 4, chunk=2, record="slope")


# The flags that look for NaN.


def falling(policy, start=1.0):
    """The loss is NaN from where the only parameter is below zero."""
    return Logarithm({"a": jnp.asarray(start)}, optax.sgd(0.6), nan_policy=policy)


ENDED = {
    "fit": lambda t: t.fit(jnp.asarray(0.0), 9),
    "step": lambda t: t.step(jnp.asarray(3.0)),
    "solve": lambda t: t.solve(optx.BFGS(1e-3, 1e-3), jnp.asarray(3.0)),
    "fit_many": lambda t: vn.fit_many([t, t], jnp.asarray(0.0), 9),
}


@pytest.mark.parametrize("entrance", ENDED)
def test_what_ends_a_fit_is_raised_by_jax_at_its_origin(entrance):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="log") as caught:
        ENDED[entrance](falling(vn.StopFit()))
    assert any("jnp.log(" in str(entry.statement) for entry in caught.traceback)


def test_infinities_too():
    trainer = falling(vn.StopFit(), start=0.0)
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match="inf"):
        trainer.fit(jnp.asarray(0.0), 9)


def test_the_policy_decides_what_a_bad_step_leads_to():
    with jax.debug_nans(True):
        batches = [jnp.asarray(value) for value in (0.0, 5.0, 0.0)]
        trainer = falling(vn.SkipStep(), start=2.0)
        result = trainer.fit(vn.Stream(batches), 3)
    assert result.trainer.nan_report()["loss"].total == 1
    assert result.trainer.model["a"] < 2.0


def test_an_answer_that_is_infinite_is_no_fault():
    trainer = ByResiduals(parabola())
    jac = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with debugged():
        assert trainer.best_loss == jnp.inf
        projector = vn.EigenProjector.from_jacobian(jac, trainer.params)
        errors, covariance = projector.standard_errors(), projector.covariance()
        stopped, _ = falling(vn.StopFit(), start=2.0).step(jnp.asarray(1.0))
        assert stopped.step_count == 1
    assert np.isinf(errors.rest["offset"][1])
    assert np.isinf(covariance[2, 2])


def test_a_callback_has_the_flags_of_its_user():
    seen = set()
    look = lambda *_: seen.add((is_set, jax.config.jax_debug_nans))
    trainer = falling(vn.SkipStep(), start=9.0)
    for is_set in (True, False):
        with jax.debug_nans(is_set):
            trainer.fit(jnp.asarray(0.0), 2, callback=look)
    assert seen == {(True, True), (False, False)}

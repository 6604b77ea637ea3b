"""`Trainer.solve`: any solver of Optimistix, as if called by hand, and what is kept."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from marked import marked
from models import Gaussian, GaussianFit, same

X = np.linspace(-5.0, 5.0, 60)
TRUTH = (0.3, 1.2, 4.0)


def peak(*values, dtype=jnp.float64):
    return Gaussian(*(jnp.asarray(value, dtype) for value in values))


class Peak(eqx.Module):
    """The same by two leaves of unlike shapes, which are less to compile than three."""

    place: jax.Array
    power: jax.Array

    def __call__(self, x):
        return Gaussian(*self.place, self.power)(x)


@functools.cache
def data(seed=0):
    noise = 0.1 * np.random.default_rng(seed).normal(size=X.shape)
    return X, curve(*TRUTH) + noise, np.full(X.shape, 0.1)


def curve(mean, std, power):
    return power * np.exp(-0.5 * ((X - mean) / std) ** 2)


def start_loss():
    """Half the chi-squared where the fits start."""
    _, y, sigma = data()
    return 0.5 * np.sum(((curve(*START) - y) / sigma) ** 2)


START = (0.0, 1.0, 3.0)
MINIMISERS = {
    "BFGS": lambda tol: optx.BFGS(tol, tol),
    "LBFGS": lambda tol: optx.LBFGS(tol, tol),
    "NonlinearCG": lambda tol: optx.NonlinearCG(tol, tol),
    "NelderMead": lambda tol: optx.NelderMead(tol, tol),
    "BestSoFar": lambda tol: optx.BestSoFarMinimiser(optx.DFP(tol, tol)),
    "ParamOptimiser": lambda tol: optx.OptaxMinimiser(
        vn.ParamOptimiser({"**": optax.adam(0.05)}), tol, tol
    ),
}
LEAST_SQUARES = {
    "LevenbergMarquardt": lambda tol: optx.LevenbergMarquardt(tol, tol),
    # By QR, its default, the program by hand has other results now and then.
    "Dogleg": lambda tol: optx.Dogleg(tol, tol, linear_solver=lx.SVD()),
    "BestSoFar squares": lambda tol: optx.BestSoFarLeastSquares(
        optx.LevenbergMarquardt(tol, tol)
    ),
}
SOLVERS = MINIMISERS | LEAST_SQUARES
# Of the kinds of state; those of other tests are BFGS and Levenberg-Marquardt.
APART = ("LBFGS", "NelderMead", "ParamOptimiser", "BestSoFar squares")
# Solvers that do not arrive in the steps that a test has time for.
SLOW = {"NonlinearCG", "NelderMead", "ParamOptimiser"}


def by_hand(trainer, solver, batch, max_steps):
    """What one writes with Optimistix alone."""
    projector = trainer.projector
    to_params = (lambda p: p) if projector is None else projector.to_params
    start = trainer.params if projector is None else trainer.latent

    def residuals(point, _):
        return trainer.residuals(to_params(point), batch)

    def loss(point, _):
        return 0.5 * jnp.sum(residuals(point, _) ** 2)

    options = {"max_steps": max_steps, "throw": False}
    if isinstance(solver, optx.AbstractMinimiser):
        return to_params, optx.minimise(loss, solver, start, **options)
    return to_params, optx.least_squares(residuals, solver, start, **options)


# All others are in the parameters.
LATENT = {"BFGS", "LBFGS", "LevenbergMarquardt"}


@functools.cache
def solved(name):
    """A trainer and its result, before rounding decides the last steps."""
    trainer = GaussianFit(Peak(jnp.asarray(START[:2]), jnp.asarray(START[2])))
    trainer = trainer.whiten(data()) if name in LATENT else trainer
    return trainer, trainer.solve(SOLVERS[name](1e-4), data(), max_steps=60)


@pytest.mark.parametrize("name", marked(pytest.mark.seams, SOLVERS, *APART))
def test_as_by_hand(name):
    trainer, result = solved(name)
    to_params, expected = by_hand(trainer, SOLVERS[name](1e-4), data(), 60)

    steps = int(expected.stats["num_steps"])
    assert len(result.history) == steps == int(result.trainer.step_count)
    for ours, theirs in zip(
        jax.tree.leaves(result.model),
        jax.tree.leaves(to_params(expected.value)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    # The solver's own tolerance is not believed: the distance to the minimum decides.
    if name not in SLOW:
        assert result.stop_reason is vn.StopReason.CONVERGED
        assert result.edm < 1e-3
    elif result.stop_reason is not vn.StopReason.CONVERGED:
        converged = bool(expected.result == optx.RESULTS.successful)
        short = vn.StopReason.STALLED if converged else vn.StopReason.MAX_STEPS
        assert result.stop_reason is short
        assert result.edm > 1e-3


@pytest.mark.as_compiled
def test_each_call_has_the_same_bits():
    """XLA may run operations at once that must not be: see `options_in_order`."""
    trainer = GaussianFit(Peak(jnp.asarray(START[:2]), jnp.asarray(START[2])))
    solver, seen = optx.Dogleg(1e-4, 1e-4), set()
    for _ in range(300):
        result = trainer.solve(solver, data(), max_steps=60)
        leaves = jax.tree.leaves(result.model)
        seen.add(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))
    assert len(seen) == 1


class Near(optx.OptaxMinimiser):
    """Ends by the point that it is given, which those of Optimistix do not look at."""

    def terminate(self, fn, y, args, options, state, tags):
        return optx.max_norm(y) < 0.5, optx.RESULTS.successful


class Pull(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sum(model["a"] ** 2)


def test_a_solver_that_looks_at_the_point_takes_as_many_steps_as_by_hand():
    trainer, solver = Pull({"a": jnp.ones(2)}), Near(optax.sgd(0.1), 0.0, 0.0)
    loss = lambda params, _: trainer.loss(params, None)
    expected = optx.minimise(loss, solver, trainer.params)
    result = trainer.solve(solver, jnp.zeros(()))
    assert len(result.history) == int(expected.stats["num_steps"])
    assert same(result.model["a"], expected.value["a"])


@pytest.mark.parametrize("name", ["BFGS", "NelderMead", "LevenbergMarquardt"])
def test_the_history_has_the_losses_and_the_best_is_none_of_them_above(name):
    trainer, result = solved(name)
    losses = result.history.loss
    np.testing.assert_array_equal(result.history.steps, np.arange(len(losses)))
    if name != "NelderMead":  # which evaluates other points first
        np.testing.assert_allclose(losses[0], start_loss(), rtol=1e-12)
    best = 0.5 * np.sum(np.square(trainer.residuals(result.best, data())))
    np.testing.assert_allclose(best, result.trainer.best_loss, rtol=1e-9)
    assert result.trainer.best_loss <= np.min(losses[np.isfinite(losses)])


@pytest.mark.loose_dtypes
@pytest.mark.parametrize(
    ("kind", "name", "whiten"),
    [
        ("float32", "LevenbergMarquardt", True),
        ("mixed", "LevenbergMarquardt", True),
        ("mixed", "LBFGS", False),
    ],
)
def test_single_precision_and_mixed(kind, name, whiten):
    if kind == "float32":
        model = peak(*START, dtype=jnp.float32)
        batch = tuple(np.asarray(array, "f4") for array in data())
    else:
        model, batch = peak(*START), data()
        model = eqx.tree_at(lambda m: m.mean, model, jnp.float32(START[0]))
    trainer = GaussianFit(model)
    trainer = trainer.whiten(batch) if whiten else trainer
    result = trainer.solve(SOLVERS[name](1e-4), batch)
    assert result.stop_reason is vn.StopReason.CONVERGED
    for new, old in zip(
        jax.tree.leaves(result.model), jax.tree.leaves(model), strict=True
    ):
        assert new.dtype == old.dtype
    np.testing.assert_allclose(jax.tree.leaves(result.model), TRUTH, atol=0.1)


def test_fit_after_solve_after_fit():
    trainer = GaussianFit(peak(*START), optax.adam(1e-2))
    first = trainer.fit(data(), 20).trainer
    second = first.solve(optx.BFGS(1e-8, 1e-8), data()).trainer
    third = second.fit(data(), 20)
    assert int(third.trainer.step_count) == int(second.step_count) + 20
    np.testing.assert_allclose(third.history.loss[0], second.best_loss, rtol=1e-9)
    fresh = trainer.optimiser.init(trainer.params)
    assert eqx.tree_equal(jax.tree.map(jnp.asarray, fresh), second.opt_state)


def test_running_out_of_steps_is_no_error():
    trainer = GaussianFit(peak(*START), nan_policy=vn.RaiseOnNan())
    result = trainer.solve(optx.BFGS(1e-8, 1e-8), data(), max_steps=3)
    assert result.stop_reason is vn.StopReason.MAX_STEPS
    assert "max_steps" in str(result.stop_reason)
    assert len(result.history) == 3
    told = "These were 3: `max_steps=` allows more, and `result.trainer.solve("
    assert told in result.explain()
    on = result.trainer.solve(optx.BFGS(1e-8, 1e-8), data())
    assert on.stop_reason is vn.StopReason.CONVERGED
    assert on.history.steps[0] == 3
    assert "max_steps" not in on.explain()


class Root(vn.Trainer):
    """Its gradient is infinite at zero, its value is not."""

    def loss(self, model, batch):
        return jnp.sum(jnp.sqrt(model["a"])) + jnp.sum(model["b"] ** 2)


class Cliff(vn.Trainer):
    """A parabola whose minimum is beyond where it is defined."""

    def loss(self, model, batch):
        return jnp.where(model["a"] < 1, jnp.nan, model["a"] ** 2)


class Slack(vn.Trainer):
    """Two parameters of which only the sum counts."""

    def residuals(self, model, batch):
        total = model["a"] + model["b"]
        return jnp.stack([total - 3.0, 2 * total - 6.5])


def bad(result):
    return {name for name, count in result.trainer.nan_report().items() if count.total}


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


NAN_DATA = (X, np.where(np.arange(60) == 7, np.nan, data()[1]), data()[2])
STUMBLES = {
    "data": (GaussianFit, peak(*START), NAN_DATA, {"loss", "mean", "std", "power"}),
    "gradient": (Root, {"a": jnp.zeros(2), "b": jnp.ones(2)}, None, {"a"}),
    "on the way": (Cliff, {"a": jnp.asarray(3.0)}, None, {"loss"}),
}


@pytest.mark.parametrize("name", marked(pytest.mark.seams, STUMBLES, "on the way"))
@pytest.mark.parametrize(
    "solver",
    [
        optx.BFGS(1e-8, 1e-8),
        optx.OptaxMinimiser(optax.sgd(0.2), 1e-8, 1e-8),
        optx.GradientDescent(0.2, 1e-8, 1e-8),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_a_value_that_is_not_finite_is_told_and_never_kept(solver, name):
    cls, model, batch, expected = STUMBLES[name]
    result = cls(model).solve(solver, batch, max_steps=50)
    assert finite((result.model, result.best))
    assert not result.trainer.stopped
    if (name, type(solver)) == ("on the way", optx.BFGS):
        # Its line search comes to rest at the edge.
        assert result.stop_reason is not vn.StopReason.NON_FINITE
        np.testing.assert_allclose(result.model["a"], 1.0, atol=1e-3)
        return
    assert result.stop_reason is vn.StopReason.NON_FINITE
    assert bad(result) == expected
    with pytest.raises(vn.NonFiniteError) as error:
        cls(model, nan_policy=vn.RaiseOnNan()).solve(solver, batch, max_steps=50)
    assert set(error.value.paths) == expected
    assert finite(error.value.result.model)


def test_the_nan_report_of_a_fit_is_kept():
    trainer = GaussianFit(peak(*START), optax.adam(1e-2), nan_policy=vn.SkipStep())
    trainer = trainer.fit(NAN_DATA, 3).trainer
    before = trainer.nan_report()
    assert before["loss"].total == 3
    after = trainer.solve(optx.BFGS(1e-8, 1e-8), data()).trainer.nan_report()
    assert after == before


def test_a_start_that_is_not_finite_ends_at_once():
    result = GaussianFit(peak(jnp.nan, 1.0, 3.0)).solve(optx.BFGS(1e-8, 1e-8), data())
    assert result.stop_reason is vn.StopReason.NON_FINITE
    assert len(result.history) <= 1


@pytest.mark.parametrize("solver", [optx.GaussNewton, optx.Dogleg])
def test_a_linear_problem_without_a_solution(solver):
    linear_solver = lx.AutoLinearSolver(well_posed=True)
    model = {"a": jnp.asarray(3.0), "b": jnp.asarray(1.0)}
    if solver is optx.GaussNewton:
        solver = optx.GaussNewton(1e-8, 1e-8, linear_solver=lx.LU())
    else:
        solver = optx.Dogleg(1e-8, 1e-8, linear_solver=linear_solver)
    result = Slack(model).solve(solver, None, max_steps=20)
    assert finite(result.model)
    assert result.stop_reason is not vn.StopReason.CONVERGED


def test_dropping_the_slack_solves_it():
    model = {"a": jnp.asarray(3.0), "b": jnp.asarray(1.0)}
    trainer = Slack(model).whiten(None, on_null="drop")
    assert trainer.projector.latent_size == 1
    result = trainer.solve(optx.GaussNewton(1e-8, 1e-8), None)
    assert result.stop_reason is vn.StopReason.CONVERGED
    np.testing.assert_allclose(sum(result.model.values()), 3.2)


def test_compiles_once():
    traces = 0

    class Counted(GaussianFit):
        def residuals(self, model, batch):
            nonlocal traces
            traces += 1
            return super().residuals(model, batch)

    def solvers():
        return (
            optx.LevenbergMarquardt(1e-8, 1e-8),
            optx.OptaxMinimiser(optax.adam(1e-2), 1e-8, 1e-8),
        )

    def run(start, seed, max_steps):
        for solver in solvers():
            trainer = Counted(peak(*start)).whiten(data(seed))
            moved = trainer.solve(solver, data(seed), max_steps=max_steps).trainer
            moved.whiten(data(seed)).solve(solver, data(seed), max_steps=max_steps)

    run(START, 0, 200)
    # What looks for the cause of a bad end is a program of its own.
    Counted(peak(jnp.nan, 1.0, 3.0)).solve(optx.BFGS(1e-8, 1e-8), data())
    once = traces
    run((0.1, 1.1, 3.5), 1, 201)
    assert traces == once


class Noisy(vn.Trainer):
    def loss(self, model, batch, key):
        value = jnp.sum((model["a"] - jax.random.normal(key, (3,))) ** 2)
        return value, {"drawn": value}


def test_a_key_draws_the_same_numbers_throughout():
    trainer = Noisy({"a": jnp.zeros(3)}, key=jax.random.key(5))
    result = trainer.solve(optx.BFGS(1e-10, 1e-10), None)
    drawn = jax.random.normal(jax.random.fold_in(jax.random.key(5), 0), (3,))
    np.testing.assert_allclose(result.model["a"], drawn, atol=1e-8)


class Both(vn.Trainer):
    """Its loss is not that of its residuals."""

    def residuals(self, model, batch):
        return model["a"] - 1.0

    def loss(self, model, batch):
        return jnp.mean((model["a"] - 2.0) ** 2)


@pytest.mark.filterwarnings("ignore::vernal.ObjectiveWarning")
def test_minimisers_take_the_loss_and_least_squares_the_residuals():
    trainer = Both({"a": jnp.zeros(2)})
    minimised = trainer.solve(optx.BFGS(1e-10, 1e-10), None)
    np.testing.assert_allclose(minimised.model["a"], 2.0, atol=1e-8)
    squared = trainer.solve(optx.GaussNewton(1e-10, 1e-10), None)
    np.testing.assert_allclose(squared.model["a"], 1.0, atol=1e-8)
    # The history and the best are of the loss, whatever was solved for.
    np.testing.assert_allclose(squared.history.loss[0], 4.0)


class Phase(vn.Trainer):
    def residuals(self, model, batch):
        return model["a"] * jnp.exp(1j * model["p"]) - batch


@pytest.mark.loose_dtypes
def test_complex_residuals_of_real_parameters():
    model = {"a": jnp.asarray(1.0), "p": jnp.asarray([0.2])}
    solver = optx.LevenbergMarquardt(1e-10, 1e-10)
    result = Phase(model).solve(solver, jnp.asarray([1 + 1j, 1 + 1j]))
    np.testing.assert_allclose(result.model["a"], 2**0.5, rtol=1e-8)
    np.testing.assert_allclose(result.model["p"], [jnp.pi / 4], rtol=1e-8)


def test_frozen_parameters_stay():
    trainer = GaussianFit(peak(*START), train=("mean", "power"))
    result = trainer.solve(optx.LevenbergMarquardt(1e-8, 1e-8), data())
    assert result.model.std == START[1]
    assert result.stop_reason is vn.StopReason.CONVERGED


def test_a_stop_of_a_fit_does_not_last():
    trainer = GaussianFit(peak(*START), optax.adam(1e-2))
    stopped = trainer.fit(NAN_DATA, 3).trainer
    assert stopped.stopped
    result = stopped.solve(optx.BFGS(1e-8, 1e-8), data())
    assert result.trainer.nan_report() == stopped.nan_report()
    assert result.stop_reason is vn.StopReason.CONVERGED
    on = result.trainer.fit(data(), 3)
    assert on.stop_reason is vn.StopReason.STEPS_TAKEN


def test_the_start_counts_even_if_the_solver_never_looks_at_it():
    trainer = GaussianFit(peak(*START))
    result = trainer.solve(SOLVERS["NelderMead"](1e-4), data(), max_steps=3)
    np.testing.assert_allclose(result.history.loss[0], start_loss(), rtol=1e-12)
    assert result.trainer.best_loss <= result.history.loss[0]


class Hesitant(optx.BacktrackingArmijo):
    """A search of a user's own, which rejects the first point."""

    def step(self, first_step, *args):
        step_size, accept, result, state = super().step(first_step, *args)
        return step_size, accept & ~first_step, result, state


@pytest.mark.parametrize("kind", [optx.BFGS, optx.GaussNewton])
def test_a_search_that_rejects_the_first_point_finds_no_loss_of_zero(kind):
    solver = eqx.tree_at(lambda s: s.search, kind(1e-8, 1e-8), Hesitant())
    result = GaussianFit(peak(*START)).solve(solver, data(), max_steps=1)
    np.testing.assert_allclose(result.history.loss, [start_loss()], rtol=1e-12)
    np.testing.assert_allclose(result.trainer.best_loss, start_loss(), rtol=1e-12)


@pytest.mark.parametrize("solver", [optx.BFGS, optx.NonlinearCG])
def test_what_has_no_minimum_ends_at_finite_parameters(solver):
    class Slope(vn.Trainer):
        def nll(self, model, batch):
            return -jnp.sum(model["a"] ** 4)

    result = Slope({"a": jnp.asarray([1.0, 2.0])}).solve(solver(1e-8, 1e-8), None)
    assert result.stop_reason is vn.StopReason.NON_FINITE
    assert finite((result.model, result.best, result.trainer.best_loss))


def test_data_are_taken_as_a_fit_takes_them():
    x, y, sigma = map(np.asarray, data())
    solver = optx.BFGS(1e-8, 1e-8)
    expected = GaussianFit(peak(*START)).solve(solver, data())
    found = GaussianFit(peak(*START)).solve(solver, (x, y, sigma))
    assert same(found.model, expected.model)
    with pytest.raises(TypeError, match="dtype"):
        GaussianFit(peak(*START)).solve(solver, (x, y.astype(str), sigma))


def test_more_steps_than_can_be_kept():
    with pytest.raises(ValueError, match="Solve several times"):
        GaussianFit(peak(*START)).solve(optx.BFGS(1e-8, 1e-8), data(), max_steps=2**40)

"""Solvers with bounds: the optimum of SciPy, and the same elements on their bounds."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
import scipy.optimize

import vernal as vn
from bounded import PROBLEMS

# From some starts another local minimum is found, as by SciPy from others.
SEVERAL = {
    *("wood", "kowalik and osborne", "osborne", "biggs", "box", "trigonometric"),
    "gauss1",
}
# So flat that a gradient is seen only where the loss is the same to ten digits.
FLAT = {"penalty"}
# From their bounds, ends are judged by second derivatives, those of all problems at
# once, which are much to compile: for so few that may end elsewhere, inside is enough.
CURVED = {"kowalik and osborne", "biggs", "gauss1"}

pytestmark = [pytest.mark.loose_dtypes, pytest.mark.loose_ranks]

SOLVERS = {
    "LevenbergMarquardt": optx.LevenbergMarquardt(1e-10, 1e-10),
    "BFGS": optx.BFGS(1e-10, 1e-10),
}

# Problems share programs with those of more parameters: the elements that they lack are
# their own residuals, and zero, where no solver ever moves them.
SIZES = (3, 10)


@functools.cache
def of_size(size):
    """The problems that share programs of so many parameters."""
    least = max((other for other in SIZES if other < size), default=0)
    return [name for name, own in PROBLEMS.items() if least < len(own.start) <= size]


@functools.cache
def placed(name):
    """The size of a problem's programs, and its index in them."""
    size = min(size for size in SIZES if size >= len(PROBLEMS[name].start))
    return size, np.array(of_size(size).index(name))


def filled(x, size, value):
    return np.append(x, np.full(size - len(x), value))


def rows_of(problem, x):
    """The residuals, and the elements that the problem lacks."""
    size = len(problem.start)
    return jnp.append(problem.residuals(x[:size]), x[size:])


@jax.jit
def values_of(index, x):
    """Residuals of the problem at an index, with zeros up to the most of any."""
    functions = [functools.partial(rows_of, PROBLEMS[name]) for name in of_size(x.size)]
    most = max(jax.eval_shape(function, x).size for function in functions)
    pad = lambda rows: jnp.pad(rows, (0, most - rows.size))
    return jax.lax.switch(index, [lambda x, f=f: pad(f(x)) for f in functions], x)


@jax.jit
def linearised_of(index, x):
    """The residuals and their Jacobian, of one pass through the problems."""
    twice = lambda x: (values_of(index, x),) * 2
    jac, values = jax.jacfwd(twice, has_aux=True)(x)
    return values, jac


@jax.custom_jvp
def residuals_of(index, x):
    """The residuals, which are differentiated once for all that is derived of them."""
    return values_of(index, x)


@residuals_of.defjvp
def _(primals, tangents):
    values, jac = linearised_of(*primals)
    return values, jac @ tangents[1]


class Fit(vn.Trainer):
    """The batch says which of the problems of its size it is."""

    def residuals(self, model, batch):
        return residuals_of(batch, model)


def solved(name, start, solver):
    """The result, and the parameters that are the problem's own."""
    problem, (size, index) = PROBLEMS[name], placed(name)
    low, high = filled(problem.low, size, -1.0), filled(problem.high, size, 1.0)
    trainer = Fit(jnp.asarray(filled(start, size, 0.0)), bounds={"": (low, high)})
    result = trainer.solve(SOLVERS[solver], jnp.asarray(index), max_steps=4000)
    x = np.asarray(result.model)
    assert not x[len(start) :].any()
    return result, x[: len(start)]


def starts(problem):
    """Inside, close to the bounds, and on them."""
    low, high = np.array(problem.low, float), np.array(problem.high, float)
    given = np.array(problem.start)
    width = np.where(np.isfinite(high - low), high - low, 1.0)
    near = np.where(np.isfinite(low), low + 1e-6 * width, given)
    on = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high, given))
    return {"inside": given, "near": near, "on": on}


def linearised(name, x):
    """Residuals and their Jacobian."""
    size, index = placed(name)
    residuals, jac = map(np.asarray, linearised_of(index, filled(x, size, 0.0)))
    return residuals, jac[:, : len(x)]


@functools.cache
def by_scipy(name):
    """The minima that SciPy's trust region and L-BFGS-B find from each start."""
    problem = PROBLEMS[name]
    low, high = np.array(problem.low, float), np.array(problem.high, float)
    width = np.where(np.isfinite(high - low), high - low, 1.0)

    def value(x):
        residuals, jac = linearised(name, x)
        return 0.5 * np.sum(np.square(residuals)), jac.T @ residuals

    # Of the residuals at a point, and then of their Jacobian there, it asks by itself.
    at = functools.lru_cache(1)(lambda *x: linearised(name, x))
    costs = []
    for start in starts(problem).values():
        inside = np.clip(start, low + 1e-10 * width, high - 1e-10 * width)
        with np.errstate(all="ignore"):
            squares = scipy.optimize.least_squares(
                lambda x: at(*x)[0],
                inside,
                lambda x: at(*x)[1],
                bounds=(low, high),
                **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
                max_nfev=400,
            )
            lbfgsb = scipy.optimize.minimize(
                value,
                np.clip(start, low, high),
                method="L-BFGS-B",
                jac=True,
                bounds=list(zip(low, high, strict=True)),
                options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000},
            )
        costs += [squares.cost, lbfgsb.fun]
    return np.array(costs)


def on_bound(x, problem):
    """Which elements are on their lower, and on their upper bounds."""
    low, high = np.array(problem.low, float), np.array(problem.high, float)
    scale = 1e-7 * np.maximum(np.abs(x), 1e-3)
    return np.stack([x - low < scale, high - x < scale])


def is_minimum(name, x):
    """Whether the loss can fall nowhere within the bounds, to six digits."""
    at_low, at_high = on_bound(x, PROBLEMS[name])
    residuals, jac = linearised(name, x)
    norms = np.maximum(np.linalg.norm(jac, axis=0), 1e-300)
    size = max(np.linalg.norm(residuals), 1e-10)
    slope = jac.T @ residuals / norms / size
    free = jac[:, ~(at_low | at_high)] / norms[~(at_low | at_high)]
    along = free @ np.linalg.lstsq(free, residuals, rcond=1e-12)[0]
    is_pushed = np.all(slope[at_low] > -1e-6) and np.all(slope[at_high] < 1e-6)
    if not is_pushed or np.linalg.norm(along) < 1e-3 * size:
        return is_pushed
    # The difference of two rates that are equal has no slope, but a curvature.
    return fall_by_hessian(name, x, ~(at_low | at_high)) < 1e-6 * size**2


def fall_by_hessian(name, x, is_free):
    """How far a step of Newton falls, if the loss curves upwards."""

    def slope(x):
        residuals, jac = linearised(name, x)
        return (jac.T @ residuals)[is_free]

    steps = np.diag(1e-5 * np.maximum(np.abs(x), 1e-3))[is_free]
    rows = [(slope(x + h) - slope(x - h)) / (2 * h.max()) for h in steps]
    hessian = (np.array(rows) + np.transpose(rows)) / 2
    curves_up = np.linalg.eigvalsh(hessian).min() > 0
    fall = 0.5 * slope(x) @ np.linalg.solve(hessian, slope(x))
    return fall if curves_up else np.inf


# Of many parameters by one of the solvers: each has a program of every problem.
@pytest.mark.parametrize(
    ("name", "solver"),
    [(name, "LevenbergMarquardt") for name in PROBLEMS]
    + [(name, "BFGS") for name in of_size(SIZES[0])],
)
def test_solvers_end_where_scipy_does(name, solver):
    problem = PROBLEMS[name]
    own = starts(problem)
    costs = by_scipy(name)
    for where, start in own.items():
        if where != "inside" and name in CURVED:
            continue
        if not np.isfinite(np.c_[linearised(name, start)]).all():
            continue  # a peak on the bound of its width, which is zero
        result, x = solved(name, start, solver)
        cost = float(result.trainer.best_loss)
        assert np.all((x >= problem.low) & (x <= problem.high)), where
        is_best = cost <= np.nanmin(costs) * (1 + 1e-6) + 1e-12
        assert is_best or name in SEVERAL, (where, cost, costs)
        # What is said to have converged has.
        has_converged = result.stop_reason is vn.StopReason.CONVERGED
        if has_converged and cost > 1e-12 and name not in FLAT:
            assert is_minimum(name, x), where


def test_a_bound_attracts_no_fit():
    """lmfit's transformation has no derivative on a bound: a fit stays there."""
    import lmfit  # which takes long

    problem = PROBLEMS["watson, 9"]
    start = starts(problem)["on"]
    known = by_scipy("watson, 9").min()
    names = [f"x{i}" for i in range(start.size)]
    rows = zip(names, start, problem.low, problem.high, strict=True)
    keys = ("value", "min", "max")
    params = lmfit.create_params(
        **{name: dict(zip(keys, row, strict=True)) for name, *row in rows}
    )

    def residuals(params):
        return linearised("watson, 9", [params[name].value for name in names])[0]

    stuck = lmfit.minimize(residuals, params, xtol=1e-12, ftol=1e-12).chisqr / 2
    end = solved("watson, 9", start, "LevenbergMarquardt")[0]
    assert stuck > 1.2 * known
    np.testing.assert_allclose(end.best_loss, known, rtol=1e-6)


PLACES = jnp.linspace(-5.0, 5.0, 60)


class Line(vn.Trainer):
    """A line of unknown extra width; the truth has none, and there no slope by it."""

    def residuals(self, model, batch):
        variance = model["width"] ** 2 + 1.0
        line = model["flux"] / jnp.sqrt(variance) * jnp.exp(-0.5 * PLACES**2 / variance)
        return (line - batch) / 0.05


@pytest.mark.parametrize(
    ("solver", "bounds", "are_many"),
    [("LevenbergMarquardt", (-3.0, 3.0), True), ("BFGS", (-1.0, None), False)],
)
def test_where_there_is_no_slope_no_bound_is_close(solver, bounds, are_many):
    noise = 0.05 * np.random.default_rng(1).normal(size=(3, 60))
    batches = np.exp(-0.5 * np.asarray(PLACES) ** 2) + noise
    start = {"flux": jnp.array(0.8), "width": jnp.array(0.7)}
    trainer = Line(start, bounds={"width": bounds})
    solver = SOLVERS[solver]
    ends = [trainer.solve(solver, jnp.asarray(batch)).trainer for batch in batches]
    if are_many:
        data = jnp.asarray(batches)
        many = vn.fit_many([trainer] * 3, data, 500, data_axis=0, solver=solver)
        ends += [many.trainer(index) for index in range(3)]
    for ended, batch in zip(ends, itertools.cycle(batches)):
        squares = jnp.sum(ended.residuals(ended.model, batch) ** 2)
        np.testing.assert_allclose(squares / 2, ended.best_loss, rtol=1e-6)
        assert abs(ended.model["width"]) < 0.9


ENERGIES = np.linspace(0.3, 10, 40)
KNOWN = {"norm": 40.0, "index": 1.8, "column": 0.01, "sky": 0.8}


class Absorbed(vn.Trainer):
    """A power law behind gas, and the sky. Without a source its index is anything."""

    def residuals(self, model, batch):
        x = ENERGIES.astype(batch.dtype)
        return (absorbed(x, **model, exp=jnp.exp) - batch) / 0.5


def absorbed(x, norm, index, column, sky, exp=np.exp):
    return norm * x**-index * exp(-2 * column * x**-2.6) + sky


def absorbed_fit(seed, dtype=float):
    """Returns a whitened fit from far away, its data and the least loss."""
    draw = np.random.default_rng(seed)
    data = absorbed(ENERGIES, **KNOWN) + 0.5 * draw.normal(size=40)
    start = {
        "norm": 20 * 10 ** draw.uniform(-1, 1),
        "index": draw.uniform(0, 3),
        "column": draw.uniform(0, 1),
        "sky": 2.5 * 10 ** draw.uniform(-1, 1),
    }
    model = {name: jnp.asarray(x, dtype) for name, x in start.items()}
    known = scipy.optimize.least_squares(
        lambda x: (absorbed(ENERGIES, *x) - data) / 0.5,
        list(KNOWN.values()),
        bounds=([0, -5, 0, 0], np.inf),
    )
    batch = data.astype(dtype)
    bounds = dict.fromkeys(("norm", "column", "sky"), (0, None))
    return Absorbed(model, bounds=bounds).whiten(batch), batch, known.cost


def test_no_long_step_in_a_whitened_space_ends_on_a_bound_for_good():
    solver = optx.LevenbergMarquardt(1e-6, 1e-6)
    for seed in (21, 22):
        trainer, batch, least = absorbed_fit(seed)
        result = trainer.solve(solver, batch)
        assert result.stop_reason is vn.StopReason.CONVERGED
        assert result.trainer.best_loss == pytest.approx(least, abs=0.01), seed
        assert loss_at(result.model, batch) == pytest.approx(least, abs=0.01)


# Of the seeds the last needs no second start.
@pytest.mark.parametrize(
    ("dtype", "kind", "seeds"),
    [
        (np.float32, optx.LevenbergMarquardt, (20, 22, 1)),
        (np.float64, optx.BFGS, (13, 17, 1)),
    ],
)
def test_members_that_end_badly_in_a_whitened_space_begin_again(dtype, kind, seeds):
    solver = kind(1e-6, 1e-6)
    fits = [absorbed_fit(seed, dtype) for seed in seeds]
    trainers, batches, least = zip(*fits, strict=True)
    data = np.stack(batches)
    result = vn.fit_many(trainers, data, 256, data_axis=0, solver=solver)
    assert set(result.stop_reasons) == {vn.StopReason.CONVERGED}
    for index, (batch, lowest) in enumerate(zip(batches, least, strict=True)):
        one = result.trainer(index)
        assert loss_at(one.model, batch) == pytest.approx(lowest, abs=0.01)
        # It is in the space that it was given.
        again = one.projector.to_params(one.latent)
        np.testing.assert_allclose(again["index"], one.model["index"], rtol=1e-4)
        losses = result.history.loss[:, index]
        assert one.step_count == np.count_nonzero(~np.isnan(losses)) <= 256


def loss_at(model, batch):
    values = {name: float(x) for name, x in model.items()}
    return np.sum(((absorbed(ENERGIES, **values) - batch) / 0.5) ** 2) / 2


class Fragile(vn.Trainer):
    """A valley so narrow that steps down its gradient leave for where it raises."""

    def residuals(self, model, batch):
        steep = eqx.error_if(model["steep"], abs(model["steep"]) > 10.0, "too far")
        return jnp.array([1e3 * (steep - 1.0), model["positive"] - 2.0]) - batch


def test_where_the_second_start_leads_to_an_error_the_first_end_counts():
    start = {"steep": jnp.array(1.01), "positive": jnp.array(1.0)}
    trainer = Fragile(start, bounds={"positive": (0, None)})
    solver = optx.OptaxMinimiser(optax.sgd(1e-2), 1e-8, 1e-8)
    batch = jnp.zeros(2)
    with pytest.raises(RuntimeError, match="too far"):
        trainer.solve(solver, batch, max_steps=128)
    whitened = trainer.whiten(batch)
    result = whitened.solve(solver, batch, max_steps=128)
    assert result.stop_reason is not vn.StopReason.CONVERGED
    # The first way goes on, as if there had been no other.
    ended = result.trainer.residuals(result.model, batch)
    np.testing.assert_allclose(ended, 0.99**128 * np.array([10.0, -1.0]), rtol=1e-6)
    assert len(result.history) == 128
    assert result.trainer.projector is not None


@pytest.mark.parametrize("has_mesh", [False, True])
def test_of_members_whose_second_start_leads_to_an_error_the_first_end_counts(has_mesh):
    start = {"steep": jnp.array(1.01), "positive": jnp.array(1.0)}
    trainer = Fragile(start, bounds={"positive": (0, None)}).whiten(jnp.zeros(2))
    solver = optx.OptaxMinimiser(optax.sgd(1e-2), 1e-8, 1e-8)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("members",)) if has_mesh else None
    options = {"data_axis": 0, "solver": solver, "mesh": mesh}
    result = vn.fit_many([trainer] * 2, jnp.zeros((2, 2)), 128, **options)
    ended = np.stack(
        [
            1e3 * (result.trainers.params["steep"] - 1),
            result.trainers.params["positive"] - 2,
        ]
    )
    known = 0.99**128 * np.array([[10.0], [-1.0]])
    np.testing.assert_allclose(ended, np.tile(known, 2), rtol=1e-6)


def test_a_member_without_a_step_left_does_not_begin_again():
    start = {"steep": jnp.array(1.01), "positive": jnp.array(1.0)}
    trainer = Fragile(start, bounds={"positive": (0, None)}).whiten(jnp.zeros(2))
    solver = optx.LevenbergMarquardt(1e-8, 1e-8)
    options = {"data_axis": 0, "solver": solver}
    result = vn.fit_many([trainer] * 2, jnp.zeros((2, 2)), 1, **options)
    # A solver that has taken no step knows no loss, and says zero.
    np.testing.assert_allclose(result.trainers.best_loss, 50.5, rtol=1e-6)


class Steep(vn.Trainer):
    def residuals(self, model, batch):
        return jnp.array([1e3 * model["steep"], 10 * (model["positive"] - 2.0)]) - batch


@pytest.mark.parametrize("steps", [16, 128], ids=["higher", "not finite"])
def test_the_best_of_a_second_start_that_ends_badly_is_kept(steps):
    start = {"steep": jnp.array(1e-12), "positive": jnp.array(1.0)}
    trainer = Steep(start, bounds={"positive": (0, None)}).whiten(jnp.zeros(2))
    # In the parameters it is next to the minimum after a step, and then diverges.
    solver = optx.OptaxMinimiser(optax.sgd(1e-2), 1e-8, 1e-8)
    options = {"data_axis": 0, "solver": solver}
    many = vn.fit_many([trainer] * 2, jnp.zeros((2, 2)), steps, **options).trainers
    np.testing.assert_array_less(many.best_loss, 1e-8)
    np.testing.assert_allclose(many.params["positive"], 2 - 0.99**steps)


def test_a_second_start_that_diverges_leaves_the_first_end():
    start = {"steep": jnp.array(1e-12), "positive": jnp.array(1.0)}
    trainer = Steep(start, bounds={"positive": (0, None)}).whiten(jnp.zeros(2))
    solver = optx.OptaxMinimiser(optax.sgd(1e-2), 1e-8, 1e-8)
    result = trainer.solve(solver, jnp.zeros(2), max_steps=160)
    assert result.stop_reason is vn.StopReason.MAX_STEPS
    assert 1.5 < result.model["positive"] < 1.8
    assert result.trainer.best_loss < 1e-8


class Scaled(vn.Trainer):
    """Parameters of unlike scales, of which a minimiser needs a whitened space."""

    def residuals(self, model, batch):
        x, y = batch
        curve = model["height"] * jnp.exp(-model["rate"] * x) + 1e3 * model["slope"] * x
        return (curve + 1e-3 * model["base"] - y) / 0.05


@pytest.mark.parametrize("are_many", [False, True])
def test_a_minimum_on_a_bound_needs_no_second_start(are_many):
    start = {"height": 1.0, "rate": 1.5, "slope": 1e-4, "base": 100.0}
    start = {name: jnp.array(x) for name, x in start.items()}
    x = np.linspace(0, 3, 50)
    batch = x, 2 * np.exp(-0.7 * x) + x - 0.3
    trainer = Scaled(start, bounds={"base": (0, None)}).whiten(batch)
    solver = optx.BFGS(1e-8, 1e-8)
    if are_many:
        many = vn.fit_many([trainer] * 2, batch, 128, solver=solver)
        losses, [reason, _] = many.history.loss[:, 0], many.stop_reasons
        losses, result = losses[np.isfinite(losses)], many.trainer(0)
    else:
        alone = trainer.solve(solver, batch, max_steps=128)
        losses, reason, result = alone.history.loss, alone.stop_reason, alone.trainer
    assert reason is vn.StopReason.CONVERGED
    assert result.model["base"] == 0
    # It has the steps and the losses of its own way.
    assert result.step_count == len(losses) < 128
    np.testing.assert_allclose(losses[-1], result.best_loss, rtol=1e-6)

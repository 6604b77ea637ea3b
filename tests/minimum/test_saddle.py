"""At a saddle: along what the loss curves downwards."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

BFGS = optx.BFGS(1e-9, 1e-9)
STOP = vn.Converged(1e-7, 20)
# Takes steps that move nothing.
IDLE = optx.GradientDescent(1e-14, 1e-30, 1e-30)
X = jnp.linspace(0.0, 1.0, 40)
NOISE = 0.5 * jax.random.normal(jax.random.key(0), X.shape)


def jitter(m, batch):
    """Its derivative by the jitter is zero where there is none."""
    variance = 0.01 + m["jit"] ** 2
    squares = (batch - m["a"] * X - m["c"]) ** 2
    return 0.5 * jnp.sum(squares / variance + jnp.log(variance))


def mixed(m, _):
    """It curves downwards along a diagonal."""
    return 50 * m["x"] ** 2 + 2 * m["y"] * m["z"] + m["y"] ** 4 + m["z"] ** 4


def many(m, _):
    """Of too many parameters for a Hessian."""
    rest = jnp.sum(m["wide"] ** 2)
    return rest - (m["y"] - 0.1) ** 2 + m["y"] ** 4


# What is fitted, the start, and the words and the direction of the saddle.
SADDLES = {
    "jitter": (
        jitter,
        {"a": 1.0, "c": 0.0, "jit": 0.0},
        "curves downwards along jit (+1): ",
    ),
    "mixed": (
        mixed,
        {"x": 1.0, "y": 0.0, "z": 0.0},
        "curves downwards along y (+0.71), z (-0.71): ",
    ),
    "many": (
        many,
        {"wide": np.zeros(600), "y": 0.0},
        "curves downwards along y (-1): ",
    ),
}


class Fit(vn.Trainer):
    name: str

    def __init__(self, name, **options):
        start = jax.tree.map(jnp.asarray, SADDLES[name][1])
        super().__init__(start, optax.adam(0.05), **options)
        self.name = name

    def nll(self, model, batch):
        return SADDLES[self.name][0](model, batch)


@pytest.mark.parametrize("name", SADDLES)
def test_the_direction_of_downward_curvature_is_named(name):
    words, batch = SADDLES[name][2], 2 * X + 1 + NOISE
    trainer = Fit(name)
    if name == "many":
        result = trainer.solve(IDLE, batch)
    else:
        result = trainer.fit(batch, 3_000, stop=STOP, progress=False)
        assert result.stop_reason is vn.StopReason.STALLED
    has_more = result.stop_reason is vn.StopReason.MAX_STEPS
    remedy = "it may do so on the way." if has_more else "start from elsewhere."
    assert result.explain().startswith(str(result.stop_reason))
    assert result.explain().endswith(f" The loss {words}{remedy}")
    with pytest.raises(ValueError, match=r"Fit first; or, if .* elsewhere"):
        result.trainer.standard_errors(batch)
    # The sign of a direction without a slope may be either.
    assert f"the loss {words.split(' (')[0]}" in result.report(batch).note


@pytest.mark.parametrize("name", ["jitter", "mixed"])
def test_a_solve_goes_on_from_there(name):
    result = Fit(name).solve(BFGS, 2 * X + 1 + NOISE)
    assert result.stop_reason is vn.StopReason.CONVERGED
    assert "curves" not in result.explain()


def test_a_solver_without_steps_left_may_go_on():
    result = Fit("mixed").solve(BFGS, X, max_steps=2)
    assert result.stop_reason is vn.StopReason.MAX_STEPS
    words = "y (+0.71), z (-0.71): it may do so on the way."
    assert "`result.trainer.solve(solver, batch)` goes on" in result.explain()
    assert result.explain().endswith(f"The loss curves downwards along {words}")


PLACES = jnp.linspace(-6.0, 6.0, 61)


def bell(centre):
    return jnp.exp(-0.5 * (PLACES.astype(centre.dtype) - centre) ** 2)


# A symmetric model, the truth, and a start at which its squares are not lowest.
SYMMETRIC = {
    "two stars": (
        lambda x: x[1] * (bell(x[0] / 2) + bell(-x[0] / 2)),
        [2.0, 3.0],
        [0.0, 2.0],
    ),
    "one that overflows far away": (
        lambda x: x[1] + jnp.expm1(x[0] ** 2) * (PLACES.astype(x.dtype) + 7),
        [1.5, 3.0],
        [0.0, 2.0],
    ),
    "two lines at one place": (
        lambda x: x[0] * bell(x[2]) + x[1] * bell(x[3]) + x[4],
        [2.0, 1.0, -1.5, 1.0, 0.3],
        [1.0, 1.0, 0.1, 0.1, 0.0],
    ),
    "a product": (
        lambda x: x[0] * x[1] * PLACES.astype(x.dtype) + x[2],
        [2.0, 1.0, 0.5],
        [0.0, 0.0, 0.0],
    ),
}
# The truth is a symmetric point, or the data do not know of a parameter.
LOWEST = {
    "two stars in one": (SYMMETRIC["two stars"][0], [0.0, 3.0], [0.0, 2.0]),
    "idle": (lambda x: x[1] + 0 * x[0] * bell(x[1]), [1.0, 3.0], [2.0, 2.0]),
    "degenerate": (lambda x: (x[0] - x[1]) * bell(x[2]), [3.0, 1.0, 0.4], [1.0, 0, 0]),
    "a curved model": (
        lambda x: jnp.exp((x[0] + x[1]) * PLACES.astype(x.dtype) / 6) + x[2],
        [0.4, 0.2, 0.5],
        [0.6, 0.4, 0.0],
    ),
}
MODELS = {**SYMMETRIC, **LOWEST}
PRIORS = {"": vn.Normal(0.5, 5.0)}
KINDS = {"float64": (jnp.float64, None), "float32, priors": (jnp.float32, PRIORS)}
SOLVERS = {"BFGS": BFGS, "LevenbergMarquardt": optx.LevenbergMarquardt(1e-9, 1e-9)}


def of_size(size):
    """The models of so many parameters, which share programs."""
    return [name for name, model in MODELS.items() if len(model[2]) == size]


class Symmetric(vn.Trainer):
    """The batch says which of the models of its size it is."""

    def __init__(self, name, dtype=jnp.float64, beside=0.0, **options):
        start = jnp.asarray(MODELS[name][2], dtype)
        super().__init__(start.at[-2].add(beside), optax.adam(0.02), **options)

    def residuals(self, model, batch):
        index, data = batch
        models = [MODELS[name][0] for name in of_size(model.size)]
        fitted = jax.lax.switch(index, models, model)
        return (fitted - data) / jnp.asarray(0.05, model.dtype)


def measured(name, dtype=jnp.float64):
    fn, truth, _ = MODELS[name]
    noise = 0.05 * np.random.default_rng(0).normal(size=PLACES.size)
    index = of_size(len(truth)).index(name)
    return jnp.asarray(index), (fn(jnp.asarray(truth)) + noise).astype(dtype)


@pytest.mark.parametrize(("dtype", "priors"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_solve_leaves_a_symmetric_start(name, solver, priors, dtype):
    trainer = Symmetric(name, dtype, priors=priors)
    result = trainer.solve(SOLVERS[solver], measured(name, dtype))
    assert result.stop_reason is vn.StopReason.CONVERGED
    # As low as the noise allows: the start is at thousands.
    assert 2 * result.best_loss < 1.5 * PLACES.size


@pytest.mark.parametrize("name", ["two stars", "two lines at one place"])
def test_a_whitened_solve_does(name):
    batch = measured(name)
    trainer = Symmetric(name, priors=PRIORS).whiten(batch)
    result = trainer.solve(SOLVERS["LevenbergMarquardt"], batch)
    assert result.stop_reason is vn.StopReason.CONVERGED
    assert 2 * result.best_loss < 1.5 * PLACES.size


class Squared(vn.Trainer):
    """Lowest at 3, of which it knows nothing at 0. Beyond `reach` it is an error."""

    reach: jax.Array
    unit: jax.Array

    def __init__(self, reach=np.inf, unit=1.0, **options):
        super().__init__({"a": jnp.zeros(()), "c": jnp.zeros(())}, **options)
        # Arrays, so that all cases share a program.
        self.reach, self.unit = jnp.asarray(reach), jnp.asarray(unit)

    def residuals(self, model, batch):
        a = model["a"] / self.unit
        a = eqx.error_if(a, abs(a) > self.reach, "too far")
        return a**2 * X + model["c"] - batch


NEAR = {
    "an error farther off": ({"reach": 10.0}, 3.0),
    "a solver that meets it": ({"reach": 3.05}, 0.0),
    "an end of the bounds": ({"bounds": {"a": (-9, 0)}}, 3.0),
    "no room within the bounds": ({"bounds": {"a": (0, 0.5)}}, 0.5),
    "a small unit": ({"unit": 1e-5}, 3.0),
    "a large unit": ({"unit": 1e5}, 3.0),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", NEAR)
def test_it_goes_no_farther_than_it_may(case, solver):
    options, answer = NEAR[case]
    trainer = Squared(**options)
    result = trainer.solve(SOLVERS[solver], 9 * X + 1, max_steps=1_000)
    found = abs(float(result.model["a"])) / trainer.unit
    np.testing.assert_allclose(found, answer, rtol=1e-6)
    assert (result.stop_reason is vn.StopReason.CONVERGED) == (answer > 0)


@pytest.mark.parametrize("steps", range(2, 25))
def test_without_steps_left_it_has_not_converged(steps):
    """It reaches the symmetric point by its 3rd step, and the minimum by its 17th."""
    solver = SOLVERS["LevenbergMarquardt"]
    result = Squared().solve(solver, 9 * X + 1, max_steps=steps)
    is_there = 3 <= steps <= 8
    assert (result.stop_reason is vn.StopReason.STALLED) == is_there
    assert (result.stop_reason is vn.StopReason.CONVERGED) == (steps >= 17)


def test_a_fit_says_along_what_the_loss_falls():
    name = "two lines at one place"
    result = Symmetric(name).fit(measured(name), 3_000, stop=STOP, progress=False)
    assert result.stop_reason is vn.StopReason.STALLED
    assert "curves downwards along [" in result.explain()


WAYS = {"stop": {"stop": STOP}, "BFGS": {"solver": BFGS}}


@pytest.mark.parametrize("way", WAYS)
def test_each_of_many_that_is_not_at_a_minimum_has_stalled(way):
    """One begins at the symmetric point, and ends there; the other beside it."""
    name = "two lines at one place"
    trainers = Symmetric(name), Symmetric(name, beside=0.5)
    many = vn.fit_many(trainers, measured(name), 3_000, **WAYS[way])
    assert many.stop_reasons[0] is vn.StopReason.STALLED
    assert 2 * many.best_losses[1] < 1.5 * PLACES.size < many.best_losses[0]


@pytest.mark.parametrize(("dtype", "priors"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", LOWEST)
def test_a_minimum_with_an_idle_direction_is_one(name, solver, priors, dtype):
    trainer = Symmetric(name, dtype, priors=priors)
    result = trainer.solve(SOLVERS[solver], measured(name, dtype))
    assert result.stop_reason is vn.StopReason.CONVERGED
    assert 2 * result.best_loss < 1.5 * PLACES.size


def test_rounding_is_no_curvature():
    """Along a degenerate direction: no one has stalled, or went far away."""
    name, dtype = "a curved model", jnp.float32
    rng = np.random.default_rng(1)
    truth = np.asarray(LOWEST[name][0](jnp.asarray(LOWEST[name][1])))
    noise = 0.05 * rng.normal(size=(40, PLACES.size))
    index, data = measured(name)[0], jnp.asarray(truth + noise, dtype)
    starts = [Symmetric(name, dtype, beside=float(x)) for x in rng.normal(size=40)]
    both = {"data_axis": (None, 0), "solver": BFGS}
    many = vn.fit_many(starts, (index, data), 500, **both)
    assert set(many.stop_reasons) == {vn.StopReason.CONVERGED}
    assert np.max(abs(many.trainers.params)) < 5

"""`Trainer.intervals`: the numbers of MINOS, within bounds, with ties and priors."""

import contextlib
import functools
import math
import warnings

import equinox as eqx
import iminuit
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optimistix as optx
import pytest
import scipy.optimize
import scipy.stats
from numpyro.distributions import biject_to, constraints

import vernal as vn
from inside import cache_size, run_points, search
from models import GaussianFit, gaussian, line
from nist import CURVES, DATA

LM = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
BFGS = optx.BFGS(rtol=1e-10, atol=1e-10)
ONE = math.erf(math.sqrt(0.5))  # where the deviance has risen by one
X = np.linspace(0.4, 6.0, 9)
LINE = np.linspace(-1.0, 1.0, 12)


# Curves of NIST by their certified parameters, and curves with few and noisy data.
CERTIFIED = "Misra1a", "Misra1d", "Chwirut2", "Thurber", "BoxBOD"
CURVED = {
    "decay": (lambda b, x: b[0] * jnp.exp(-b[1] * x) + b[2], (3.0, 0.8, 0.5)),
    "enzyme": (lambda b, x: b[0] * x / (b[1] + x), (2.0, 1.5)),
    "logistic": (lambda b, x: b[0] / (1 + jnp.exp(b[1] - 2 * x)), (2.0, 5.0)),
    "power": (lambda b, x: b[0] * jnp.abs(x) ** b[1], (0.5, 0.7)),
    "resonance": (lambda b, x: b[0] / (1 + ((x - b[1]) / b[2]) ** 2), (2.0, 3.0, 0.9)),
}


def curve_of(name):
    return CURVES[name] if name in CURVES else CURVED[name][0]


class Curve(vn.Trainer):
    name: str = eqx.field(static=True)

    def __init__(self, name, *args, **options):
        self.name = name
        super().__init__(*args, **options)

    def residuals(self, b, batch):
        x, y, sigma = batch
        return (curve_of(self.name)(b, x) - y) / sigma


class LineFit(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model(x) - y


class Counts(vn.Trainer):
    def nll(self, b, batch):
        x, counts = batch
        rate = b[0] * jnp.exp(-x / b[1])
        return jnp.sum(rate - counts * jnp.log(rate))


def problem(name, seed=0, **options):
    """A trainer at its minimum, and its batch."""
    if name in CERTIFIED:
        given = DATA[name]
        x, y, b = (jnp.asarray(given[k], float) for k in ("x", "y", "certified"))
        left = np.asarray(jax.jit(CURVES[name])(b, x) - y)
        sigma = np.sqrt(np.sum(left**2) / (len(x) - len(b)))
        return Curve(name, b, **options), (x, y, jnp.asarray(sigma))
    fn, truth = CURVED[name]
    low, high = options.get("bounds", {"": (-np.inf, np.inf)})[""]
    noise = 0.15 * np.random.default_rng(seed).normal(size=X.shape)
    y = jax.jit(fn)(jnp.asarray(truth), X) + noise
    batch = jnp.asarray(X), y, jnp.asarray(0.15)
    curve = jax.jit(lambda b: (fn(b, X) - batch[1]) / 0.15)

    def left(b):
        own = (b - np.array(truth)) / 0.2 if "priors" in options else []
        return np.concatenate([curve(b), own])

    tight = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-14)
    inside = np.clip(truth, np.add(low, 1e-3), np.subtract(high, 1e-3))
    found = scipy.optimize.least_squares(
        left, inside, jac="3-point", bounds=(low, high), **tight
    )
    return Curve(name, jnp.asarray(found.x), **options), batch


def minos(fcn, values, level):
    """The intervals by iminuit, from a function of the parameters in units."""
    return minos_of(jax.jit(jax.value_and_grad(fcn)), values, level)


def minos_of(both, values, level):
    """The same, from a function that returns a value and its gradient."""
    theirs = iminuit.Minuit(
        lambda b: float(both(b)[0]),
        np.asarray(values),
        grad=lambda b: np.asarray(both(b)[1]),
    )
    theirs.errordef, theirs.strategy, theirs.tol = 1, 2, 1e-4
    theirs.migrad()
    theirs.hesse()
    theirs.minos(cl=level)
    assert all(error.is_valid for error in theirs.merrors.values())
    pairs = zip(theirs.values, theirs.merrors.values(), strict=True)
    return np.array([(v + e.lower, v + e.upper) for v, e in pairs])


def rise(rows, start, index, value, low=-np.inf, high=np.inf):
    """How far the deviance rises by SciPy, where an element is held."""

    def residuals(others):
        return np.asarray(rows(np.insert(others, index, value)))

    low, high = (np.delete(np.broadcast_to(x, start.shape), index) for x in (low, high))
    inside = np.clip(np.delete(start, index), low + 1e-9, high - 1e-9)
    tight = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-14)
    found = scipy.optimize.least_squares(
        residuals, inside, bounds=(low, high), x_scale=np.abs(inside) + 1e-3, **tight
    )
    return 2 * found.cost - np.sum(np.asarray(rows(start)) ** 2)


# The numbers of others


class Curves(vn.Trainer):
    """Several curves, each with data of its own."""

    def residuals(self, model, batch):
        own = {name: (curve_of(name), b, *batch[name]) for name, b in model.items()}
        return {n: (curve(b, x) - y) / std for n, (curve, b, x, y, std) in own.items()}


@functools.cache
def intervals_of(names):
    """Each trainer and its batch; the errors and the intervals of all together."""
    problems = {name: problem(name) for name in names}
    together = Curves({name: own.params for name, (own, _) in problems.items()})
    batch = {name: own for name, (_, own) in problems.items()}
    errors, ends = together.standard_errors(batch), together.intervals(LM, batch)
    return problems, errors, ends


@pytest.mark.parametrize("name", [*CERTIFIED, *CURVED])
def test_the_intervals_are_those_of_minos(name):
    names = CERTIFIED if name in CERTIFIED else tuple(CURVED)
    problems, errors, ends = intervals_of(names)
    (trainer, batch), own = problems[name], np.asarray(errors[name])
    start = np.asarray(trainer.params)
    ours = np.array([ends[f"{name}[{index}]"] for index in range(len(start))])

    def fcn(steps):
        return jnp.sum(trainer.residuals(start + own * steps, batch) ** 2)

    theirs = start[:, None] + own[:, None] * minos(fcn, np.zeros(len(start)), 0.683)
    np.testing.assert_allclose((ours - theirs) / own[:, None], 0, atol=1e-3)


def test_the_intervals_of_counts_are_those_of_minos():
    x = jnp.linspace(0.0, 4.0, 12)
    batch = x, jnp.asarray([9, 7, 8, 4, 5, 2, 3, 2, 0, 1, 1, 0.0])
    trainer = Counts(jnp.asarray([9.0, 1.5])).solve(BFGS, batch).trainer
    ours = np.array(list(trainer.intervals(BFGS, batch, level=0.9).values()))
    fcn = lambda b: 2 * trainer.nll(b, batch)
    theirs = minos(fcn, trainer.params, 0.9)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


# Without any of these they are those of MINOS, above.
@pytest.mark.parametrize("kind", ["bounds", "priors", "whitened"])
def test_at_the_ends_the_deviance_has_risen_by_the_quantile(kind):
    options = {
        "bounds": {"bounds": {"": ([-10, 0.78, 0.44], [3.3, 10, 10])}},
        "priors": {"priors": {"": vn.Normal(jnp.asarray([3.0, 0.8, 0.5]), 0.2)}},
    }.get(kind, {})
    trainer, batch = problem("decay", **options)
    if kind == "whitened":
        trainer = trainer.whiten(batch)
    found = trainer.intervals(LM, batch, level=ONE)
    low, high = options.get("bounds", {"": (-np.inf, np.inf)})[""]
    apart = lambda b: (b - np.array([3.0, 0.8, 0.5])) / 0.2

    @jax.jit
    def rows(b):
        own = trainer.residuals(b, batch)
        return jnp.concatenate([own, apart(b)]) if kind == "priors" else own

    for index, ends in enumerate(found.values()):
        for end in ends:
            limits = [np.broadcast_to(x, 3)[index] for x in (low, high)]
            risen = rise(rows, np.asarray(trainer.params), index, end, low, high)
            if end in limits:
                assert risen < 1
            else:
                np.testing.assert_allclose(risen, 1, rtol=1e-4)
                assert limits[0] < end < limits[1]
    at_bound = sum(end in (3.3, 0.78, 0.44) for ends in found.values() for end in ends)
    assert (at_bound > 0) == (kind == "bounds")


PRIORS = {
    "of each element": lambda: dist.Gamma(6.0, jnp.asarray([2.0, 7.0, 20.0])),
    "with a long tail": lambda: dist.StudentT(2.0, jnp.asarray([2.5, 1.2, 0.8]), 0.05),
    "of all elements": lambda: dist.MultivariateNormal(
        jnp.asarray([2.7, 0.7, 0.6]), 0.01 * (jnp.eye(3) + 0.5)
    ),
}


class Decays(vn.Trainer):
    """The same data by a decay for each of the priors."""

    def residuals(self, model, batch):
        x, y, sigma = batch
        curve = curve_of("decay")
        return {name: (curve(b, x) - y) / sigma for name, b in model.items()}


@functools.cache
def with_priors():
    """The deviance and the best of each, intervals, and profiles of one element."""
    without, batch = problem("decay")
    priors = {name: make() for name, make in PRIORS.items()}

    def deviance(b, prior):
        rows = without.residuals(b, batch)
        return jnp.sum(rows**2) - 2 * jnp.sum(prior.log_prob(b))

    def least(prior):
        both = jax.jit(jax.value_and_grad(lambda b: deviance(b, prior)))
        found = scipy.optimize.minimize(
            lambda b: [np.asarray(x) for x in both(b)],
            np.asarray(without.model),
            jac=True,
            options={"gtol": 1e-5},
        )
        return both, jnp.asarray(found.x)

    best = {name: least(prior) for name, prior in priors.items()}
    model, bounds = {n: own for n, (_, own) in best.items()}, {"**": (1e-3, None)}
    trainer = Decays(model, priors=priors, bounds=bounds)
    ends = trainer.intervals(BFGS, batch, level=0.9)
    values = {f"{name}[1]": [0.6, 1.0] for name in PRIORS}
    profiles = trainer.profile(BFGS, batch, list(values), values)
    return best, batch, ends, profiles


@pytest.mark.parametrize("name", PRIORS)
def test_any_prior_is_part_of_the_likelihood(name):
    every, batch, ends, profiles = with_priors()
    both, best = every[name]
    ours = np.array([ends[f"{name}[{index}]"] for index in range(3)])
    theirs = minos_of(both, best, 0.9)
    size = np.diff(theirs) / 3.3  # an error, nearly
    np.testing.assert_allclose((ours - theirs) / size, 0, atol=1e-3)
    # The point of a profile is the minimum, and its delta how far that is above.
    profile = profiles[f"{name}[1]"]
    least, _ = both(best)
    points = np.asarray(profile.models[name])
    for model, delta in zip(points, profile.delta, strict=True):
        value, slope = both(model)
        np.testing.assert_allclose(delta, float(value) - float(least), rtol=1e-6)
        assert np.abs(np.asarray(slope)[[0, 2]]).max() < 0.1
    alone = Curve("decay", best, priors={"": PRIORS[name]()})
    with pytest.raises(ValueError, match=r"LevenbergMarquardt.*is no `vn.Normal`"):
        alone.intervals(LM, batch)


def line_fit(**options):
    noise = 0.3 * np.random.default_rng(1).normal(size=LINE.shape)
    y = 2 * LINE + 1 + noise
    batch = jnp.asarray(LINE), jnp.asarray(y)
    return LineFit(line(*np.polyfit(LINE, y, 1)), **options), batch


@pytest.mark.parametrize(
    ("level", "errors"), [(ONE, 1), (0.95, 1.959964), (0.1, 0.125661)]
)
def test_of_a_line_the_intervals_are_the_errors(level, errors):
    trainer, batch = line_fit()
    found = trainer.intervals(LM, batch, level=level)
    values, known = trainer.params, trainer.standard_errors(batch)
    for name, (low, high) in found.items():
        value, error = (float(getattr(x, name)) for x in (values, known))
        ends = value - errors * error, value + errors * error
        np.testing.assert_allclose((low, high), ends, rtol=1e-6)


def test_the_interval_of_what_is_tied_follows():
    trainer, batch = line_fit(ties={"offset": lambda model: 0.5 * model.slope})
    trainer = trainer.solve(LM, batch).trainer
    assert list(trainer.intervals(LM, batch)) == ["slope"]
    value, error = (
        float(x.slope) for x in (trainer.params, trainer.standard_errors(batch))
    )
    ((low, high),) = trainer.intervals(LM, batch, level=ONE).values()
    np.testing.assert_allclose((low, high), (value - error, value + error), rtol=1e-6)


class Odd(vn.Trainer):
    """`flat` changes nothing; `steep` changes the residuals to second order only."""

    def residuals(self, model, batch):
        return jnp.stack([model["steep"] ** 2, model["flat"] * 0, model["own"] - batch])


def test_what_is_not_constrained_has_no_end():
    start = {"flat": jnp.asarray(2.0), "own": jnp.asarray(1.0), "steep": jnp.zeros(())}
    batch = jnp.asarray(1.0)
    found = Odd(start).intervals(LM, batch, level=ONE)
    assert found["flat"] == (-math.inf, math.inf)
    # The standard error of this one is infinite.
    np.testing.assert_allclose(found["steep"], (-1, 1), rtol=1e-4)
    np.testing.assert_allclose(found["own"], (0, 2), rtol=1e-6)


def test_names_choose_elements():
    trainer, batch = problem("decay")
    every = trainer.intervals(LM, batch)
    assert list(every) == ["[0]", "[1]", "[2]"]
    two = trainer.intervals(LM, batch, ["[2]", "[0]"])
    assert list(two) == ["[2]", "[0]"]
    np.testing.assert_allclose(two["[2]"], every["[2]"], rtol=1e-6)


def test_one_program_finds_all_of_them():
    trainer, batch = line_fit(bounds={"slope": (0, 9)})
    trainer.intervals(LM, batch)
    before = cache_size(run_points)
    other, _ = line_fit(bounds={"slope": (-1, 5)})
    batch = batch[0], batch[1] + 0.5
    other = other.replace(model=line(other.model.slope, other.model.offset + 0.5))
    found = other.intervals(LM, batch, level=0.9)
    assert cache_size(run_points) == before
    assert np.all(np.isfinite(list(found.values())))


class Wells(vn.Trainer):
    """Two minima, with a low barrier: the lower one is at -1."""

    def residuals(self, x, batch):
        return jnp.stack([0.5 * (x**2 - 1), 0.3 * (x + 1)]) * batch


def test_a_lower_minimum_on_the_way_is_an_error():
    batch = jnp.asarray(1.0)
    trainer = Wells(jnp.asarray(0.8)).solve(LM, batch).trainer
    assert float(trainer.model) > 0.7
    with pytest.raises(ValueError, match="it is not the minimum") as caught:
        trainer.intervals(LM, batch)
    again = trainer.replace(model=caught.value.model).solve(LM, batch).trainer
    np.testing.assert_allclose(float(again.model), -1, rtol=1e-6)
    with pytest.warns(UserWarning, match="it is not the minimum"):
        found = trainer.profile(LM, batch, "", np.linspace(-1.2, 1.2, 9))
    assert found.delta.min() < 0


class Overdispersed(vn.Trainer):
    """A negative binomial, whose large numbers cancel where it is nearly Poisson."""

    def nll(self, model, batch):
        x, n = batch
        mean, size = jnp.exp(model["at_zero"] + model["slope"] * x), model["size"]
        size, ln = jnp.exp(size), jax.scipy.special.gammaln
        left = size * jnp.log(size / (size + mean)) + n * jnp.log(mean / (size + mean))
        return -jnp.sum(ln(n + size) - ln(size) - ln(n + 1) + left)


def test_a_likelihood_that_loses_its_digits_is_told_as_that():
    x, rng = np.linspace(0, 1, 60), np.random.default_rng(0)
    rate = np.exp(2 + x)
    model = {"at_zero": jnp.array(2.0), "slope": jnp.array(1.0)}
    solver = optx.BFGS(1e-8, 1e-8)

    def fitted(counts):
        trainer = Overdispersed(model | {"size": jnp.array(2.0)})
        batch = jnp.asarray(x), jnp.asarray(counts, float)
        return trainer.solve(solver, batch).trainer, batch

    # These scatter as those of Poisson do at most: `size` runs off.
    few = np.round(rate + 0.3 * rng.normal(size=60) * np.sqrt(rate))
    trainer, batch = fitted(few)
    there = {"size": jnp.array(17.0)}
    trainer = trainer.replace(model=trainer.model | there)
    with pytest.raises(ValueError, match=r"seems higher.*digits are lost") as caught:
        trainer.intervals(solver, batch)
    assert not hasattr(caught.value, "model")
    with pytest.warns(UserWarning, match="seems higher.*digits are lost"):
        trainer.profile(solver, batch, "size", [17.0, 34.0, 34.5, 35.0])
    trainer, batch = fitted(rng.poisson(rate * rng.gamma(5, 1 / 5, 60)))
    low, high = trainer.intervals(solver, batch)["size"]
    assert 0.5 < low < trainer.model["size"] < high < 5


def test_a_likelihood_that_is_not_finite_before_it_falls_has_no_end():
    class Edge(vn.Trainer):
        def nll(self, x, batch):
            return jnp.where(x < 0.5, 0.5 * x**2, jnp.nan) * batch

    trainer, batch = Edge(jnp.zeros(())), jnp.asarray(1.0)
    with pytest.warns(UserWarning, match=r"is not finite, at the upper end of ''"):
        ((low, high),) = trainer.intervals(BFGS, batch, level=ONE).values()
    np.testing.assert_allclose(low, -1, rtol=1e-6)
    assert math.isnan(high)


class Fragile(vn.Trainer):
    """It raises an error beyond a wall, and counts its calls outside of programs."""

    concrete: list = eqx.field(static=True)

    def __init__(self, *args, concrete, **options):
        self.concrete = concrete
        super().__init__(*args, **options)

    def residuals(self, model, batch):
        if not isinstance(model["slope"], jax.core.Tracer):
            self.concrete.append(model)
        x, y, wall = batch
        slope = eqx.error_if(model["slope"], model["slope"] > wall, "too steep")
        return (slope * x + model["offset"] - y) / 0.3


def no_more(slope, wall):
    if slope > wall:
        raise OSError("too steep")
    return slope


@jax.custom_jvp
def looked_up(slope, wall):
    return jax.pure_callback(no_more, slope, slope, wall, vmap_method="sequential")


looked_up.defjvp(lambda at, along: (looked_up(*at), along[0]))


class OfATable(Fragile):
    """It raises the error on the host."""

    def residuals(self, model, batch):
        x, y, wall = batch
        slope = looked_up(model["slope"], wall)
        return (slope * x + model["offset"] - y) / 0.3


def fragile(wall, dtype, kind=Fragile):
    noise = 0.3 * np.random.default_rng(1).normal(size=LINE.shape)
    y = 2 * LINE + 1 + noise
    batch = tuple(jnp.asarray(x, dtype) for x in (LINE, y, wall))
    best = zip(("slope", "offset"), np.polyfit(LINE, y, 1), strict=True)
    model = {name: jnp.asarray(value, dtype) for name, value in best}
    return kind(model, concrete=[]), optx.LevenbergMarquardt(1e-6, 1e-6), batch


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Fragile, np.float32), (OfATable, np.float64)]
)
def test_an_end_where_the_model_raises_an_error_is_nan(kind, dtype):
    trainer, solver, batch = fragile(9.0, dtype, kind)
    right = trainer.intervals(solver, batch, level=ONE)
    (low, high), best = right["slope"], float(trainer.model["slope"])
    near = *batch[:2], jnp.asarray(best + 0.5 * (high - best), dtype)
    wall = r"at the upper end of 'slope'\. The model raised an error .*too steep"
    with pytest.warns(UserWarning, match=wall):
        found = trainer.intervals(solver, near, level=ONE)
    assert math.isnan(found["slope"][1])
    np.testing.assert_allclose(found["slope"][0], low, rtol=1e-5)
    np.testing.assert_allclose(found["offset"], right["offset"], rtol=1e-5)
    with pytest.warns(UserWarning, match=r"no minimum at slope = .*too steep"):
        profile = trainer.profile(solver, near, "slope")
    is_seen = profile.values < float(near[2])
    assert (profile.converged == is_seen).all()
    error = float(profile.error)
    goal = np.square((profile.values - best) / error)[is_seen]
    np.testing.assert_allclose(profile.delta[is_seen], goal, atol=1e-3)


def test_in_a_second_call_the_model_runs_within_programs_alone():
    trainer, solver, batch = fragile(9.0, np.float32)
    batch = *batch[:2], trainer.model["slope"] + jnp.float32(0.01)
    for _ in range(2):
        trainer.concrete.clear()
        with pytest.warns(UserWarning, match="upper end"):
            trainer.intervals(solver, batch)
        with pytest.warns(UserWarning, match="no minimum"):
            trainer.profile(solver, batch, "slope")
    assert not trainer.concrete


# What is refused


class Both(GaussianFit):
    def loss(self, model, batch):
        return jnp.mean(self.residuals(model, batch) ** 2)


class LossAlone(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sum(model.slope**2)


def refused(given):
    trainer, batch = line_fit(**given.pop("options", {}))
    return trainer.intervals(given.pop("solver", LM), batch, **given)


@pytest.mark.own_words
@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"names": "slpe"}, vn.UnknownPathError, "Did you mean 'slope'"),
        ({"names": ["slope", "slope[2]"]}, vn.UnknownPathError, r"slope\[2\]"),
        ({"names": []}, TypeError, "`names`"),
        ({"names": [np.zeros(9)]}, TypeError, "selector of type `ndarray`"),
        ({"names": "slope", "options": {"train": "offset"}}, ValueError, "is frozen"),
        (
            {"names": "offset", "options": {"ties": {"offset": "slope"}}},
            ValueError,
            "is tied to slope",
        ),
        ({"level": 0.0}, ValueError, "`level` is 0.0"),
        ({"level": 1.0}, ValueError, "`level` is 1.0"),
        ({"level": 68.3}, ValueError, "`level` is 68.3"),
        ({"level": math.nan}, ValueError, "`level` is nan"),
        ({"solver": "LM"}, TypeError, "`solver`"),
        ({"max_steps": 0}, ValueError, "`max_steps`"),
    ],
)
def test_what_is_refused(given, error, match):
    with pytest.raises(error, match=match):
        refused(dict(given))


def test_a_parameter_without_elements_is_not_called_frozen():
    class Fit(vn.Trainer):
        def residuals(self, model, batch):
            return model["a"] - batch

    model = {"a": jnp.array(1.0), "none": jnp.zeros(0)}
    with pytest.raises(ValueError, match="'none' has no elements"):
        Fit(model).intervals(LM, jnp.array(1.0), "none")


def test_a_trainer_that_is_not_at_a_minimum_is_told_to_solve():
    batch = jnp.asarray(LINE), jnp.asarray(2 * LINE + np.cos(9 * LINE))
    with pytest.raises(ValueError, match=r"not at a minimum.*trainer\.solve"):
        LineFit(line()).intervals(LM, batch)


def test_a_loss_alone_has_no_likelihood():
    with pytest.raises(TypeError, match="needs a likelihood"):
        LossAlone(line()).intervals(BFGS, None)


@pytest.mark.filterwarnings("ignore::vernal.ObjectiveWarning")
def test_a_solver_of_the_loss_is_refused():
    batch = jnp.asarray(X), gaussian()(jnp.asarray(X)), jnp.asarray(0.1)
    with pytest.raises(ValueError, match="`solver` minimises `loss`"):
        Both(gaussian()).intervals(BFGS, batch)


def ended(looking, excess, is_minimum=lambda at: True):
    """Runs a search for where an excess is zero."""
    at = next(looking)
    try:
        while True:
            at = looking.send((excess(at), is_minimum(at)))
    except StopIteration as end:
        return end.value


def searched(noise=1e-12, eps=2.0**-52):
    return search(1.0, math.inf, noise, eps)


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_jump_is_an_end_unless_it_is_not_there_from_close_by(is_lost):
    near = [0.0]

    def excess(at):
        if at > (near[-1] + 1e-6 if is_lost else 30):
            return 5.0
        near.append(max(at, near[-1]))
        return -1.0

    found = ended(searched(), excess)
    if is_lost:
        assert math.isnan(found)
    else:
        np.testing.assert_allclose(found, 30, rtol=1e-9)


def test_what_is_high_from_far_away_alone_is_no_end():
    near = [0.3]

    def excess(at):
        if at > 2 * near[-1]:
            return 5.0
        near.append(max(at, near[-1]))
        return at / 4 - 1

    np.testing.assert_allclose(ended(searched(), excess), 4, rtol=1e-5)


@pytest.mark.parametrize("end", [1e-20, 1e-10, 3e-3])
def test_an_end_far_closer_than_the_error_is_found(end):
    at = ended(searched(), lambda at: (at / end) ** 2 - 1)
    np.testing.assert_allclose(at, end, rtol=1e-6)


def test_an_end_far_beyond_the_error_is_found_or_is_nowhere():
    slowly = lambda at: math.sqrt(1e-9 * at) - 1
    at = ended(searched(), slowly)
    np.testing.assert_allclose(at, 1e9, rtol=1e-5)
    at = ended(searched(), lambda at: at / (2 + 2 * at) - 1)
    assert at == math.inf


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.5])
def test_an_end_is_found_as_well_as_rounding_allows(noise):
    """In steps of the parameter, over which the likelihood rises by more than noise."""
    steep = lambda at: 50 * round(at / 1e-3) * 1e-3 - 1
    at = ended(searched(noise), steep)
    np.testing.assert_allclose(at, 0.02, atol=max(1.1e-3, noise / 50))


def test_an_end_that_is_not_found_is_not_there():
    at = ended(searched(), lambda at: 0.1 if at > 1e-60 else -1.0)
    assert math.isnan(at)


class Centre(vn.Trainer):
    def residuals(self, model, batch):
        line = 40 * jnp.exp(-0.5 * ((batch[0] - model["at"]) / batch[1]) ** 2)
        return line - batch[2]


@pytest.mark.parametrize("spacings", [3, 30, 300, 3000])
def test_a_value_of_few_digits_has_its_interval(spacings):
    """In single precision numbers at 50 are 3.8e-6 apart: none is at the end."""
    apart = np.spacing(np.float32(50))
    noise = np.random.default_rng(spacings).normal(size=(3, 100))
    # So broad that the error is so many times the spacing.
    width = spacings * apart * 40 / 0.42
    x = (50 + width * np.linspace(-4, 4, 100)).astype(np.float32)
    found = {}
    for dtype in (np.float32, np.float64):
        at, data = jnp.asarray(50, dtype), x.astype(dtype)
        own = dtype(width)
        line = 40 * np.exp(-0.5 * ((x.astype(float) - 50) / width) ** 2)
        for row in noise:
            batch = data, own, (line + row).astype(np.float32).astype(dtype)
            fit = Centre({"at": at}).solve(LM, batch)
            ends = fit.trainer.intervals(LM, batch)["at"]
            found.setdefault(dtype, []).append(np.asarray(ends, float) - 50)
    single, double = found[np.float32], found[np.float64]
    np.testing.assert_allclose(single, double, rtol=0, atol=2 * apart)


@jax.custom_vjp
def once(slope):
    """A line whose derivative has none."""
    return slope * X


def backwards(_, gradient):
    like = jax.ShapeDtypeStruct((), gradient.dtype)
    total = lambda gradient: np.asarray(np.sum(gradient * X))
    return (jax.pure_callback(total, like, gradient, vmap_method="sequential"),)


once.defvjp(lambda slope: (once(slope), None), backwards)


class Once(vn.Trainer):
    """It does not know of the second parameter."""

    def residuals(self, model, batch):
        return (once(model["slope"]) + 0 * model["idle"] - batch) / 0.1


def test_an_idle_parameter_of_a_model_without_second_derivatives():
    start = {"slope": jnp.asarray(1.0), "idle": jnp.asarray(1.0)}
    batch = 2 * X + 0.1 * np.cos(20 * X)
    trainer = Once(start).solve(LM, batch, jac="bwd").trainer
    found = trainer.intervals(LM, batch, jac="bwd")
    best, error = (X @ batch) / (X @ X), 0.1 / np.sqrt(X @ X)
    goal = best + np.array([-1, 1]) * error * scipy.stats.norm.ppf((1 + 0.683) / 2)
    np.testing.assert_allclose(found["slope"], goal, rtol=1e-6)
    assert found["idle"] == (-math.inf, math.inf)


BINS = np.linspace(0.0, 5.0, 50)


class Background(vn.Trainer):
    """Counts of a line, far from which there is next to nothing."""

    def residuals(self, model, batch):
        bins = jnp.asarray(BINS, model["line"].dtype)
        line = jnp.exp(-0.5 * ((bins - model["place"]) / 0.3) ** 2)
        return vn.likelihoods.Poisson(model["line"] * line + model["level"], batch)


def background(**best):
    model = {name: jnp.float32(value) for name, value in best.items()}
    return Background(model, bounds={"level": (0, None), "line": (0, None)})


def test_a_level_of_counts_that_is_zero_has_its_limit():
    """Its expected Fisher matrix has nothing to do with the slope on the bound."""
    batch = np.zeros(BINS.size, np.float32)
    batch[[18, 20, 21, 22, 24]] = 2

    def least(level):
        def nll(at):
            rate = np.exp(at[0] - 0.5 * ((BINS - at[1]) / 0.3) ** 2) + level
            return 2 * np.sum(rate - batch * np.log(rate))

        tight = {"xatol": 1e-9, "fatol": 1e-9}
        return scipy.optimize.minimize(nll, (1, 2), method="Nelder-Mead", options=tight)

    found = least(1e-12)
    height, place = found.x
    trainer = background(line=np.exp(height), level=0, place=place)
    goal = found.fun + scipy.stats.chi2.ppf(0.9, 1)
    end = scipy.optimize.brentq(lambda level: least(level).fun - goal, 1e-6, 1)
    low, high = trainer.intervals(LM, batch, "level", 0.9)["level"]
    assert low == 0
    np.testing.assert_allclose(high, end, rtol=1e-3)
    # By default a profile goes as far as the likelihood falls as by three errors.
    np.testing.assert_allclose(trainer.profile(LM, batch, "level").delta[-1], 9, 1e-2)


def test_without_any_counts_there_is_a_limit_wherever_the_line_is():
    batch = np.zeros(BINS.size, np.float32)
    trainer = background(line=0, level=0, place=2.2)
    found = trainer.intervals(LM, batch, "level", 0.9)
    # Of no counts, the likelihood is the exponential of minus their sum.
    end = scipy.stats.chi2.ppf(0.9, 1) / 2 / BINS.size
    np.testing.assert_allclose(found["level"], (0, end), rtol=1e-3)


@pytest.mark.parametrize("behind", [0.3, 0.9, 0.95])
def test_what_lies_behind_a_barrier_is_not_reached(behind):
    """The first place that is tried is beyond it, where the likelihood is high."""
    at = ended(searched(), lambda at: behind - 1 if at > 0.9 else (at / 0.4) ** 2 - 1)
    np.testing.assert_allclose(at, 0.4, rtol=1e-6)


def test_far_away_what_only_rounding_tells_is_no_end():
    saturated = lambda at: math.sqrt(0.7 * at / (1 + at)) - 1
    beyond = lambda at: saturated(at) if at < 5e3 else 2.0
    assert ended(searched(eps=2.0**-23), beyond) == math.inf
    # Where it is not known to be the minimum, it is none of the likelihood either.
    assert ended(searched(), beyond, lambda at: at < 5e3) == math.inf
    np.testing.assert_allclose(ended(searched(), beyond), 5e3, rtol=1e-4)
    # A crossing that is known stays, whatever is tried before it.
    doubtful = lambda at: not 5e3 < at < 2e4
    found = ended(searched(), beyond, doubtful)
    np.testing.assert_allclose(found, 5e3, rtol=1e-4)
    # A likelihood that has hardly begun to fall may fall yet.
    quartic = lambda at: (at / 4) ** 2 - 1
    at = ended(searched(), quartic, lambda at: at < 2)
    np.testing.assert_allclose(at, 4, rtol=1e-6)


TIMES = np.arange(8.0)
SCATTER = {
    "8": (10 * np.exp(-TIMES / 8), (0.4, -0.6, 0.2, -0.1, 0.3, -0.2, 0.5, -0.3)),
    "5": (10 * np.exp(-TIMES / 5), (-0.3, 0.5, 0.6, -0.4, -0.5, 0.3, 0.2, 0.1)),
}


class Offset(vn.Trainer):
    def residuals(self, model, batch):
        t, y = batch
        curve = model["a"] * jnp.exp(-t / model["t"]) + model["c"]
        return (curve - y) / 0.4


def best_at(t, y):
    """The best with a decay time, where all else is linear, and its deviance."""
    columns = np.stack([-t * np.expm1(-TIMES / t), np.ones(8)], axis=1)
    height, level = best = np.linalg.lstsq(columns, y, rcond=None)[0]
    deviance = np.sum(np.square((columns @ best - y) / 0.4))
    return {"a": -t * height, "t": t, "c": level + t * height}, deviance


def best_deviance(t, y):
    return best_at(t, y)[1]


@functools.cache
def decaying(name, dtype):
    """A trainer at its minimum, the solver, and the data."""
    curve, scatter = SCATTER[name]
    y = (curve + 0.6 * np.asarray(scatter)).astype(dtype)
    least = scipy.optimize.minimize_scalar(best_deviance, (4, 9), args=(y,), tol=1e-12)
    best, _ = best_at(least.x, y)
    model = {name: jnp.asarray(value, dtype) for name, value in best.items()}
    data, solver = (TIMES.astype(dtype), y), optx.LevenbergMarquardt(1e-5, 1e-5)
    return Offset(model).whiten(data), solver, data


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("level", [0.5, 0.683, 0.9, 0.954, 0.99])
@pytest.mark.parametrize("name", SCATTER)
def test_a_decay_that_is_hardly_curved_has_a_lower_limit(name, level, dtype):
    """Its error is of the size of its time: one error below, the time is negative."""
    trainer, solver, data = decaying(name, dtype)
    _, y = data
    low, high = trainer.intervals(solver, data, "t", level)["t"]
    best = float(trainer.model["t"])
    least = best_deviance(best, y)
    rise = lambda t: best_deviance(t, y) - least - scipy.stats.chi2.ppf(level, 1)
    np.testing.assert_allclose(low, scipy.optimize.brentq(rise, 0.5, best), rtol=2e-4)
    if rise(1e6) < 0:
        assert high == math.inf
    else:
        right = scipy.optimize.brentq(rise, best, 1e6)
        np.testing.assert_allclose(high, right, rtol=2e-4 if right < 100 else 0.02)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_place_from_which_rounding_hides_the_way_is_no_minimum(dtype):
    """Two parameters that cancel there are told apart by a square of the distance."""
    far = 1e5 if dtype == np.float32 else 2e8
    trainer, solver, data = decaying("8", dtype)
    _, y = data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        profile = trainer.profile(solver, data, "t", [10.0, far])
    right = best_deviance(far, y) - best_deviance(float(trainer.model["t"]), y)
    assert profile.converged[0]
    assert not profile.converged[1] or abs(profile.delta[1] - right) < 0.05


def hyperbola(at, zero, error=1.0):
    """The rise of a rate, where its inverse is `1 - at / zero` of what it is."""
    inverse = 1 - at / zero
    return abs(1 / inverse - 1) * zero / error if inverse else math.inf


@pytest.mark.parametrize("error", [1e-6, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("zero", [1e-6, 1e-3, 0.1, 0.3, 0.9, 1.5])
def test_a_pole_at_zero_is_not_leaped_over(zero, error):
    """The error of a time of which the rate is known badly is no scale of its limit."""
    tried = []

    def excess(at):
        tried.append(at)
        return hyperbola(at, zero, error) - 1

    at = ended(search(1.0, math.inf, 1e-12, 2.0**-52, zero), excess)
    # There the rate has risen by its error.
    end = zero * error / (zero + error)
    np.testing.assert_allclose(zero - at, zero - end, rtol=1e-4)
    assert len(tried) < 16


@pytest.mark.parametrize("zero", [1e-20, 1e-9, 1e-3, 0.3, 0.9])
@pytest.mark.parametrize("end", [1.0, 3.0, 40.0])
def test_where_zero_is_no_barrier_an_end_beyond_it_is_the_same(zero, end):
    found, counts = [], []
    for own in (math.inf, zero):
        tried = []

        def excess(at, tried=tried):
            tried.append(at)
            return (at / end) ** 1.5 - 1

        found += [ended(search(1.0, math.inf, 1e-12, 2.0**-52, own), excess)]
        counts += [len(tried)]
    assert found[0] == found[1]
    assert counts[1] <= counts[0] + 2


class Distance(vn.Trainer):
    """A distance by its parallax, and a rate by its time, with the sign of either."""

    def residuals(self, model, batch):
        return {
            name: (1 / x - batch[name]) / batch["error"] for name, x in model.items()
        }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("error", [0.2, 3.0, 100.0])
def test_a_distance_by_its_parallax_has_a_limit(error, dtype):
    batch = {"near": 1.0, "behind": -1.0, "error": error}
    batch = {name: jnp.asarray(x, dtype) for name, x in batch.items()}
    model = {"near": jnp.asarray(1.0, dtype), "behind": jnp.asarray(-1.0, dtype)}
    solver = optx.LevenbergMarquardt(1e-5, 1e-5)
    found = Distance(model).intervals(solver, batch, level=ONE)
    far = 1 / (1 - error) if error < 1 else math.inf
    goal = np.array([1 / (1 + error), far])
    np.testing.assert_allclose(found["near"], goal, rtol=2e-3)
    np.testing.assert_allclose(found["behind"], -goal[::-1], rtol=2e-3)


class Enzyme(vn.Trainer):
    """Rates that are proportional to the concentration, nearly."""

    def residuals(self, model, batch):
        x, y = batch
        return model["rate"] * x / (model["half"] + x) - y


@pytest.mark.parametrize("curved", [2.0, 0.2, 0.02])
def test_a_curve_that_is_hardly_bent_has_a_lower_limit(curved):
    dtype = np.float32
    x = np.repeat([0.02, 0.06, 0.11, 0.22, 0.56, 1.1], 2).astype(dtype)
    y = (300 * x + np.tile([1, -1], 6) - curved * x**2).astype(dtype)

    def deviance(half):
        shape = x.astype(float) / (half + x)
        return np.sum(np.square((shape @ y) / (shape @ shape) * shape - y))

    half = scipy.optimize.minimize_scalar(
        lambda rate: deviance(1 / rate), bounds=(1e-9, 0.1), method="bounded"
    )
    best = 1 / half.x
    start = {"rate": 300 * best, "half": best}
    model = {name: jnp.asarray(value, dtype) for name, value in start.items()}
    solver = optx.LevenbergMarquardt(1e-5, 1e-5)
    trainer = Enzyme(model).whiten((x, y))
    low, high = trainer.intervals(solver, (x, y), "half", level=ONE)["half"]
    rise = lambda half: deviance(half) - deviance(best) - 1
    end = scipy.optimize.brentq(rise, 1.0, best)
    np.testing.assert_allclose(low, end, rtol=5e-3)
    assert high == math.inf


def test_an_end_before_a_barrier_is_found_where_others_are_lost_on_the_way():
    """A rate below zero is likely again, with a pole between two concentrations."""
    x = np.geomspace(0.1, 5, 8)
    y = np.array([0.545, -0.395, 1.054, -0.807, 1.648, 1.104, 3.122, 3.915])
    model = {"half": jnp.asarray(8.0), "rate": jnp.asarray(10.0)}
    solver = optx.LevenbergMarquardt(1e-8, 1e-8)
    trainer = Enzyme(model).whiten((x, y)).solve(solver, (x, y)).trainer
    low, high = trainer.intervals(solver, (x, y), "rate", level=0.9973)["rate"]

    def least(rate):
        deviance = lambda half: np.sum(np.square(rate * x / (half + x) - y))
        return scipy.optimize.minimize_scalar(
            deviance, bounds=(1e-3, 60), method="bounded", options={"xatol": 1e-9}
        ).fun

    goal = least(float(trainer.model["rate"])) + scipy.stats.chi2.ppf(0.9973, 1)
    end = scipy.optimize.brentq(lambda rate: least(rate) - goal, 1, 10)
    np.testing.assert_allclose((low, high), (end, math.inf), rtol=1e-4)


class Product(vn.Trainer):
    """The data know the product of two."""

    def residuals(self, model, batch):
        height = model["first"] * model["second"]
        return (height * jnp.exp(-X) + model["sky"] - batch) / 0.05


def test_what_is_degenerate_is_followed_to_the_ends():
    batch = 2 * jnp.exp(-X) + 0.4 + 0.05 * jnp.cos(20 * X)
    columns = np.stack([np.exp(-X), np.ones(X.size)], axis=1)
    best = np.linalg.lstsq(columns, np.asarray(batch), rcond=None)[0]
    best = dict(zip(("first", "sky"), map(jnp.asarray, best), strict=True))
    best["second"] = jnp.asarray(1.0)
    both = dict.fromkeys(("first", "second"), biject_to(constraints.positive))
    for bounds in (None, both):
        trainer = Product(best, bounds=bounds)
        values = [1e-3, 0.1, 1.0, 30.0, 1e3]
        profile = trainer.profile(LM, batch, "first", values)
        assert profile.converged.all()
        np.testing.assert_allclose(profile.delta, 0, atol=1e-8)
        product = profile.models["first"] * profile.models["second"]
        np.testing.assert_allclose(product, float(product[0]), rtol=1e-5)
    found = trainer.intervals(LM, batch, level=ONE)
    error = 0.05 * np.sqrt(np.linalg.inv(columns.T @ columns)[1, 1])
    sky = float(best["sky"]) + error * np.array([-1, 1])
    np.testing.assert_allclose(found["sky"], sky, rtol=1e-6)
    for name in both:
        low, high = found[name]
        assert low < 1e-100
        assert high > 1e100


class Degenerate(vn.Trainer):
    """Of two pairs of parameters only the product, or the sum, is measured."""

    def residuals(self, model, batch):
        x, y = batch
        line = model["gain"] * model["slope"] * x + model["sky"] + model["bias"]
        return (line - y) / 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_measured_has_no_ends(dtype):
    """Far away large numbers cancel, and the likelihood is lower by rounding."""
    x = np.linspace(0, 10, 50)
    y = 2 * x + 1 + 0.1 * np.random.default_rng(0).normal(size=50)
    slope, offset = np.polyfit(x, y, 1)
    start = {"gain": 1.3, "slope": slope / 1.3, "sky": offset / 3, "bias": offset / 1.5}
    model = {name: jnp.asarray(value, dtype) for name, value in start.items()}
    data = x.astype(dtype), y.astype(dtype)
    solver = optx.LevenbergMarquardt(1e-6, 1e-6)
    trainer = Degenerate(model)
    # In single precision it might be measured: the report says so too.
    is_told = pytest.warns(UserWarning, match=r"float64, for the lower .* of 'slope'")
    with is_told if dtype == np.float32 else contextlib.nullcontext():
        found = trainer.intervals(solver, data)
    assert found == dict.fromkeys(start, (-np.inf, np.inf))


class Cubic(vn.Trainer):
    """A polynomial of years, whose powers are hardly told apart in single precision."""

    def residuals(self, model, batch):
        x, y = batch
        powers = [model[k] * x**k for k in range(4)]
        return (powers[0] + powers[1] + powers[2] + powers[3] - y) / 0.3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ends_that_rounding_moves_are_nan(dtype):
    x = np.arange(1959.0, 2021.0)
    y = 316 + 0.75 * (x - 1959) + 0.0125 * (x - 1959) ** 2 + 0.3 * np.sin(1.3 * x)
    data = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
    model = [jnp.asarray(0.0, dtype)] * 4
    solver = optx.LevenbergMarquardt(1e-10, 1e-10)
    trainer = Cubic(model).whiten(data).solve(solver, data).trainer
    if dtype == np.float32:
        with pytest.warns(
            UserWarning, match=r"rounding may hide .* compute in float64"
        ):
            found = trainer.intervals(solver, data, level=ONE)
        assert not np.isfinite(list(found.values())).any()
        return
    found = trainer.intervals(solver, data, level=ONE)
    # By orthogonal polynomials of the same degree.
    rows = np.stack([x**k for k in range(4)], axis=1) / 0.3
    size = np.linalg.norm(rows, axis=0)
    left, right = np.linalg.qr(rows / size)
    back = np.linalg.inv(right)
    best, error = back @ (left.T @ y / 0.3) / size, np.linalg.norm(back, axis=1) / size
    ends = np.array(list(found.values()))
    units = (ends - best[:, None]) / error[:, None]
    np.testing.assert_allclose(units, np.broadcast_to([-1.0, 1.0], (4, 2)), atol=0.02)

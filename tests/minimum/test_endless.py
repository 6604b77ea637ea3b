"""Losses that only approach a limit, and minima that are ones."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from jax.scipy.special import gammaln
from jax.scipy.stats import norm, t

import vernal as vn

REASON = vn.StopReason
X = np.linspace(-2.0, 2.0, 20)
TIMES = np.linspace(0.0, 5.0, 15)
SCATTER = np.random.default_rng(1).normal(size=20)
LM = optx.LevenbergMarquardt


class Named(vn.Trainer):
    """A function of parameters and data, by name."""

    name: str

    def __init__(self, name, start, dtype=np.float64, **options):
        start = {key: jnp.asarray(value, dtype) for key, value in start.items()}
        super().__init__(start, optax.adam(0.1, b2=0.9), **options)
        self.name = name


class Likelihood(Named):
    def nll(self, model, batch):
        return NLLS[self.name](model, *batch)


class Squares(Named):
    def residuals(self, model, batch):
        x, y, sigma = batch
        found = MODELS[self.name](model, x)
        return found(y) if callable(found) else (found - y) / sigma


def trainer_of(name, dtype=np.float64, **options):
    start, batch, *_ = {**ENDLESS, **MINIMA}[name]
    kind, solver = (Likelihood, optx.BFGS) if name in NLLS else (Squares, LM)
    tolerance = 1e-8 if dtype == np.float64 else 1e-5
    batch = tuple(jnp.asarray(x, dtype) for x in batch)
    return kind(name, start, dtype, **options), solver(tolerance, tolerance), batch


def classes(model, x, is_one):
    margin = (2 * is_one - 1) * (model["a"] + model["b"] * x)
    return jnp.sum(jnp.logaddexp(0, -margin))


def limits(model, most, sigma):
    return -jnp.sum(norm.logcdf((most - model["mean"]) / sigma))


def rates(model, exposure, counts):
    is_on = jnp.arange(5) < 2
    rate = jnp.exp(model["sky"]) + jnp.where(is_on, jnp.exp(model["star"]), 0)
    return jnp.sum(exposure * rate - counts * jnp.log(exposure * rate))


def decay(model, x):
    return model["height"] * jnp.exp(-x / model["time"])


def decay_nll(model, x, y, sigma):
    return 0.5 * jnp.sum(((decay(model, x) - y) / sigma) ** 2)


def saturation(model, x):
    return model["most"] * x / (model["half"] + x)


def valley(model):
    return 1 - model["x"], 10 * (model["y"] - model["x"] ** 2)


def students(model, x):
    return -jnp.sum(t.logpdf(x, 3, model["mean"], jnp.exp(model["log"])))


def dispersed(model, counts):
    """Negative binomial, written as in textbooks: large numbers cancel."""
    size, mean = model["size"], model["mean"]
    chance = size * jnp.log(size / (size + mean)) + counts * jnp.log(
        mean / (size + mean)
    )
    return -jnp.sum(gammaln(counts + size) - gammaln(size) + chance)


def soft_box(model, middle):
    return jnp.exp(model["x"] - middle - 8) + jnp.exp(middle - 8 - model["x"])


NLLS = {
    "classes": classes,
    "classes in the middle": classes,
    "upper limits": limits,
    "a rate of zero": rates,
    "even counts": dispersed,
    "classes that overlap": classes,
    "some limits": limits,
    "a faint star": rates,
    "a long decay": decay_nll,
    "fourth power": lambda model, _: (model["x"] - 0.3) ** 4 + model["y"] ** 2,
    "tenth power": lambda model, _: model["x"] ** 10,
    "valley": lambda model, _: sum(x**2 for x in valley(model)) / 2,
    "Student": students,
    "soft box": soft_box,
}
MODELS = {
    "no counts": lambda model, x: (
        lambda counts: vn.likelihoods.Poisson(x * jnp.exp(model["log"]), counts)
    ),
    "a decay time": decay,
    "a saturation": saturation,
    "a line": lambda model, x: model["a"] + model["b"] * x,
    "an error bar 200 times as long": lambda model, x: model["a"] + model["b"] * x,
    "a polynomial": lambda model, x: jnp.polyval(model["c"], x),
    "a valley of squares": lambda model, x: jnp.stack(valley(model)),
    "without noise": decay,
    "nearly unconstrained": lambda model, x: model["a"] * x + 1e-7 * model["b"] * x**2,
    "a weak line": lambda model, x: (
        model["height"] * jnp.exp(-0.5 * (x - model["middle"]) ** 2)
    ),
}
TWO = {"a": 0.0, "b": 1.0}
RISING = 3 + 0.02 * TIMES + 0.1 * SCATTER[:15]
DECAY = {"height": 2.0, "time": 5.0}
ON_OFF = {"star": 0.0, "sky": 0.0}
FIFTEEN = np.full(15, 0.1)

# Where it begins, the batch, the parameters that run away, and the limit that intervals
# find, of some: the lower or upper end of one of them.
ENDLESS = {
    "classes": (TWO, (X, X > 0.3), "ab", (None, 0)),
    "classes in the middle": (TWO, (X, X > 0), "b", ("b", 0)),
    "upper limits": (
        {"mean": 0.0},
        (np.array([1.0, 2.0, 1.5]), np.array([0.5, 0.5, 0.7])),
        ["mean"],
        (None, 1),
    ),
    "a rate of zero": (
        ON_OFF,
        (np.full(5, 10.0), np.array([6.0, 8, 14, 9, 11])),
        ["star"],
        ("star", 1),
    ),
    "no counts": (
        {"log": 0.0},
        (np.full(5, 10.0), np.zeros(5), np.ones(5)),
        ["log"],
        ("log", 1),
    ),
    "a decay time": (
        DECAY,
        (TIMES, RISING, FIFTEEN),
        ["time"],
        ("time", 0),
    ),
    "a saturation": (
        {"most": 2.0, "half": 2.0},
        (X[11:], X[11:] + 0.02 * X[11:] ** 2 + 0.01 * SCATTER[11:], np.full(9, 0.05)),
        ["most", "half"],
        # Beyond infinity the likelihood goes on, with negative values.
        (None, 0),
    ),
    # Far out the slope is one of rounding errors, and the error bar alone tells.
    "even counts": (
        {"size": 3.0, "mean": 4.0},
        (np.tile([3.0, 4, 5, 6, 4], 12),),
        ["size"],
        (None, 0),
    ),
}
MINIMA = {
    "classes that overlap": (TWO, (X, (X > 0.3) & (abs(X - 1) > 0.2))),
    "some limits": ({"mean": 0.0}, (np.array([1.0, 2.0]), np.array([0.5, -0.5]))),
    "a faint star": (ON_OFF, (np.full(5, 10.0), np.array([13.0, 10, 11, 9, 11]))),
    "a long decay": (
        DECAY,
        (TIMES, 3 - 0.004 * TIMES + 0.05 * SCATTER[:15], FIFTEEN),
    ),
    "fourth power": ({"x": 2.0, "y": 1.0}, (np.zeros(1),)),
    "tenth power": ({"x": 2.0}, (np.zeros(1),)),
    "valley": ({"x": -1.2, "y": 1.0}, (np.zeros(1),)),
    "Student": ({"mean": 0.0, "log": 0.0}, (SCATTER,)),
    "soft box": ({"x": 5.0}, (np.array(0.0),)),
    "a line": (TWO, (X, 0.01 * SCATTER, np.full(20, 0.01))),
    "an error bar 200 times as long": (
        TWO,
        (X, SCATTER - SCATTER.mean() + 1e-3, np.ones(20)),
    ),
    "a polynomial": ({"c": np.zeros(9)}, (X / 4 + 0.5, SCATTER, np.ones(20))),
    "a valley of squares": (
        {"x": -1.2, "y": 1.0},
        (np.zeros(2), np.zeros(2), np.ones(2)),
    ),
    "without noise": (DECAY, (TIMES, 3 * np.exp(-TIMES / 4), FIFTEEN)),
    "nearly unconstrained": (TWO, (X, X + SCATTER, np.ones(20))),
    "a weak line": (
        {"height": 1.0, "middle": 0.3},
        (X, 0.3 * np.exp(-0.5 * X**2) + 0.02 * SCATTER, np.ones(20)),
    ),
}


def draw(trainer, batch):
    # Of what has an infinite error nothing can be drawn.
    if np.isfinite(jax.tree.leaves(trainer.standard_errors(batch))).all():
        trainer.draw(jax.random.key(0), 2, batch)


# What has errors, and no place for a note: of one `nll` and of residuals all of it.
ERRORS = (
    lambda trainer, batch: trainer.standard_errors(batch),
    lambda trainer, batch: trainer.propagate(lambda model: model, batch),
    draw,
)
WITH_ALL = {"classes", "a decay time", "classes that overlap", "a line"}


def errors_of(name):
    return ERRORS if name in WITH_ALL else ERRORS[:1]


@functools.cache
def solved(name, dtype=np.float64):
    trainer, solver, batch = trainer_of(name, dtype)
    return trainer.solve(solver, batch, max_steps=1000), solver, batch


@pytest.mark.parametrize("name", ENDLESS)
def test_a_solve_says_that_there_is_no_minimum(name):
    result, solver, batch = solved(name)
    assert result.stop_reason is REASON.NO_MINIMUM
    assert result.stop_reason.is_failure
    own, (element, side) = ENDLESS[name][2:]
    said = result.explain()
    assert said.startswith(f"{str(result.stop_reason)[:-1]}, along ")
    assert all(f"{one} (" in said for one in own)

    report = result.report(batch)
    assert report.note.startswith(
        "no minimum this way: the loss only approaches a limit, "
    )
    assert "standard errors mean nothing there" in report.note
    assert report.note.splitlines()[0] in result.table(batch)
    assert report.stop_reason is REASON.NO_MINIMUM

    for ask in errors_of(name):
        with pytest.warns(UserWarning, match=": no minimum this way") as warned:
            ask(result.trainer, batch)
        assert report.note.splitlines()[0] in str(warned[0].message)
        assert warned[0].filename == __file__

    if element is None:
        return
    # The remedy that is named has a limit on the other side, and none on this one.
    ends = result.trainer.intervals(solver, batch, [element])[element]
    assert np.isfinite(ends[side])
    assert np.isinf(ends[1 - side])


@pytest.mark.parametrize("name", ["classes", "a rate of zero", "a decay time"])
def test_in_float32(name):
    result, _, batch = solved(name, np.float32)
    assert result.stop_reason is REASON.NO_MINIMUM
    assert "no minimum" in result.table(batch)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", MINIMA)
def test_a_minimum_is_none_at_infinity(name, dtype):
    result, _, batch = solved(name, dtype)
    assert result.stop_reason is not REASON.NO_MINIMUM
    if dtype == np.float64:
        assert "no minimum" not in result.table(batch)
        for ask in errors_of(name):
            ask(result.trainer, batch)


@pytest.mark.parametrize("name", ["loss", "residuals"])
def test_a_weak_minimum_in_any_unit_is_one(name):
    """The error bar is long because the unit is small, or because none was given."""
    depth = 1e-3

    def loss(self, model, batch):
        return 1 - depth * jnp.exp(-((model["x"] - 0.01) ** 2))

    def residuals(self, model, batch):
        peak = jnp.exp(-0.5 * (X - model["x"] - 0.01) ** 2)
        return depth * (peak - jnp.exp(-0.5 * (X - 0.02) ** 2) + batch)

    kind = type("Weak", (vn.Trainer,), {name: {"loss": loss}.get(name, residuals)})
    trainer = kind({"x": jnp.asarray(0.1)})
    solver = optx.BFGS(1e-10, 1e-12) if name == "loss" else LM(1e-10, 1e-12)
    result = trainer.solve(solver, 0.1 * SCATTER)
    assert result.stop_reason is REASON.CONVERGED
    assert "no minimum" not in result.explain()


def test_a_limit_by_hand():
    """No counts in 50 hours: the upper end of a rate is where it has risen by 1/2."""
    result, solver, batch = solved("no counts")
    _, high = result.trainer.intervals(solver, batch, level=0.6827)["log"]
    np.testing.assert_allclose(np.exp(high), 0.5 / 50, rtol=1e-3)


@pytest.mark.parametrize(
    "known",
    [{"priors": {"b": vn.Normal(0.0, 10.0)}}, {"bounds": {"b": (None, 20.0)}}],
    ids=lambda known: next(iter(known)),
)
def test_the_remedies_help(known):
    trainer, solver, batch = trainer_of("classes in the middle", **known)
    result = trainer.solve(solver, batch, max_steps=1000)
    assert result.stop_reason is REASON.CONVERGED
    assert "no minimum" not in result.table(batch)


@pytest.mark.parametrize("name", ["a rate of zero", "a faint star"])
def test_a_fit_that_converges(name):
    trainer, _, batch = trainer_of(name)
    result = trainer.fit(batch, 3000, stop=vn.Converged(1e-9, 20))
    is_endless = name in ENDLESS
    assert (result.stop_reason is REASON.NO_MINIMUM) == is_endless
    assert ("no minimum" in result.explain()) == is_endless


@pytest.mark.parametrize("is_solved", [True, False])
def test_each_of_many(is_solved):
    trainer, solver, (exposure, counts) = trainer_of("a rate of zero")
    data = exposure, jnp.stack([counts, MINIMA["a faint star"][1][1]])
    how = {"solver": solver} if is_solved else {"stop": vn.Converged(1e-9, 20)}
    many = vn.fit_many([trainer] * 2, data, 3000, data_axis=(None, 0), **how)
    assert many.stop_reasons[0] is REASON.NO_MINIMUM
    assert many.stop_reasons[1] is not REASON.NO_MINIMUM
    assert "0 (no minimum)" in many.table()
    own = exposure, counts
    assert "no minimum" in many.trainer(0).table(own)
    message = "errors of member 0: There is no minimum .*mean nothing there"
    with pytest.warns(UserWarning, match=message) as warned:
        many.errors(data)
    assert warned[0].filename == __file__
    # Where the end is told, there is no warning.
    assert many.to_dict(data)["stop_reason"][0] == str(REASON.NO_MINIMUM)
    assert "0 (no minimum)" in many.table(data)


def test_a_healthy_fit_pays_nothing(monkeypatch):
    """Only what is suspect is looked at: that compiles a program."""
    from vernal._minimum.idle import Site

    def look(*_):
        raise AssertionError

    monkeypatch.setattr(Site, "look", look)
    trainer, solver, batch = trainer_of("a line")
    result = trainer.solve(solver, batch)
    assert result.stop_reason is REASON.CONVERGED
    assert result.report(batch).note is None


def test_many_parameters_are_decomposed_once(monkeypatch):
    def decomposed(local):
        calls.append(1)
        return whole(local)

    # The name is also that of a function of the package.
    module = importlib.import_module("vernal._minimum.endless")
    calls, whole = [], module._decomposed
    monkeypatch.setattr(module, "_decomposed", decomposed)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(60, 20)))

    class Linear(vn.Trainer):
        def residuals(self, model, y):
            return x @ model - y

    for tolerance in (1e-2, 1e-4, 1e-8):
        calls.clear()
        Linear(jnp.zeros(20)).solve(LM(tolerance, tolerance), jnp.sin(jnp.arange(60.0)))
        assert len(calls) <= 1

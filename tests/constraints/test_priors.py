"""Priors: part of what is minimised, of the curvature and of the errors."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import optimistix as optx
import pytest
import scipy.stats

import vernal as vn
from models import LineFit, line, line_batch

MATRIX = np.random.default_rng(2).normal(size=(10, 3))
TARGET = MATRIX @ np.array([1.0, -2.0, 0.5]) + 0.3
BATCH = jnp.asarray(MATRIX), jnp.asarray(TARGET)
MEAN, STD = np.array([0.0, 1.0]), 0.2
PRIORS = {"ab": vn.Normal(MEAN, STD)}

MODEL = {"ab": jnp.zeros(2), "c": jnp.zeros(())}


class Linear(vn.Trainer):
    def residuals(self, model, batch):
        matrix, target = batch
        return matrix @ jnp.append(model["ab"], model["c"]) - target


class LinearNll(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Linear.residuals(self, model, batch)))


def posterior():
    """The mode and the errors, in closed form: the prior is two more data."""
    rows = np.eye(2, 3) / STD
    matrix = np.concatenate([MATRIX, rows])
    target = np.concatenate([TARGET, MEAN / STD])
    mode = np.linalg.lstsq(matrix, target, rcond=None)[0]
    return mode, np.sqrt(np.diag(np.linalg.inv(matrix.T @ matrix)))


def flat(model):
    return np.append(model["ab"], model["c"])


KINDS = {"residuals": Linear, "nll": LinearNll}
SOLVERS = {
    "LevenbergMarquardt": optx.LevenbergMarquardt(1e-10, 1e-10),
    "BFGS": optx.BFGS(1e-10, 1e-10),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_ends_at_the_mode(kind):
    trainer = KINDS[kind](MODEL, optax.adam(0.05), priors=PRIORS)
    result = trainer.fit(BATCH, 2000, progress=False)
    np.testing.assert_allclose(flat(result.model), posterior()[0], atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "is_whitened"), [("LevenbergMarquardt", False), ("BFGS", True)]
)
def test_a_solver_ends_at_the_mode_with_its_errors(solver, is_whitened):
    trainer = Linear(MODEL, priors=PRIORS)
    trainer = trainer.whiten(BATCH) if is_whitened else trainer
    result = trainer.solve(SOLVERS[solver], BATCH)
    mode, errors = posterior()
    assert result.stop_reason is vn.StopReason.CONVERGED
    np.testing.assert_allclose(flat(result.model), mode, rtol=1e-6)
    found = result.trainer.standard_errors(BATCH)
    np.testing.assert_allclose(flat(found), errors, rtol=1e-6)
    fisher = result.trainer.fisher(BATCH)
    np.testing.assert_allclose(
        np.sqrt(np.diag(np.linalg.inv(fisher))), errors, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["residuals", "nll"])
def test_chi_squared_and_the_count_are_those_of_the_data(kind):
    mode, _ = posterior()
    model = {"ab": jnp.asarray(mode[:2]), "c": jnp.asarray(mode[2])}
    report = KINDS[kind](model, priors=PRIORS).report(BATCH)
    chi_squared = np.sum((MATRIX @ mode - TARGET) ** 2)
    fisher = MATRIX.T @ MATRIX
    both = fisher + np.diag([*np.broadcast_to(STD, 2) ** -2.0, 0])
    fitted = np.trace(fisher @ np.linalg.inv(both))
    if kind == "residuals":
        np.testing.assert_allclose(report.chi_squared, chi_squared, rtol=1e-6)
        assert report.data_count == 10
        np.testing.assert_allclose(report.degrees_of_freedom, 10 - fitted, rtol=1e-9)
    np.testing.assert_allclose(report.aic, chi_squared + 2 * fitted, rtol=1e-6)
    assert report.edm < 1e-8


class Gamma(NamedTuple):
    """A distribution of another library, as far as it is looked at: a pytree."""

    shape: float
    rate: float

    def log_prob(self, value):
        return (self.shape - 1) * jnp.log(value) - self.rate * value


class Joint:
    """One density of two numbers."""

    precision = np.array([[30.0, 12.0], [12.0, 20.0]])

    def log_prob(self, value):
        off = value - jnp.asarray(MEAN)
        return -0.5 * off @ jnp.asarray(self.precision) @ off


def test_any_density_is_a_prior_of_a_minimiser_and_of_the_errors():
    model = {"ab": jnp.zeros(2), "c": jnp.asarray(0.4)}
    priors = {"c": Gamma(30.0, 40.0), "ab": Joint()}
    trainer = Linear(model, priors=priors)
    with pytest.raises(ValueError, match=r"LevenbergMarquardt.*is no `vn.Normal`"):
        trainer.solve(SOLVERS["LevenbergMarquardt"], BATCH)
    result = trainer.solve(SOLVERS["BFGS"], BATCH)
    assert result.stop_reason is vn.StopReason.CONVERGED
    potential, _ = trainer.objective(BATCH)
    derivatives = jax.jit(lambda x: (jax.grad(potential)(x), jax.hessian(potential)(x)))
    slope, hessian = derivatives(flat(result.model))
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    # The log-likelihoods of normal data and of these priors are quadratic, or nearly.
    errors = np.sqrt(np.diag(np.linalg.inv(hessian)))
    for kind in (Linear, LinearNll):
        found = kind(result.model, priors=priors).standard_errors(BATCH)
        np.testing.assert_allclose(flat(found), errors, rtol=1e-6)


def test_a_prior_is_refused_where_its_weight_is_not_known():
    """Beside a mean, or in each of many batches, it would count too much."""
    with pytest.raises(TypeError, match=r"`priors`.*defines `loss`"):
        LineFit(line(), priors={"slope": vn.Normal(0, 1)})
    trainer = Linear(MODEL, optax.adam(0.1), priors=PRIORS)
    batches = vn.Minibatches(BATCH, 5, key=jax.random.key(0))
    for data in (batches, vn.Stream([BATCH] * 4)):
        with pytest.raises(ValueError, match=r"`priors`.*all of the data"):
            trainer.fit(data, 4, progress=False)
    with pytest.raises(ValueError, match=r"`priors`.*all of the data"):
        vn.unroll(trainer, batches, 4)


def test_directions_that_a_prior_alone_constrains_take_no_degree_of_freedom():
    model = {"ab": jnp.zeros(2), "c": jnp.zeros(()), "nuisance": jnp.zeros(())}
    priors = {"nuisance": vn.Normal(0.0, 1.0)}
    report = Linear(model, priors=priors).report(BATCH)
    assert (report.free_count, report.degrees_of_freedom) == (4, 7)
    assert report["nuisance"].error == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"`scale_errors`.*`priors`"):
        Linear(model, priors=priors).report(BATCH, scale_errors=True)


def test_chi_squared_beside_a_narrow_prior_keeps_its_digits():
    batch = jax.tree.map(lambda x: x.astype(jnp.float32), BATCH)
    model = jax.tree.map(lambda x: (x + 1).astype(jnp.float32), MODEL)
    narrow = {"ab": vn.Normal(MEAN, 1e-5)}
    found = [Linear(model, priors=p).report(batch).chi_squared for p in (narrow, None)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


class Exponential(NamedTuple):
    rate: float

    def log_prob(self, value):
        return -self.rate * jnp.abs(value)


def test_a_prior_without_curvature_has_its_gradient_in_the_edm():
    model = {"ab": jnp.ones(2), "c": jnp.ones(())}
    trainer = Linear(model, priors={"c": Exponential(2.0)})
    result = trainer.solve(SOLVERS["BFGS"], BATCH)
    assert result.stop_reason is vn.StopReason.CONVERGED
    assert result.report(BATCH).note is None


def test_normal_is_that_of_scipy():
    prior, x = vn.Normal(1.5, 0.3), np.linspace(-2, 3, 7)
    known = scipy.stats.norm(1.5, 0.3).logpdf(x)
    np.testing.assert_allclose(prior.log_prob(x), known, rtol=1e-12)


def test_another_width_compiles_nothing():
    traces = []

    class Counted(Linear):
        def residuals(self, model, batch):
            traces.append(1)
            return super().residuals(model, batch)

    def fit(std, rate):
        priors = {"ab": vn.Normal(0.0, std), "c": Gamma(3.0, rate)}
        model = MODEL | {"c": jnp.asarray(1.0)}
        trainer = Counted(model, optax.adam(0.01), priors=priors)
        return trainer.fit(BATCH, 400, progress=False).model

    wide = fit(1.0, 1.0)
    count = len(traces)
    narrow = fit(0.01, 2.0)
    assert len(traces) == count
    assert np.abs(narrow["ab"]).max() < 0.1 < np.abs(wide["ab"]).max()


class Twice(vn.Trainer):
    """The same data by two models."""

    def residuals(self, model, batch):
        return [Linear.residuals(self, own, batch) for own in model]


def test_the_numbers_of_a_prior_may_be_those_of_a_transformation():
    """As where a derivative by the width of a prior is asked for."""
    model = {"ab": jnp.zeros(2), "c": jnp.asarray(0.4)}

    def ends(rate):
        priors = {"0.c": Gamma(30.0, rate), "1.c": vn.Normal(0.5, 1 / rate)}
        trainer = Twice([model, model], optax.sgd(1e-3), priors=priors)
        return jnp.stack([own["c"] for own in vn.unroll(trainer, BATCH, 5)[0].model])

    rates = 20.0 + 1e-4 * np.asarray([0.0, 1.0, -1.0])
    both = jax.jit(lambda rate: (ends(rate), jax.jacrev(ends)(rate)))
    (value, slope), (above, _), (below, _) = map(both, rates)
    np.testing.assert_allclose(value, ends(rates[0]), rtol=1e-12)
    expected = (above - below) / 2e-4
    assert np.all(abs(expected) > 1e-5)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_a_prior_of_what_is_tied():
    ties = {"offset": lambda model: 2 * model.slope}
    priors = {"offset": vn.Normal(10.0, 1e-3)}
    trainer = LineLikelihood(line(), optax.adam(0.02), ties=ties, priors=priors)
    model = trainer.fit(line_batch(), 3000, progress=False).model
    np.testing.assert_allclose(model.offset, 10, atol=1e-2)


def test_pytrees_of_residuals_are_one_vector():
    class Several(vn.Trainer):
        def residuals(self, model, batch):
            whole = Linear.residuals(self, model, batch)
            return {"one": whole[:4].reshape(2, 2), "other": (whole[4], whole[5:])}

    one, other = (kind(MODEL, priors=PRIORS) for kind in (Several, Linear))
    np.testing.assert_allclose(one.fisher(BATCH), other.fisher(BATCH), rtol=1e-12)
    end = one.solve(SOLVERS["LevenbergMarquardt"], BATCH)
    np.testing.assert_allclose(flat(end.model), posterior()[0], rtol=1e-6)


class LineLikelihood(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model(x) - y


BAD = {
    "a number": ({"slope": 3.0}, "no method `log_prob`"),
    "an unknown name": ({"slop": vn.Normal(0, 1)}, "matches nothing"),
    "another shape": ({"slope": vn.Normal(np.zeros(3), 1)}, "broadcast|evaluated"),
    "a list": ([vn.Normal(0, 1)], "must be a dictionary"),
    "a start without density": ({"offset": Gamma(2.0, 1.0)}, "where it starts"),
}


@pytest.mark.own_words
@pytest.mark.parametrize("name", BAD)
def test_bad_priors_are_refused(name):
    priors, message = BAD[name]
    with pytest.raises((TypeError, ValueError, KeyError), match=f"`priors`.*{message}"):
        LineLikelihood(line(), priors=priors)


@pytest.mark.own_words
@pytest.mark.parametrize("args", [(0, 0), (0, -1), (np.nan, 1), (0, np.inf)])
def test_a_normal_without_a_width_is_refused(args):
    with pytest.raises(ValueError, match=r"std|finite"):
        vn.Normal(*args)


def test_an_element_without_a_prior_has_a_wide_one():
    """As the refusal of an infinite width says: it changes nothing of that element."""
    with pytest.raises(ValueError, match="without a prior takes a `std` far larger"):
        vn.Normal(np.zeros(2), np.array([0.1, np.inf]))
    prior = vn.Normal(np.zeros(2), np.array([0.1, 1e6]))
    assert abs(prior.log_prob(np.array([0.0, 3.0]))[1] - prior.log_prob(0.0)[1]) < 1e-11


def at(offset):
    return {"ab": jnp.zeros(2), "c": jnp.asarray(offset)}


def positive(offset):
    return Linear(at(offset), optax.sgd(1e-3), priors={"c": Gamma(2.0, 1.0)})


def test_minibatches_of_all_data_are_all_of_them():
    batch = jnp.asarray(MATRIX), jnp.asarray(TARGET)
    trainer = positive(1.0)
    whole = trainer.fit(batch, 50, progress=False)
    batches = vn.Minibatches(batch, len(TARGET), key=jax.random.key(0))
    result = trainer.fit(batches, 50, progress=False)
    np.testing.assert_allclose(result.history.loss, whole.history.loss, rtol=1e-12)


def anywhere(offset):
    return Linear(at(offset), optax.sgd(1e-3), priors={"c": Anywhere()})


def loaded(path, offset):
    vn.save(path, anywhere(offset))
    return vn.load(path, positive(1.0))


def each_loaded(path, offset):
    vn.save(path, eqx.filter_vmap(anywhere)(jnp.asarray([1.0, offset])))
    return vn.load(path, eqx.filter_vmap(positive)(BOTH))


class Anywhere(NamedTuple):
    """A density that is nowhere zero."""

    def log_prob(self, value):
        return -jnp.abs(value)


BOTH = jnp.asarray([1.0, 2.0])
# How a model gets into a trainer: the path of a file, and the last of its numbers.
ENTRANCES = {
    "made": lambda _, c: positive(c),
    "replaced": lambda _, c: positive(1.0).replace(model=at(c)),
    "loaded": loaded,
    "each loaded": each_loaded,
    "made under jit": lambda _, c: eqx.filter_jit(positive)(jnp.asarray(c)),
    "made under vmap": lambda _, c: eqx.filter_vmap(positive)(jnp.asarray([1.0, c])),
    "each replaced": lambda _, c: eqx.filter_vmap(positive)(BOTH).replace(
        model={"ab": jnp.zeros((2, 2)), "c": jnp.asarray([1.0, c])}
    ),
}


@pytest.mark.parametrize("name", ENTRANCES)
def test_a_model_without_density_is_refused(name, tmp_path):
    enter, path = ENTRANCES[name], tmp_path / "saved.npz"
    assert np.asarray(enter(path, 3.0).model["c"]).ravel()[-1] == 3.0
    message = "density of 'c' is zero"
    with pytest.raises((ValueError, eqx.EquinoxRuntimeError), match=message):
        jax.block_until_ready(enter(path, -3.0).params)


def test_outside_of_its_support_a_density_is_zero():
    """NumPyro returns a finite one there, unless it is told to look."""
    priors = dist.Uniform(4.0, 6.0), dist.Gamma(2.0, 1.0)
    named = {f"{index}.c": prior for index, prior in enumerate(priors)}
    both = lambda *c: [at(x) for x in c]
    trainer = Twice(both(5.0, 5.0), priors=named)
    for name, c in (("0.c", (-1.0, 5.0)), ("1.c", (5.0, -1.0))):
        with pytest.raises(ValueError, match=f"density of '{name}' is zero"):
            Twice(both(*c), priors=named)
        assert trainer.evaluate(both(*c), BATCH) == np.inf
    value = trainer.evaluate(trainer.model, BATCH)
    expected = Twice(trainer.model).evaluate(trainer.model, BATCH)
    expected -= sum(prior.log_prob(5.0) for prior in priors)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    end = trainer.solve(SOLVERS["BFGS"], BATCH).trainer
    for prior, own in zip(priors, end.model, strict=True):
        assert prior.support(own["c"])


def test_a_parameter_may_be_held_where_a_density_ends():
    x, y = BATCH
    low = x, y - 10
    trainer = Twice(
        [at(0.5), at(0.5)],
        bounds={"*.c": (0.0, None)},
        priors={"0.c": dist.Exponential(2.0), "1.c": dist.HalfNormal(1.0)},
    )
    result = trainer.solve(SOLVERS["BFGS"], low)
    assert result.stop_reason is vn.StopReason.CONVERGED
    free = np.asarray(low[0])[:, :2]
    expected = np.linalg.lstsq(free, np.asarray(low[1]), rcond=None)[0]
    for own in result.model:
        assert own["c"] == 0
        np.testing.assert_allclose(own["ab"], expected, rtol=1e-6)


# What makes a prior, a parameter that it allows, and one that it does not, if any.
ENDS = {
    "an interval": (lambda: dist.Uniform(1.0, 2.0), [1.5, 2.0], [1.5, 2.1]),
    "all of an array": (
        lambda: dist.Uniform(1.0, 2.0).expand([2]).to_event(1),
        [1, 2],
        [0, 2],
    ),
    "an angle": (
        lambda: dist.VonMises(3.0, 2.0, validate_args=False),
        [3.0, 3.5],
        None,
    ),
    "a simplex": (
        lambda: dist.Dirichlet(jnp.ones(2), validate_args=False),
        [0.3, 0.7 + 1e-5],
        None,
    ),
    "several": (
        lambda: dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)),
        [5.0, -5.0],
        None,
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_density_ends_where_its_support_has_ends(name):
    prior_of, good, bad = ENDS[name]
    prior = prior_of()
    make = lambda ab: Linear(
        {"ab": jnp.asarray(ab, float), "c": jnp.zeros(())}, priors={"ab": prior}
    )
    trainer = make(good)
    plain = Linear(trainer.model).evaluate(trainer.model, BATCH)
    expected = plain - jnp.sum(prior.log_prob(trainer.model["ab"]))
    np.testing.assert_allclose(trainer.evaluate(trainer.model, BATCH), expected)
    if bad is not None:
        with pytest.raises(ValueError, match="density of 'ab' is zero"):
            make(bad)


@pytest.mark.filterwarnings("ignore")
def test_a_fit_that_leaves_the_support_goes_on_from_its_file(tmp_path):
    """Its last update is not seen before the next step; its best is within."""
    start = Linear(at(0.05), optax.sgd(1e-2), priors={"c": Gamma(2.0, 1.0)})
    x, y = BATCH
    after = start.fit((x, y - 10), 1, progress=False).trainer
    assert after.model["c"] < 0 < after.best["c"]
    vn.save(tmp_path / "fit.vernal", after)
    again = vn.load(tmp_path / "fit.vernal", start)
    assert again.model["c"] == after.model["c"]


@pytest.mark.parametrize(
    "args", [(0.0, 0.0), (0.0, -1.0), (np.nan, 1.0), (0.0, np.inf)]
)
def test_under_jit_too_a_normal_needs_a_width(args):
    make = eqx.filter_jit(lambda mean, std: vn.Normal(mean, std).std)
    assert make(jnp.asarray(0.0), jnp.asarray(2.0)) == 2
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"`std` finite and positive"):
        make(*map(jnp.asarray, args))


def test_a_prior_of_a_frozen_parameter_waits_until_it_is_fitted():
    known, batch, at = {"offset": vn.Normal(0, 1)}, line_batch(), jnp.ones(1)
    one = LineLikelihood(line(), train="slope", priors=known)
    alone = LineLikelihood(line(), train="slope")
    assert one.objective(batch)[0](at) == alone.objective(batch)[0](at)
    assert one.report(batch).prior_penalty is None
    both = LineLikelihood(line(), priors=known)
    assert both.report(batch).prior_penalty == 1
    model = eqx.tree_at(lambda m: m.offset, line(), 1.0)
    with pytest.raises(ValueError, match="`priors`: 'offset' is a Python float"):
        LineLikelihood(model, train="slope", priors=known)


class PeakFit(vn.Trainer):
    def residuals(self, model, batch):
        shape = jnp.exp(-0.5 * jnp.square((X - model["place"]) / model["width"]))
        # The widths and the places of two peaks are tied.
        other = (X - model["next"]) / model["width"]
        second = 0.5 * jnp.exp(-0.5 * jnp.square(other))
        return (model["height"] * (shape + second) - batch) / 0.2


X = jnp.linspace(-4.0, 8.0, 40)
TRUTH = {"place": 0.3, "width": 1.1, "height": 2.0, "next": 4.3}


def test_errors_are_the_scatter_of_simulated_fits():
    """1,000 data sets, each with a measurement of the width as its prior."""
    random, count = np.random.default_rng(5), 1_000

    def make(width):
        return PeakFit(
            jax.tree.map(jnp.asarray, TRUTH),
            bounds={"height": (0, None), "width": (0.01, None)},
            ties={"next": lambda model: model["place"] + 4},
            priors={"width": vn.Normal(width, 0.05)},
        )

    clean = 0.2 * make(TRUTH["width"]).residuals(TRUTH, jnp.zeros(X.size))
    data = np.asarray(clean) + 0.2 * random.normal(size=(count, X.size))
    widths = TRUTH["width"] + 0.05 * random.normal(size=count)
    trainers = eqx.filter_vmap(make)(jnp.asarray(widths))
    solver = optx.LevenbergMarquardt(1e-8, 1e-8)
    many = vn.fit_many(trainers, jnp.asarray(data), 8, solver=solver, data_axis=0)
    assert set(many.stop_reasons) == {vn.StopReason.CONVERGED}
    known = make(TRUTH["width"]).standard_errors(clean)
    for name in ("place", "width", "height"):
        scatter = np.std(many.trainers.model[name])
        np.testing.assert_allclose(scatter, known[name], rtol=0.06)
        np.testing.assert_allclose(
            np.mean(many.trainers.model[name]), TRUTH[name], atol=0.1 * known[name]
        )

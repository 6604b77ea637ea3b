"""Bijections: a fit moves free coordinates, and all else is in the parameters."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import optimistix as optx
import pytest
from flowjax import bijections as flowjax
from numpyro.distributions import biject_to, constraints

import vernal as vn
from models import Positive

LM = optx.LevenbergMarquardt(1e-10, 1e-10)


class Between(vn.Bijection):
    """An open interval, by a logistic function."""

    low: float
    width: float

    def forward(self, free):
        return self.low + self.width * jax.nn.sigmoid(free)

    def inverse(self, value):
        unit = (value - self.low) / self.width
        return jnp.log(unit) - jnp.log1p(-unit)


class Simplex(vn.Bijection):
    """Fractions that sum to one, by ratios to the last."""

    def forward(self, free):
        return jax.nn.softmax(jnp.append(free, jnp.zeros((), free.dtype)))

    def inverse(self, value):
        return jnp.log(value[:-1] / value[-1])


class Ordered(vn.Bijection):
    def forward(self, free):
        return jnp.cumsum(jnp.append(free[:1], jnp.exp(free[1:])))

    def inverse(self, value):
        return jnp.append(value[:1], jnp.log(jnp.diff(value)))


class Triangle(vn.Bijection):
    """A lower triangle with a positive diagonal: a Cholesky factor of two rows."""

    def forward(self, free):
        a, b, c = free
        zero = jnp.zeros((), free.dtype)
        return jnp.stack([jnp.stack([jnp.exp(a), zero]), jnp.stack([b, jnp.exp(c)])])

    def inverse(self, value):
        return jnp.stack([jnp.log(value[0, 0]), value[1, 0], jnp.log(value[1, 1])])


class Plain:
    """A bijection with the methods of flowjax, and no pytree."""

    def transform(self, x):
        return jnp.exp(x)

    def inverse(self, y):
        return jnp.log(y)


# Each bijection with a start, and the parameter behind the data.
BIJECTIONS = {
    "a number": (Positive(), 1.0, 2.5),
    "an interval": (Between(-1.0, 4.0), [0.5, 1.0], [-0.6, 2.6]),
    "a simplex": (Simplex(), [0.4, 0.3, 0.3], [0.1, 0.7, 0.2]),
    "an order": (Ordered(), [-1.0, 0.0, 1.0], [0.3, 0.5, 2.0]),
    "a factor": (Triangle(), [[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [-0.5, 0.3]]),
}


def forward_of(bijection):
    for name in ("forward", "transform", "__call__"):
        if hasattr(bijection, name):
            return getattr(bijection, name)


def inverse_of(bijection):
    return bijection.inverse if hasattr(bijection, "inverse") else bijection.inv


class Fit(vn.Trainer):
    """Curved in the parameter, and in an offset without a bijection."""

    def residuals(self, model, batch):
        return _curve(model["a"]["x"], model["b"][0], batch)


def _curve(x, offset, batch):
    matrix, y = batch
    flat = x.ravel()
    basis = matrix[:, : flat.size].astype(flat.dtype)
    return (basis @ flat + 0.1 * (basis @ flat) ** 2 + offset - y[: len(basis)]) / 0.01


def model(x, dtype=jnp.float64):
    return {
        "a": {"x": jnp.asarray(x, dtype), "none": None},
        "b": [jnp.zeros((), dtype)],
    }


def batch_of(truth, dtype=jnp.float64):
    random = np.random.default_rng(3)
    matrix = random.normal(size=(40, 4)).astype(dtype)
    noise = 0.01 * random.normal(size=40)
    y = 0.01 * _curve(np.asarray(truth, dtype), 0.2, (matrix, np.zeros(40, dtype)))
    return jnp.asarray(matrix), jnp.asarray(y + noise, dtype)


def pair(name, optimiser=None):
    """A trainer with a bijection, and the data."""
    bijection, start, truth = BIJECTIONS[name]
    return trainer_of(bijection, start, optimiser), batch_of(truth)


class Together(vn.Trainer):
    """Every bijection in one model: each with data of its own, and one offset."""

    def residuals(self, model, batch):
        offset = model["b"][0]
        return {name: _curve(x, offset, batch[name]) for name, x in model["a"].items()}


class ByHand(vn.Trainer):
    """The same with the free coordinates in the model."""

    def residuals(self, model, batch):
        return Together.residuals(self, parameters(model), batch)


@jax.jit
def parameters(model):
    """The parameters of free coordinates."""
    forward = {name: forward_of(BIJECTIONS[name][0]) for name in model["a"]}
    return {**model, "a": {name: forward[name](x) for name, x in model["a"].items()}}


@jax.jit
def coordinates(model):
    """The free coordinates of parameters."""
    inverse = {name: inverse_of(BIJECTIONS[name][0]) for name in model["a"]}
    return {**model, "a": {name: inverse[name](x) for name, x in model["a"].items()}}


def together(optimiser=None):
    """A trainer with the bijections, the one by hand, and the data."""
    starts = {name: jnp.asarray(start) for name, (_, start, _) in BIJECTIONS.items()}
    own = {"a": starts, "b": [jnp.zeros(())]}
    bounds = {f"a.{name}": bijection for name, (bijection, *_) in BIJECTIONS.items()}
    batch = {name: batch_of(truth) for name, (*_, truth) in BIJECTIONS.items()}
    trainer = Together(own, optimiser, bounds=bounds)
    return trainer, ByHand(coordinates(own), optimiser), batch


def same_bits(a, b):
    for leaf, other in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(leaf, other)


@functools.cache
def fitted():
    trainer, by_hand, batch = together(optax.adam(0.02))
    options = {"progress": False, "record": ("a.*", "grad_norm")}
    result, other = (t.fit(batch, 60, **options) for t in (trainer, by_hand))
    np.testing.assert_allclose(result.history.loss, other.history.loss, rtol=1e-9)
    assert jax.tree.structure(result.params) == jax.tree.structure(trainer.params)
    recorded = {name: other.history[f"a.{name}"] for name in BIJECTIONS}
    known = [
        parameters({"a": free["a"]})["a"] | {"offset": free["b"][0]}
        for free in (other.model, other.best)
    ]
    return trainer, result, known, jax.jit(jax.vmap(parameters))({"a": recorded})["a"]


@pytest.mark.parametrize("name", BIJECTIONS)
def test_a_fit_is_that_of_free_coordinates_by_hand(name):
    trainer, result, known, expected = fitted()
    for own, free in zip((result.model, result.best), known, strict=True):
        np.testing.assert_allclose(own["a"][name], free[name], rtol=1e-9)
        np.testing.assert_allclose(own["b"][0], free["offset"], rtol=1e-9)
    # What is recorded is in the parameters too.
    recorded = result.history[f"a.{name}"]
    np.testing.assert_array_equal(recorded[0], trainer.model["a"][name])
    np.testing.assert_allclose(recorded, expected[name], rtol=1e-9)


def mixed(model):
    """Of each parameter a sum of its elements and of the offset."""
    return {
        name: model["b"][0]
        + jnp.sum(x.ravel() * jnp.arange(1, 1 + x.size, dtype=x.dtype))
        for name, x in model["a"].items()
    }


@functools.cache
def solved():
    """The solution, its errors and those of mixtures, a report; and that by hand."""
    trainer, by_hand, batch = together()
    result, other = (t.solve(LM, batch) for t in (trainer, by_hand))
    of_mixed = result.trainer.propagate(mixed, batch)[1]
    # The errors are those of the function of the free coordinates.
    both = lambda free: (parameters(free), mixed(parameters(free)))
    values, errors = other.trainer.propagate(both, batch)
    own = result.model, result.standard_errors(batch), of_mixed, result.report(batch)
    return own, (values[0], *errors, other)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_a_solve_and_its_errors_are_those_by_hand(name):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    (model, errors, of_mixed, report), known = solved()
    for own, other in ((model, known[0]), (errors, known[1])):
        close(own["a"][name], other["a"][name])
        close(own["b"][0], other["b"][0])
    close(of_mixed[name], known[2][name])
    by_hand = known[3]
    assert report.free_count == sum(x.size for x in jax.tree.leaves(by_hand.model))
    assert report.degrees_of_freedom == report.data_count - report.free_count
    close(report.chi_squared, 2 * by_hand.best_loss)
    rows = [row for row in report.parameters if row.name.startswith(f"a.{name}")]
    error = np.ravel(known[1]["a"][name])
    close([row.error for row in rows], np.where(error == 0, np.nan, error))
    assert [row.status for row in rows] == ["fixed" if e == 0 else "" for e in error]


def test_in_single_precision_a_solve_and_its_errors_are_the_same():
    ends = []
    for dtype, solver in (
        (jnp.float64, LM),
        (jnp.float32, optx.LevenbergMarquardt(1e-6, 1e-6)),
    ):
        bounds, batch = {"a.x": Simplex()}, batch_of([0.1, 0.7, 0.2], dtype)
        result = Fit(model(SIMPLEX, dtype), bounds=bounds).solve(solver, batch)
        ends.append((result.model["a"]["x"], result.standard_errors(batch)["a"]["x"]))
        assert ends[-1][0].dtype == ends[-1][1].dtype == dtype
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3)


def test_correlations_are_those_of_the_elements():
    (_, errors, _, report), _ = solved()
    correlations = {(c.first, c.second): c.value for c in report.correlations}
    names = [f"a.a simplex[{i}]" for i in range(3)]
    error = errors["a"]["a simplex"]
    # Fractions that sum to one: the variance of their sum is zero.
    covariance = np.diag(np.square(error))
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            if i < j:
                value = correlations.get(
                    (first, second), correlations.get((second, first))
                )
                covariance[i, j] = covariance[j, i] = value * error[i] * error[j]
    np.testing.assert_allclose(covariance.sum(axis=0), 0, atol=1e-9)


@pytest.mark.parametrize("is_whitened", [False, True])
def test_n_and_m_steps_are_n_plus_m(is_whitened, tmp_path):
    trainer, batch = pair("a simplex", optax.adam(0.02))
    if is_whitened:
        trainer = trainer.whiten(batch, optimiser=optax.adam(0.1))
    whole = trainer.fit(batch, 50, progress=False).trainer
    part = trainer.fit(batch, 30, progress=False).trainer
    same_bits(part.fit(batch, 20, progress=False).trainer, whole)
    vn.save(tmp_path / "part", part)
    loaded = vn.load(tmp_path / "part", trainer)
    same_bits(loaded.fit(batch, 20, progress=False).trainer, whole)
    same_bits(vn.unroll(part, batch, 20)[0].model, whole.model)


def test_whitened_spaces_are_of_the_free_coordinates():
    trainer, by_hand, batch = together(optax.adam(0.1))
    whitened = trainer.whiten(batch, optimiser=optax.adam(0.1))
    same = by_hand.whiten(batch, optimiser=optax.adam(0.1))
    losses = [t.fit(batch, 40, progress=False).history.loss for t in (whitened, same)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    (expected, *_), _ = solved()
    found = whitened.solve(optx.BFGS(1e-9, 1e-9), batch)
    assert found.stop_reason is vn.StopReason.CONVERGED
    for name in BIJECTIONS:
        pair = found.model["a"][name], expected["a"][name]
        np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-7, err_msg=name)


def test_beside_intervals_and_whitened_the_fit_ends_at_the_best_point_within():
    bijection, start, truth = BIJECTIONS["a simplex"]
    batch = batch_of(truth)
    bounds = {"a.x": bijection, "b.0": (None, 0.1)}
    trainer = Fit(model(start), bounds=bounds)
    solved = trainer.solve(LM, batch)
    assert float(solved.model["b"][0]) == 0.1
    near = {**model([0.09, 0.7, 0.21]), "b": [jnp.array(0.09)]}
    near = trainer.replace(model=near)
    whitened = near.whiten(batch, optimiser=optax.adam(0.05))
    fit = whitened.fit(batch, 800, progress=False)
    assert float(fit.model["b"][0]) == 0.1
    close = np.testing.assert_allclose
    close(fit.model["a"]["x"], solved.model["a"]["x"], atol=1e-5)
    row = solved.report(batch)["b.0"]
    assert row.status == "at its bound (0.1)"
    assert solved.report(batch).free_count == 2
    models = solved.trainer.draw(jax.random.key(0), 100, batch)
    close(models["a"]["x"].sum(axis=1), 1, rtol=1e-12)
    assert np.all(models["b"][0] == 0.1)


CORRELATIONS = [[1.0, 0.2, 0.1], [0.2, 1.0, -0.3], [0.1, -0.3, 1.0]]
FACTOR = np.linalg.cholesky(CORRELATIONS)

# Bijections of libraries, with a value that each can return.
OF_LIBRARIES = {
    "numpyro simplex": (biject_to(constraints.simplex), [0.5, 0.3, 0.2]),
    "numpyro correlations": (biject_to(constraints.corr_matrix), CORRELATIONS),
    "numpyro factor": (biject_to(constraints.lower_cholesky), FACTOR),
    "flowjax": (
        flowjax.Chain([flowjax.Exp((2,)), flowjax.Loc(jnp.array([1.0, 2.0]))]),
        [1.5, 7.0],
    ),
    "no pytree": (Plain(), [0.3]),
}


class Drawn(vn.Trainer):
    """Rows of normal numbers, of variances of one."""

    def nll(self, model, batch):
        factor = jnp.linalg.cholesky(model["r"])
        unit = jax.scipy.linalg.solve_triangular(factor, batch.T, lower=True)
        logs = jnp.sum(jnp.log(jnp.diag(factor)))
        return 0.5 * jnp.sum(jnp.square(unit)) + len(batch) * logs


class Correlations(vn.Bijection):
    """Rows of a triangle, whose squares sum to one, times its transpose."""

    size: int = eqx.field(static=True)

    def forward(self, free):
        triangle = jnp.eye(self.size, dtype=free.dtype)
        triangle = triangle.at[jnp.tril_indices(self.size, -1)].set(free)
        rows = triangle / jnp.linalg.norm(triangle, axis=1, keepdims=True)
        return jnp.matmul(rows, rows.T, precision="highest")

    def inverse(self, value):
        factor = jnp.linalg.cholesky(value)
        factor = factor / jnp.diag(factor)[:, None]
        return factor[jnp.tril_indices(self.size, -1)]


@pytest.mark.parametrize(
    ("bijection", "size", "dtype"),
    [
        (biject_to(constraints.corr_matrix), 3, jnp.float64),
        (Correlations(6), 6, jnp.float64),
        *((Correlations(n), n, jnp.float32) for n in (2, 6)),
    ],
)
def test_the_ones_of_correlations_are_fixed(bijection, size, dtype):
    """Rounding moves them by some 1e-18 for each error bar, and correlates them."""
    rng = np.random.default_rng(29)
    root = np.linalg.cholesky(0.5 * np.eye(size) + 0.5)
    rows = rng.normal(size=(200, size)) @ root.T
    batch, start = jnp.asarray(rows, dtype), jnp.asarray(np.corrcoef(rows.T), dtype)
    trainer = Drawn({"r": start}, bounds={"r": bijection})
    report = trainer.report(batch)
    for i, j in np.ndindex(size, size):
        row = report[f"r[{i},{j}]"]
        assert row.status == ("fixed" if i == j else "")
        assert np.isnan(row.error) if i == j else row.error > 0.01
    assert len(report.correlation_matrix) == size * (size - 1)
    errors = trainer.standard_errors(batch)["r"]
    np.testing.assert_array_equal(np.diag(errors), 0)


class Shifted(vn.Bijection):
    """Each element in a unit of its own, from a zero of its own."""

    zeros: jax.Array
    units: jax.Array

    def forward(self, free):
        return self.zeros + self.units * free

    def inverse(self, value):
        return (value - self.zeros) / self.units


MIXING = jnp.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.3], [0.2, 0.3, 1.0]])


class Mixed(vn.Trainer):
    def residuals(self, model, batch):
        zeros, units = batch
        return MIXING @ ((model["x"] - zeros) / units)


# A date in days with an error below its spacing; large and small in one array.
UNITS = {"a date": ([2.4e6, 0, 0], [1e-10, 1, 1]), "units": ([0.0] * 3, [1e-9, 1e9, 1])}


@pytest.mark.parametrize("name", UNITS)
def test_small_errors_are_no_rounding(name):
    batch = zeros, units = tuple(map(jnp.asarray, UNITS[name]))
    trainer = Mixed({"x": zeros + 2 * units}, bounds={"x": Shifted(zeros, units)})
    found = [row.error for row in trainer.report(batch).parameters]
    expected = np.sqrt(np.diag(np.linalg.inv(MIXING @ MIXING)))
    np.testing.assert_allclose(np.array(found) / units, expected, rtol=1e-5)


class Measured(vn.Trainer):
    """The elements are measured themselves."""

    def residuals(self, model, batch):
        return {name: (model[name] - batch[name]) / 0.1 for name in model}


@jax.jit
def starts_of_libraries(values):
    """Starts, and the Jacobians of the parameters by the coordinates at the values."""
    starts, jacs = {}, {}
    for name, (bijection, _) in OF_LIBRARIES.items():
        forward, free = forward_of(bijection), inverse_of(bijection)(values[name])
        starts[name] = forward(0.5 * free)
        jacs[name] = jax.jacfwd(lambda z, forward=forward: forward(z).ravel())(free)
    return starts, jacs


@functools.cache
def solved_of_libraries():
    values = {name: jnp.asarray(value) for name, (_, value) in OF_LIBRARIES.items()}
    starts, jacs = starts_of_libraries(values)
    bounds = {name: bijection for name, (bijection, _) in OF_LIBRARIES.items()}
    result = Measured(starts, bounds=bounds).solve(LM, values)
    return result.model, result.standard_errors(values), jacs


@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_bijections_of_libraries(name):
    value = np.asarray(OF_LIBRARIES[name][1])
    model, errors, jacs = solved_of_libraries()
    np.testing.assert_allclose(model[name], value, rtol=1e-6, atol=1e-9)
    # The errors are those of a projection onto what the coordinates can reach.
    basis = np.linalg.qr(np.reshape(jacs[name], (value.size, -1)))[0]
    known = 0.1 * np.linalg.norm(basis, axis=1)
    np.testing.assert_allclose(np.ravel(errors[name]), known, rtol=1e-5, atol=1e-9)


def trainer_of(bijection, start, optimiser=None, **options):
    return Fit(model(start), optimiser, bounds={"a.x": bijection}, **options)


def metric(free=False):
    """The projector of a trainer with a bijection of `a.x`, or without."""
    bounds = {"a.x": Positive()} if free else None
    return Fit(model(1.0), bounds=bounds).whiten(batch_of(jnp.ones(()))).projector


def natural(free=False):
    return optax.chain(vn.precondition(metric(free)), optax.sgd(0.5))


SIMPLEX = [0.4, 0.3, 0.3]
REFUSED = {
    "a start that it does not return": (
        lambda batch: trainer_of(Simplex(), [0.5, 0.5, 0.5]),
        "does not return: of its free coordinates that makes .*0.333",
    ),
    "a start on its edge": (
        lambda batch: trainer_of(Positive(), [1.0, 0.0]),
        "are not finite: on the edge",
    ),
    "a parameter of another rank": (
        lambda batch: trainer_of(Simplex(), 1.0),
        "the bijection of 'a.x' cannot be evaluated",
    ),
    "another shape": (
        lambda batch: trainer_of(flowjax.Exp((2,)), [1.0, 1.0, 1.0]),
        "the bijection of 'a.x' cannot be evaluated",
    ),
    "a projector": (
        lambda batch: trainer_of(
            Positive(),
            1.0,
            projector=vn.EigenProjector.from_fisher(jnp.eye(2), model(1.0)),
        ),
        r"Use `trainer.whiten\(batch\)`",
    ),
    "a metric of the parameters": (
        lambda batch: trainer_of(Positive(), 1.0, natural()),
        "moves the free coordinates of 'a.x'",
    ),
    "such a metric, later": (
        lambda batch: trainer_of(Positive(), 1.0).replace(optimiser=natural()),
        "moves the free coordinates of 'a.x'",
    ),
    "a metric of free coordinates": (
        lambda batch: Fit(model(1.0), natural(free=True)),
        "of free coordinates, .* this one has none",
    ),
    "a projector of free coordinates": (
        lambda batch: Fit(model(1.0), projector=metric(free=True)),
        "of free coordinates, .* this one has none",
    ),
    "another model": (
        lambda batch: trainer_of(Simplex(), SIMPLEX).replace(model=model([0.0, 1, 1])),
        "'a.x' starts at",
    ),
    "a matrix of elements": (
        lambda batch: trainer_of(Simplex(), SIMPLEX).fisher(batch),
        "not free of each other",
    ),
    "a curvature of elements": (
        lambda batch: trainer_of(Simplex(), SIMPLEX).curvature(batch),
        "not free of each other",
    ),
    "a density of fewer coordinates": (
        lambda batch: trainer_of(Simplex(), SIMPLEX).objective(batch),
        "another number of free coordinates",
    ),
    "a profile": (
        lambda batch: trainer_of(Simplex(), SIMPLEX).profile(LM, batch, "a.x[0]"),
        r"bijection of 'a.x\[0\]' couples",
    ),
    "an interval of a whole": (
        lambda batch: trainer_of(Simplex(), SIMPLEX).intervals(LM, batch, ["a.x"]),
        "bijection of 'a.x' couples",
    ),
    "a rule by the shape": (
        lambda batch: trainer_of(
            Simplex(),
            SIMPLEX,
            vn.ParamOptimiser(
                {
                    lambda path, leaf: leaf.shape == (3,): optax.sgd(0.1),
                    lambda path, leaf: leaf.shape != (3,): optax.sgd(0.1),
                }
            ),
        ),
        "another rule for the free coordinates of 'a.x'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(batch_of(BIJECTIONS["a simplex"][2]))


@pytest.mark.parametrize("given", [Positive, jnp.exp, constraints.simplex, "positive"])
def test_what_is_no_bijection_is_refused(given):
    with pytest.raises(TypeError, match=r"must be a pair `\(low, high\)`"):
        trainer_of(given, 1.0)


def test_rules_and_line_searches_work_on_free_coordinates():
    batch = batch_of(BIJECTIONS["a simplex"][2])
    best = trainer_of(Simplex(), SIMPLEX).solve(LM, batch)
    # It compiles in half the time that the default one needs.
    search = optax.scale_by_backtracking_linesearch(15)
    lbfgs = optax.lbfgs(linesearch=search)
    optimiser = vn.ParamOptimiser({"a.x": lbfgs, "b.0": optax.adam(1e-2)})
    trainer = trainer_of(Simplex(), SIMPLEX, optimiser)
    with jax.numpy_dtype_promotion("standard"):
        result = trainer.fit(batch, 600, progress=False)
    np.testing.assert_allclose(result.best_loss, best.best_loss, rtol=1e-3)
    rates = trainer_of(Simplex(), SIMPLEX, optax.sgd(0.5)).learning_rates()
    assert rates == {"a.x": 0.5, "b.0": 0.5}


def test_many_are_each_by_itself():
    batch = batch_of(BIJECTIONS["a simplex"][2])
    starts = ([0.4, 0.3, 0.3], [0.2, 0.2, 0.6])
    trainers = [trainer_of(Simplex(), start, optax.adam(0.02)) for start in starts]
    many = vn.fit_many(trainers, batch, 20, progress=False)
    solved = vn.fit_many(trainers, batch, 50, solver=LM)
    errors = solved.errors(batch)["a"]["x"]
    for index, trainer in enumerate(trainers):
        alone = trainer.fit(batch, 20, progress=False)
        np.testing.assert_allclose(
            many.losses[index], alone.history.loss[-1], rtol=1e-9
        )
        own = many.trainer(index).model["a"]["x"]
        np.testing.assert_allclose(own, alone.model["a"]["x"], rtol=1e-9)
        end = trainer.solve(LM, batch)
        close = np.testing.assert_allclose
        close(solved.trainer(index).best["a"]["x"], end.best["a"]["x"], rtol=1e-8)
        close(errors[index], end.standard_errors(batch)["a"]["x"], rtol=1e-6)


def test_a_hook_constrains_the_parameters():
    class Clipped(Fit):
        def constrain(self, model):
            fractions = jnp.maximum(model["a"]["x"], 0.25)
            return {**model, "a": {**model["a"], "x": fractions / fractions.sum()}}

    batch = batch_of(BIJECTIONS["a simplex"][2])
    bounds = {"a.x": Simplex()}
    trainer = Clipped(model(SIMPLEX), optax.adam(0.05), bounds=bounds)
    result = trainer.fit(batch, 50, record="a.x", progress=False)
    np.testing.assert_allclose(result.history["a.x"].sum(axis=1), 1, rtol=1e-12)
    assert np.all(result.history["a.x"] > 0.19)
    at = result.trainer
    np.testing.assert_allclose(
        Simplex().forward(at.latent["a"]["x"]), at.params["a"]["x"], rtol=1e-12
    )
    with pytest.raises(ValueError, match="and `projector` couples them"):
        trainer.whiten(batch, optimiser=optax.adam(0.1))


def test_natural_gradients_are_those_of_free_coordinates():
    """In its metric the first step at a rate of one is that of Gauss and Newton."""
    first, batch = pair("an interval", optax.adam(0.1))
    projector = first.whiten(batch).projector
    optimiser = optax.chain(vn.precondition(projector), optax.sgd(1.0))
    natural, _ = first.replace(optimiser=optimiser).step(batch)
    whitened, _ = first.whiten(batch, optimiser=optax.sgd(1.0)).step(batch)
    for leaf, other in zip(
        *(jax.tree.leaves(t.params) for t in (natural, whitened)), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "is_whitened"),
    [("an interval", False), ("an order", True)],
)
def test_a_vector_of_the_objective_has_its_parameters(name, is_whitened):
    trainer, batch = pair(name)
    if is_whitened:
        trainer = trainer.solve(LM, batch).trainer.whiten(batch)
    _, start = trainer.objective(batch)
    points = np.asarray(start) + 0.01 * np.random.default_rng(0).normal(
        size=(50, start.size)
    )
    params = jax.vmap(trainer.params_at)(points)
    here = trainer.params_at(start)
    for leaf, own in zip(*map(jax.tree.leaves, (here, trainer.params)), strict=True):
        np.testing.assert_allclose(leaf, own, rtol=1e-12)
    # Their spread is that of the errors, a hundred times smaller.
    if is_whitened:
        errors = trainer.standard_errors(batch)["a"]["x"]
        spread = np.std(params["a"]["x"], axis=0)
        np.testing.assert_allclose(spread, 0.01 * errors, rtol=0.3)
    with pytest.raises(ValueError, match="shape"):
        trainer.params_at(points)


def test_the_objective_is_the_density_of_the_parameters():
    class Exponential(vn.Trainer):
        def nll(self, model, batch):
            return jnp.sum(model["x"])

    trainer = Exponential({"x": jnp.array([1.0, 2.0])}, bounds={"x": Positive()})
    potential, start = trainer.objective(None)
    np.testing.assert_allclose(start, np.log([1.0, 2.0]))
    transform = dist.transforms.ExpTransform()
    base = dist.Exponential(1.0)
    density = dist.TransformedDistribution(base, transform.inv)
    point = jnp.array([0.3, -0.7])
    expected = -jnp.sum(density.log_prob(point))
    np.testing.assert_allclose(potential(point), expected, rtol=1e-12)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_file_of_another_bijection_is_refused(is_stacked, tmp_path):
    def make(bijection):
        one = lambda x: trainer_of(bijection, x, optax.adam(0.1))
        return eqx.filter_vmap(one)(jnp.asarray([1.0, 2.0])) if is_stacked else one(1.0)

    trainer = make(Positive())
    vn.save(tmp_path / "one", trainer)
    same_bits(vn.load(tmp_path / "one", trainer), trainer)
    with pytest.raises(vn.MismatchError, match="of another bijection"):
        vn.load(tmp_path / "one", make(Between(0.0, 4.0)))


@pytest.mark.parametrize("is_whitened", [False, True])
def test_a_file_of_more_bijections_is_refused(is_whitened, tmp_path):
    batch = batch_of(0.3)
    start = {**model(1.0), "b": [jnp.array(0.5)]}
    kinds = {"a.x": Positive(), "b.0": Positive()}, {"a.x": Positive(), "b.0": (0, 9)}
    both, one = (Fit(start, optax.adam(0.1), bounds=bounds) for bounds in kinds)
    if is_whitened:
        both, one = (t.whiten(batch, optimiser=optax.adam(0.1)) for t in (both, one))
    vn.save(tmp_path / "both", both)
    with pytest.raises(vn.MismatchError, match="of another bijection"):
        vn.load(tmp_path / "both", one)
    part = one.fit(batch, 3, progress=False).trainer
    vn.save(tmp_path / "one", part)
    same_bits(vn.load(tmp_path / "one", one), part)


class Peak(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        level = model["c"][0] + model["c"][1] * x
        return (model["h"] * jnp.exp(-x / model["w"]) + level - y) / 0.1


@pytest.mark.parametrize("rewhiten", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_bound_beside_a_bijection_holds_in_a_whitened_space(seed, rewhiten):
    """The map of the free coordinates must not move it off by rounding."""
    x, rng = jnp.linspace(0.0, 4.0, 40), np.random.default_rng(seed)
    truth = 2 * np.exp(-x / 1.3) + 0.3 + 0.4 * x
    batch = x, jnp.asarray(truth + 0.1 * rng.normal(size=40))
    high = jnp.asarray(0.3 - 0.2 * rng.uniform(size=2))
    start = {"h": jnp.asarray(1.6), "w": jnp.asarray(1.0), "c": high - 0.01}
    bounds = {"c": (None, high), "w": Positive()}
    trainer = Peak(start, bounds=bounds).whiten(batch)
    result = trainer.solve(LM, batch, rewhiten=rewhiten)
    assert jnp.all(result.model["c"] == high)
    alone = Peak(result.model, bounds=bounds)
    errors = result.trainer.standard_errors(batch)
    expected = alone.standard_errors(batch)
    assert jnp.all(jnp.isnan(expected["c"]))
    for name, error in errors.items():
        np.testing.assert_allclose(error, expected[name], rtol=1e-5)
    drawn = result.trainer.draw(jax.random.key(0), 50, batch)
    assert jnp.all(drawn["c"] == high[None, :])


def test_what_is_tied_follows_the_parameter():
    ties = {"b.0": lambda model: 2 * model["a"]["x"]}
    trainer = trainer_of(Positive(), 1.0, ties=ties)
    batch = batch_of(0.3)
    result = trainer.solve(LM, batch)
    value = float(result.model["a"]["x"])
    assert float(result.model["b"][0]) == 2 * value
    rows = {row.name: row for row in result.report(batch).parameters}
    np.testing.assert_allclose(rows["b.0"].error, 2 * rows["a.x"].error, rtol=1e-9)
    assert rows["b.0"].status == "tied to a function"


def test_traced_starts_are_checked_when_the_program_runs():
    batch = batch_of(BIJECTIONS["a simplex"][2])

    @eqx.filter_jit
    def fitted(start):
        trainer = trainer_of(Simplex(), start, optax.sgd(1e-6))
        return vn.unroll(trainer, batch, 2)[1]

    assert np.isfinite(fitted(jnp.array(SIMPLEX))).all()
    with pytest.raises(Exception, match="can return"):
        fitted(jnp.array([0.5, 0.5, 0.5])).block_until_ready()


def test_other_numbers_in_a_bijection_compile_nothing():
    traces = []

    class Counted(Fit):
        def residuals(self, model, batch):
            traces.append(1)
            return super().residuals(model, batch)

    def fit(low):
        bounds = {"a.x": Between(low, 4.0)}
        trainer = Counted(model(1.0), optax.sgd(1e-6), bounds=bounds)
        return trainer.fit(batch_of(0.3), 3, progress=False)

    fit(-1.0)
    count = len(traces)
    fit(-2.0)
    assert len(traces) == count

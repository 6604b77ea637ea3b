"""What the data say: Fisher matrices, whitening, errors, tables, the likelihood."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from models import Gaussian, GaussianFit, Line, same

X = jnp.linspace(-5.0, 5.0, 60)


def peak(*values):
    return Gaussian(*map(jnp.asarray, values))


@functools.cache
def data(seed=0, sigma=0.1):
    # Some ask for them within a program first, of which they must not be a part.
    with jax.ensure_compile_time_eval():
        noise = sigma * jax.random.normal(jax.random.key(seed), X.shape)
        return X, peak(0.3, 1.2, 4.0)(X) + noise, jnp.full(X.shape, sigma)


START = peak(0.1, 1.1, 3.8)


class Likelihood(vn.Trainer):
    """The same as `GaussianFit`, by its `nll`."""

    def nll(self, model, batch):
        x, y, sigma = batch
        return 0.5 * jnp.sum(((model(x) - y) / sigma) ** 2)


class MeanLoss(vn.Trainer):
    def loss(self, model, batch):
        x, y, sigma = batch
        return jnp.mean(((model(x) - y) / sigma) ** 2)


class StraightLine(vn.Trainer):
    def residuals(self, model, batch):
        x, y, sigma = batch
        return (model(x) - y) / sigma


class Tangle(vn.Trainer):
    """Of `a` and `b` only the sum counts, and `dead` not at all."""

    def residuals(self, model, batch):
        total = model["a"] + model["b"][1]
        return jnp.stack([total - 1.0, model["b"][0] - 2.0, total + 0.5])


def tangle():
    return {
        "a": jnp.asarray(0.5),
        "b": jnp.asarray([1.0, 0.25]),
        "dead": jnp.asarray([[3.0]]),
    }


# Matrices


def test_fisher_is_gauss_newton_of_residuals_and_the_hessian_of_nll():
    trainer = GaussianFit(START)

    def residuals(params):
        return trainer.residuals(params, data())

    expected = vn.gauss_newton(residuals, trainer.params)
    close = {"rtol": 1e-10, "atol": 1e-12 * expected.max()}
    np.testing.assert_allclose(trainer.fisher(data()), expected, **close)
    likelihood = Likelihood(START)
    expected = vn.hessian(lambda p: likelihood.nll(p, data()), START)
    np.testing.assert_allclose(likelihood.fisher(data()), expected, **close)
    np.testing.assert_allclose(trainer.curvature(data()), expected, **close)


@pytest.mark.loose_dtypes
def test_fisher_of_complex_residuals_has_both_parts():
    class Phase(vn.Trainer):
        def residuals(self, model, batch):
            return model["a"] * jnp.exp(1j * model["p"]) - batch

    model = {"a": jnp.asarray(2.0), "p": jnp.asarray(0.3)}
    fisher = Phase(model).fisher(jnp.ones(3))
    np.testing.assert_allclose(fisher, np.diag([3.0, 12.0]), atol=1e-12)


@pytest.mark.parametrize("cls", [GaussianFit, Likelihood])
def test_blocks_are_those_of_the_whole_and_exposures_add_up(cls):
    trainer = cls(START)
    whole = trainer.fisher(data())
    blocks = trainer.fisher(data(), blocks=("mean", ("std", "power")))
    assert list(blocks) == ["mean", ("std", "power")]
    np.testing.assert_allclose(blocks["mean"], whole[:1, :1])
    np.testing.assert_allclose(blocks["std", "power"], whole[1:, 1:])
    both = tuple(map(jnp.concatenate, zip(data(0), data(1), strict=True)))
    summed = jax.tree.map(
        jnp.add, blocks, trainer.fisher(data(1), blocks=("mean", ("std", "power")))
    )
    expected = trainer.fisher(both, blocks=("mean", ("std", "power")))
    for selector, matrix in expected.items():
        np.testing.assert_allclose(summed[selector], matrix, rtol=1e-10)


@pytest.mark.parametrize("cls", [GaussianFit, Likelihood])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_size_changes_nothing(cls, batch_size):
    trainer = cls(START)
    whole = trainer.fisher(data())
    parts = trainer.fisher(data(), batch_size=batch_size)
    np.testing.assert_allclose(parts, whole, rtol=1e-10, atol=1e-12 * whole.max())


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
def test_fisher_compiles_once():
    traces = 0

    class Counted(GaussianFit):
        def residuals(self, model, batch):
            nonlocal traces
            traces += 1
            return super().residuals(model, batch)

    trainer = Counted(START)
    trainer.fisher(data())
    once = traces
    whitened = trainer.whiten(data(1), optimiser=optax.adam(0.1))
    whitened.fisher(data(2))
    whitened.standard_errors(data(2))
    Counted(peak(0.2, 1.0, 3.0), optax.sgd(0.1)).fisher(data())
    assert traces == once


# Whitening


@pytest.mark.parametrize("blocks", [None, ("mean", ("std", "power"))])
def test_whiten_stays_where_it_is_and_keeps_the_best(blocks):
    adam = vn.ParamOptimiser({"**": optax.adam(1e-2)}) if blocks else optax.adam(1e-2)
    fitted = GaussianFit(START, adam).fit(data(), 10).trainer
    trainer = fitted.whiten(data(), blocks=blocks)
    for new, old in zip(
        jax.tree.leaves(trainer.model), jax.tree.leaves(fitted.model), strict=True
    ):
        np.testing.assert_allclose(new, old, rtol=1e-14)
    assert same(trainer.best, fitted.best)
    assert int(trainer.step_count) == 10
    counts = [
        leaf for leaf in jax.tree.leaves(trainer.opt_state) if leaf.dtype == jnp.int32
    ]
    assert counts
    assert all(int(count) == 0 for count in counts)
    on = trainer.fit(data(), 200).trainer
    assert on.best_loss < fitted.best_loss
    back = on.reproject(None)
    assert back.projector is None
    assert back.latent is None


def test_in_the_whitened_space_units_do_not_matter():
    def run(scale):
        x, y, sigma = data()
        model = peak(0.1 * scale, 1.1 * scale, 3.8)
        trainer = GaussianFit(model, optax.sgd(0.5)).whiten((x * scale, y, sigma))
        return trainer.fit((x * scale, y, sigma), 20).history.loss

    np.testing.assert_allclose(run(1e-9), run(1.0), rtol=1e-6)


def test_a_param_optimiser_does_not_survive_where_there_are_no_names():
    rules = {("mean", "std"): optax.sgd(0.1), "power": optax.sgd(0.2)}
    trainer = GaussianFit(START, vn.ParamOptimiser(rules))
    assert trainer.whiten(data()).optimiser is None
    kept = trainer.whiten(data(), blocks=rules)
    assert isinstance(kept.optimiser, vn.ParamOptimiser)
    other = trainer.whiten(data(), optimiser=optax.adam(0.1), on_null="prior")
    assert other.optimiser is not None
    with pytest.raises(ValueError, match="no optimiser"):
        trainer.whiten(data()).fit(data(), 3)
    with pytest.raises(ValueError, match="from_blocks"):
        trainer.whiten(data(), optimiser=vn.ParamOptimiser(rules))


def test_a_loss_that_is_no_likelihood_whitens_by_its_curvature():
    at_best = MeanLoss(START).solve(optx.BFGS(1e-10, 1e-10), data()).trainer
    trainer = at_best.whiten(data())
    matrix = trainer.projector.matrix
    hessian = matrix.T @ at_best.curvature(data()) @ matrix
    np.testing.assert_allclose(hessian, np.eye(3), atol=1e-9)


@pytest.mark.filterwarnings("ignore::vernal.ObjectiveWarning")
@pytest.mark.parametrize("how", ["reproject", "precondition"])
def test_a_callback_may_renew_the_projector_without_compiling(how):
    traces = 0

    class Counted(GaussianFit):
        def loss(self, model, batch):
            nonlocal traces
            traces += 1
            return self.nll(model, batch)

        def nll(self, model, batch):
            return 0.5 * jnp.sum(self.residuals(model, batch) ** 2)

    def renewed(trainer, history=None):
        matrix = trainer.fisher(data())
        projector = vn.EigenProjector.from_fisher(matrix, trainer.params)
        if how == "reproject":
            return trainer.reproject(projector)
        rules = {("mean", "std"): optax.sgd(0.5), "power": optax.sgd(0.7)}
        natural = vn.ParamOptimiser(rules, first=vn.precondition(projector))
        return trainer.replace(optimiser=natural)

    optimiser = optax.sgd(0.5) if how == "reproject" else None
    trainer = renewed(Counted(peak(-0.5, 1.6, 3.0), optimiser))
    trainer.fit(data(), 2, chunk=2)
    once = traces
    result = trainer.fit(data(), 30, callback=renewed, chunk=5)
    assert traces == once
    solved = trainer.solve(optx.LevenbergMarquardt(1e-10, 1e-10), data())
    np.testing.assert_allclose(result.history.loss[-1], solved.trainer.best_loss)


# Errors


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
def test_errors_are_those_of_a_linear_model():
    x, sigma = jnp.linspace(0.0, 4.0, 9), jnp.full(9, 0.2)
    trainer = StraightLine(Line(jnp.asarray(1.0), jnp.asarray(2.0)))
    errors = trainer.standard_errors((x, 2 * x, sigma))
    design = np.stack([x, np.ones(9)], axis=1) / 0.2
    expected = np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    assert isinstance(errors, Line)
    np.testing.assert_allclose([errors.slope, errors.offset], expected, rtol=1e-12)

    def batched(offset):
        moved = trainer.replace(model=Line(trainer.model.slope, offset))
        return moved.standard_errors((x, 2 * x, sigma)).slope

    many = jax.vmap(batched)(jnp.arange(3.0))
    np.testing.assert_allclose(many, [expected[0]] * 3, rtol=1e-10)


def test_what_is_not_constrained_has_an_infinite_error():
    errors = Tangle(tangle()).standard_errors(None)
    assert np.isinf(errors["a"])
    np.testing.assert_array_equal(np.isinf(errors["b"]), [False, True])
    np.testing.assert_allclose(errors["b"][0], 1.0)
    assert np.isinf(errors["dead"]).all()


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_constrained_has_an_error_in_any_dtype(dtype):
    class Straight(vn.Trainer):
        def residuals(self, model, batch):
            return (model["a"] * batch[0] + model["b"] - batch[1]) / 0.1

    x = jnp.linspace(0, 1, 500, dtype="float32")
    model = {"a": jnp.asarray(2.0, "float32"), "b": jnp.asarray(1.0, "float32")}
    known = Straight(model).standard_errors((x, 2 * x + 1))
    less = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    found = Straight(less).standard_errors((x, 2 * x + 1))
    for name, error in known.items():
        np.testing.assert_allclose(found[name].astype("float32"), error, rtol=0.02)


def test_where_nothing_is_constrained_every_error_is_infinite():
    class Deaf(vn.Trainer):
        def residuals(self, model, batch):
            return jnp.ones(3) + 0 * model["a"][0]

    trainer = Deaf({"a": jnp.ones(2)})
    assert np.isinf(trainer.standard_errors(None)["a"]).all()
    assert trainer.table(jnp.zeros(())).count("unconstrained") == 2


# Models in which only one combination of `a` and `b` counts.
TWINS = {
    "product": lambda m, x: m["a"] * m["b"] * jnp.exp(-(x**2)),
    "amplitude": lambda m, x: m["a"] * jnp.exp(m["b"] - 0.3 * x**2),
    "ratio": lambda m, x: m["c"] * jnp.sin(m["a"] / m["b"] * x),
}


@pytest.mark.loose_dtypes
# The curvature of a likelihood is rounded by the steps of all of its formula.
@pytest.mark.parametrize(
    ("method", "name", "dtype"),
    [
        *(("residuals", name, jnp.float32) for name in TWINS),
        *(("nll", name, jnp.float32) for name in TWINS),
        ("residuals", "product", jnp.float64),
        ("nll", "ratio", jnp.float64),
    ],
)
def test_rounding_constrains_nothing(method, name, dtype):
    """Summed over thousands of data, rounding is larger than the machine epsilon."""

    def residuals(self, model, batch):
        x, y = batch
        return (TWINS[name](model, x) - y) / 0.1

    def nll(self, model, batch):
        return 0.5 * jnp.sum(residuals(self, model, batch) ** 2)

    methods = {"residuals": residuals, "nll": nll}
    kind = type("Twins", (vn.Trainer,), {method: methods[method]})
    x, rng = jnp.linspace(-3, 3, 5_000), np.random.default_rng(0)
    curve = jax.jit(TWINS[name])
    for _ in range(10):
        model = {k: jnp.asarray(rng.uniform(0.5, 2.0), dtype) for k in "abc"}
        trainer = kind(model, train=("a", "b"))
        batch = x, curve(model, x)
        assert np.isinf(jax.tree.leaves(trainer.standard_errors(batch))).all()
        assert trainer.whiten(batch).projector.rank == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.fisher(data()),
        lambda t: t.standard_errors(data()),
        lambda t: t.table(data()),
        lambda t: t.objective(data()),
    ],
)
def test_a_mean_has_no_errors(call):
    with pytest.raises(TypeError, match="`residuals` or `nll`"):
        call(MeanLoss(START))


# Tables


def test_table():
    x, sigma = jnp.linspace(0.0, 4.0, 9), jnp.full(9, 0.2)
    model = {"line": Line(jnp.asarray(-1.5), jnp.asarray(0.0)), "unit": 3.0}

    class Fit(vn.Trainer):
        def residuals(self, model, batch):
            x, y, sigma = batch
            return (model["line"](x) * model["unit"] - y) / sigma

    trainer = Fit(model, train="line")
    assert trainer.table((x, x, sigma)).splitlines() == [
        "parameter    value   standard error",
        "───────────  ──────  ───────────────────────",
        "line.slope   -1.500  0.017",
        "line.offset  0.000   0.041",
        "unit         3       frozen (a Python float)",
        "not at a minimum: edm 1.93e+04, along line.slope (+1)",
    ]
    assert Fit(model, train="line.slope").table().splitlines() == [
        "parameter    value",
        "───────────  ─────  ───────────────────────",
        "line.slope   -1.5",
        "line.offset  0      frozen",
        "unit         3      frozen (a Python float)",
    ]


def test_table_of_arrays_and_what_is_not_constrained():
    lines = Tangle(tangle()).table(None).splitlines()
    cells = [line.split() for line in lines[2:]]
    assert cells == [["a", "0.5"], ["b[0]", "1"], ["b[1]", "0.25"], ["dead[0,0]", "3"]]
    lines = Tangle(tangle()).table(jnp.zeros(())).splitlines()
    assert lines[2].split() == ["a", "0.5", "unconstrained"]
    assert lines[3].split() == ["b[0]", "1.0", "1.0"]
    assert lines[5].split() == ["dead[0,0]", "3", "unconstrained"]


class Scaled(vn.Trainer):
    def residuals(self, model, batch):
        return (model - batch[0]) / batch[1]


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (1.23456e-8, 1.2e-10, ["1.235e-08", "1.2e-10"]),
        (-4.5678e9, 2.3e6, ["-4.5678e+09", "2.3e+06"]),
        (123.456, 12.0, ["123", "12"]),
        (0.5, 3.0, ["0.5", "3.0"]),
        (99955.4, 367.0, ["99955", "367"]),
        (0.0, 1e-9, ["0e+00", "1.0e-09"]),
        (12.345, 0.0996, ["12.35", "0.10"]),
        (2459012.3901, 0.1599, ["2459012.39", "0.16"]),
        (-2459012.3901, 16.0, ["-2459012", "16"]),
        (2459012.3901, 1.6e-5, ["2459012.390100", "0.000016"]),
        (2459012.3901, 160.0, ["2.45901e+06", "1.6e+02"]),
        (1e12, 1.0, ["1000000000000.0", "1.0"]),
        (1e12, 1e-3, ["1.0000000000000000e+12", "1.0e-03"]),
        (1e-20, 1e-22, ["1.000e-20", "1.0e-22"]),
        (1.0, 2e12, ["1e+00", "2.0e+12"]),
        (2459012.3901, math.inf, ["2459012.39", "unconstrained"]),
        (1e12, math.inf, ["1e+12", "unconstrained"]),
    ],
)
def test_values_have_the_digits_of_their_errors(value, error, expected):
    trainer = Scaled(jnp.asarray([value]))
    row = trainer.table((jnp.zeros(1), jnp.asarray(error))).splitlines()[2]
    assert row.split()[-2:] == expected


def test_a_long_array_is_cut():
    lines = Scaled(jnp.arange(500.0)).table().splitlines()
    assert len(lines) < 60
    assert any("more" in line for line in lines)
    assert lines[-1].split() == ["[499]", "499"]


# The likelihood


@pytest.mark.parametrize("how", ["flat", "dense", "blocks"])
def test_objective_is_the_likelihood_of_the_latent_vector(how):
    trainer = GaussianFit(START)
    if how != "flat":
        trainer = trainer.whiten(data(), blocks="**" if how == "blocks" else None)
    potential, start = trainer.objective(data())
    expected = 0.5 * jnp.sum(trainer.residuals(trainer.model, data()) ** 2)
    np.testing.assert_allclose(potential(start), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(potential)(start), expected, rtol=1e-12)
    nll = lambda model: Likelihood.nll(None, model, data())
    grads = jax.jit(jax.grad(nll))(trainer.model)
    if how == "flat":
        expected = jnp.stack(jax.tree.leaves(grads))
    else:
        expected = trainer.projector.pull_back(grads)
    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(jax.grad(potential))(start)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start)
    assert jax.vmap(potential)(many).shape == (2,)
    assert eqx.filter_jit(lambda f, u: f(u))(potential, start).shape == ()


BAD_BLOCKS = {
    "overlap": (("mean", "**"), ValueError, "share 'mean'"),
    "nothing": (("meen",), vn.UnknownPathError, "Did you mean 'mean'"),
    "empty": ((), TypeError, "sequence of selectors"),
    "number": (3, TypeError, "sequence of selectors"),
    "optimiser": (optax.adam(0.1), TypeError, "sequence of selectors"),
}


@pytest.mark.own_words
@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_bad_blocks(name):
    blocks, error, message = BAD_BLOCKS[name]
    with pytest.raises(error, match=message):
        GaussianFit(START).fisher(data(), blocks=blocks)


BAD_SOLVES = {
    "not one": (GaussianFit(START), "BFGS", {}, TypeError, "not a minimiser"),
    "a class": (GaussianFit(START), optx.BFGS, {}, TypeError, "is the class `BFGS`"),
    "optax": (GaussianFit(START), optax.adam(0.1), {}, TypeError, "is for `fit`"),
    "a root finder": (
        GaussianFit(START),
        optx.Newton(1e-8, 1e-8),
        {},
        TypeError,
        "not a minimiser",
    ),
    "no residuals": (
        MeanLoss(START),
        optx.LevenbergMarquardt(1e-8, 1e-8),
        {},
        TypeError,
        "does not define `residuals`",
    ),
    "no steps": (
        GaussianFit(START),
        optx.BFGS(1e-8, 1e-8),
        {"max_steps": 0},
        ValueError,
        "`max_steps` is 0",
    ),
    "complex": (
        Scaled(jnp.asarray([1.0 + 1j])),
        optx.BFGS(1e-8, 1e-8),
        {},
        TypeError,
        "must be real",
    ),
}


@pytest.mark.own_words
@pytest.mark.parametrize("name", BAD_SOLVES)
def test_bad_solves(name):
    trainer, solver, options, error, message = BAD_SOLVES[name]
    with pytest.raises(error, match=message):
        trainer.solve(solver, data(), **options)


def test_a_solver_knows_no_hooks():
    class Positive(GaussianFit):
        def constrain(self, model):
            return model

    with pytest.raises(ValueError, match="`constrain`"):
        Positive(START).solve(optx.BFGS(1e-8, 1e-8), data())


def test_residuals_that_are_a_scalar():
    class Sum(vn.Trainer):
        def residuals(self, model, batch):
            return jnp.sum(model)

    with pytest.raises(ValueError, match="for each datum"):
        Sum(jnp.ones(2)).fisher(None)
    with pytest.raises(ValueError, match="for each datum"):
        Sum(jnp.ones(2)).solve(optx.LevenbergMarquardt(1e-8, 1e-8), None)

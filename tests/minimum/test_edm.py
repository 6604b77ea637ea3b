"""The estimated distance to the minimum, and what is said of a fit because of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from models import Gaussian, GaussianFit, Pull

REASON = vn.StopReason
X = jnp.linspace(-5.0, 5.0, 40)
TRUTH, NEAR = (0.3, 1.2, 4.0), (0.31, 1.18, 4.05)
KEY = jax.random.key(7)
# Takes one step, which moves nothing.
IDLE = optx.GradientDescent(1e-14, 1e-30, 1e-30)
LM = optx.LevenbergMarquardt(1e-8, 1e-8)
BFGS = optx.BFGS(1e-8, 1e-8)
LM_32 = optx.LevenbergMarquardt(1e-6, 1e-6)


def peak(*values, dtype=np.float64):
    return Gaussian(*(jnp.asarray(value, dtype) for value in values))


Y = peak(*TRUTH)(X) + 0.1 * jax.random.normal(jax.random.key(0), X.shape)


def data(dtype=np.float64):
    own = X, Y, np.full(X.shape, 0.1)
    return tuple(jnp.asarray(np.asarray(a, dtype)) for a in own)


class Poisson(vn.Trainer):
    def nll(self, model, batch):
        x, counts = batch
        rate = model["a"] * jnp.exp(-model["b"] * x)
        return jnp.sum(rate - counts * jnp.log(rate))


class Mean(vn.Trainer):
    def loss(self, model, batch):
        x, y, _ = batch
        return jnp.mean(jnp.cosh(model(x) - y))


class Phase(vn.Trainer):
    def residuals(self, model, batch):
        phase = model["p"] * batch
        wave = jax.lax.complex(jnp.cos(phase), jnp.sin(phase))
        return model["a"].astype(complex) * wave - 1.5


class Drawn(vn.Trainer):
    """Other numbers at each step."""

    def residuals(self, model, batch, key):
        return batch * model["a"] - jax.random.normal(key, batch.shape)


class Slack(vn.Trainer):
    """Only the sum of two parameters counts."""

    def residuals(self, model, batch):
        return (model["a"] + model["b"]) * batch - batch**2


def in_double_precision(trainer):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), trainer.params)


def by_jacobian(trainer, batch, basis=None, **options):
    """Half the square of what of the residuals the columns of the Jacobian span."""

    def residuals(params):
        r = trainer.residuals(params, batch, **options).ravel()
        return jnp.concatenate([r.real, r.imag]) if jnp.iscomplexobj(r) else r

    both = jax.jit(lambda x: (jax.jacfwd(residuals)(x), residuals(x)))
    columns, r = both(in_double_precision(trainer))
    columns = [np.reshape(x, (r.size, -1)) for x in jax.tree.leaves(columns)]
    jacobian = np.concatenate(columns, axis=1)
    jacobian = jacobian if basis is None else jacobian @ basis
    left, values, _ = np.linalg.svd(jacobian, full_matrices=False)
    return 0.5 * np.sum((left[:, values > 1e-9 * values[0]].T @ np.asarray(r)) ** 2)


def by_hessian(trainer, batch):
    """From the derivatives by parameters that are numbers."""
    method = trainer.nll if isinstance(trainer, Poisson) else trainer.loss
    of = lambda params: method(params, batch)
    both = jax.jit(lambda x: (jax.grad(of)(x), jax.hessian(of)(x)))
    derivatives = both(in_double_precision(trainer))
    slope, hessian = (np.array(jax.tree.leaves(tree)) for tree in derivatives)
    hessian = hessian.reshape(slope.size, slope.size)
    return 0.5 * slope @ np.linalg.solve(hessian, slope)


def rates():
    x = jnp.linspace(0.0, 3.0, 30)
    counts = jnp.round(20 * jnp.exp(-0.8 * x))
    return {"a": jnp.asarray(21.0), "b": jnp.asarray(0.7)}, (x, counts)


SPACES = {
    "parameters": lambda trainer, batch: trainer,
    "whitened": lambda trainer, batch: trainer.whiten(batch),
    "blocks": lambda trainer, batch: trainer.whiten(
        batch, blocks=("mean", ("std", "power"))
    ),
}


@functools.cache
def of_peak_nearby():
    return by_jacobian(GaussianFit(peak(*NEAR)), data())


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        ("parameters", jnp.float64),
        ("whitened", jnp.float32),
        pytest.param("blocks", jnp.float64, marks=pytest.mark.seams),
    ],
)
def test_of_residuals(space, dtype):
    batch = data(dtype)
    trainer = SPACES[space](GaussianFit(peak(*NEAR, dtype=dtype)), batch)
    result = trainer.solve(IDLE, batch, max_steps=1)
    expected = of_peak_nearby()
    rtol = 1e-9 if dtype == X.dtype else 2e-3
    np.testing.assert_allclose(result.edm, expected, rtol=rtol)
    assert result.stop_reason is REASON.MAX_STEPS
    assert "along" in result.explain()


def test_of_what_is_not_a_plain_vector():
    start = {"a": jnp.asarray(1.2), "p": jnp.asarray([0.2, 0.1])}
    batch = jnp.asarray([0.5, 1.0])
    result = Phase(start).solve(IDLE, batch, max_steps=1)
    np.testing.assert_allclose(result.edm, by_jacobian(Phase(start), batch), rtol=1e-9)
    drawn = Drawn({"a": jnp.ones(4)}, key=jax.random.key(3))
    scale = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    key = jax.random.fold_in(drawn.key, 0)
    result = drawn.solve(IDLE, scale, max_steps=1)
    expected = by_jacobian(drawn, scale, key=key)
    np.testing.assert_allclose(result.edm, expected, rtol=1e-9)


@pytest.mark.parametrize("case", ["nll", "loss"])
def test_of_a_scalar(case):
    if case == "nll":
        model, batch = rates()
        trainer = Poisson(model)
    else:
        trainer, batch = Mean(peak(*NEAR)), data()
    result = trainer.solve(IDLE, batch, max_steps=1)
    np.testing.assert_allclose(result.edm, by_hessian(trainer, batch), rtol=1e-8)


def test_directions_that_are_null_or_dropped_do_not_count():
    trainer = Slack({"a": jnp.asarray(1.0), "b": jnp.asarray(2.0)})
    batch = jnp.linspace(1.0, 2.0, 9)
    result = trainer.solve(IDLE, batch, max_steps=1)
    np.testing.assert_allclose(result.edm, by_jacobian(trainer, batch), rtol=1e-9)
    fisher = GaussianFit(peak(*NEAR)).fisher(data())
    projector = vn.EigenProjector.from_fisher(fisher, peak(*NEAR), rank=2)
    inside = GaussianFit(peak(*NEAR), projector=projector)
    result = inside.solve(IDLE, data(), max_steps=1)
    expected = by_jacobian(inside, data(), np.asarray(projector.matrix))
    np.testing.assert_allclose(result.edm, expected, rtol=1e-9)
    # There is nothing short about a minimum of what is free.
    assert inside.solve(LM, data()).stop_reason is REASON.CONVERGED


class Squares(vn.Trainer):
    def residuals(self, model, batch):
        return batch * (model["x"] - 1.0)


class Quartic(vn.Trainer):
    def nll(self, model, batch):
        return jnp.sum(batch * (model["x"] - 1.0) ** 2)


@pytest.mark.parametrize(
    "cls", [pytest.param(Squares, marks=pytest.mark.seams), Quartic]
)
def test_of_very_many_parameters(cls):
    size = 100_000 if cls is Squares else 1_000
    scale = 1.0 + jnp.arange(float(size)) % 4
    trainer = cls({"x": jnp.full(size, 1.1)})
    result = trainer.solve(IDLE, scale, max_steps=1)
    power = 2 if cls is Squares else 1
    half = 0.5 if cls is Squares else 1.0
    np.testing.assert_allclose(
        result.edm, 0.01 * half * jnp.sum(scale**power), rtol=1e-4
    )


class Line(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model["a"] * x + model["b"] - y


class Valley(vn.Trainer):
    """Rosenbrock's: nothing is left of the residuals."""

    def residuals(self, model, batch):
        x, y = model["xy"]
        return jnp.stack([10 * (y - x**2), 1 - x])


@pytest.mark.parametrize(
    ("solver", "dtype"), [(LM, jnp.float32), (BFGS, jnp.float64)], ids=["LM", "BFGS"]
)
def test_without_scatter_rounding_decides(solver, dtype):
    result = Valley({"xy": jnp.asarray([-1.2, 1.0], dtype)}).solve(solver, None)
    assert result.stop_reason is REASON.CONVERGED
    np.testing.assert_allclose(result.model["xy"], 1.0, rtol=1e-4)


def test_a_plateau_is_no_minimum():
    x = jnp.linspace(1.0, 2.0, 9)

    class Far(vn.Trainer):
        def residuals(self, model, batch):
            return jnp.exp(model["a"] * x) - 1.0

    result = Far({"a": jnp.asarray(-1e4)}).solve(LM, x)
    assert result.stop_reason is REASON.STALLED
    assert result.edm == 0
    assert "flat" in result.explain()
    assert result.trainer.table(x).endswith("flat here: start from elsewhere")


class Edge(vn.Trainer):
    """A sum of absolute values: no curvature to measure by."""

    def nll(self, model, batch):
        return jnp.sum(jnp.abs(model["x"] - batch))


def test_where_it_is_not_known_the_solver_is_believed():
    solver = optx.NelderMead(1e-6, 1e-6)
    result = Edge({"x": jnp.asarray(0.0)}).solve(solver, jnp.asarray([1.0, 2.0, 4.0]))
    assert np.isnan(result.edm)
    assert result.stop_reason is REASON.CONVERGED


def test_a_solver_whose_tolerance_is_too_wide_stalls():
    result = GaussianFit(peak(0.0, 1.0, 3.0)).solve(
        optx.GradientDescent(1e-4, 1e-4, 1e-4), data()
    )
    assert result.stop_reason is REASON.STALLED
    assert str(result.stop_reason) == "Stopped short of a minimum."
    # The names, and the way down.
    assert "(edm), along power (+0." in result.explain()
    assert "`result.trainer.whiten(batch)`" in result.explain()
    whitened = result.trainer.whiten(data())
    result = whitened.solve(optx.GradientDescent(1e-6, 1e-4, 1e-4), data(), max_steps=2)
    assert "whiten" not in result.explain()


def test_a_tolerance_that_is_larger_than_the_loss_is_told():
    class Tiny(vn.Trainer):
        def residuals(self, model, batch):
            return 1e-12 * (jnp.exp(model["a"] * batch) - jnp.exp(2 * batch))

    trainer = Tiny({"a": jnp.asarray(1.0)})
    result = trainer.solve(LM, jnp.linspace(0.0, 1.0, 9))
    assert result.stop_reason is REASON.STALLED
    assert result.explain().endswith("give `atol=0`.")


def test_a_jacobian_whose_squares_overflow_is_measured():
    class PowerLaw(vn.Trainer):
        def residuals(self, model, batch):
            x, y, sigma = batch
            return (model["norm"] * x ** model["index"] - y) / sigma

    x = jnp.logspace(-1, 1, 30, dtype=jnp.float32)
    y = 2.5e-26 * x**-0.7
    model = {"norm": jnp.float32(1e-26), "index": jnp.float32(0.0)}
    batch = x, y, 0.03 * y
    # In these units no step of 1 along the gradient is small enough.
    idle = PowerLaw(model).solve(BFGS, batch)
    assert idle.stop_reason is not REASON.CONVERGED
    # The loss would be zero at the minimum.
    best = float(idle.trainer.best_loss)
    assert 0.1 * best < float(idle.edm) < 2 * best
    result = PowerLaw(model).solve(LM, batch)
    assert result.stop_reason is REASON.CONVERGED
    np.testing.assert_allclose(result.model["norm"], 2.5e-26, rtol=1e-4)


def test_single_precision_arrives_whatever_the_tolerance():
    batch = data(jnp.float32)
    starts = jax.random.normal(jax.random.key(1), (24, 3)) * 0.1
    trainers = [
        GaussianFit(peak(*(jnp.asarray([0.2, 1.1, 3.5]) + s), dtype=jnp.float32))
        for s in starts
    ]
    result = vn.fit_many([t.whiten(batch) for t in trainers], batch, 99, solver=BFGS)
    assert set(result.stop_reasons) == {REASON.CONVERGED}
    assert np.all(result.edms < 1e-3)


def test_a_fit_that_converged_is_checked():
    trainer = GaussianFit(peak(0.0, 1.0, 3.0), optax.adam(0.05))
    fit = lambda batch, stop, steps=3_000: trainer.fit(batch, steps, stop=stop)
    hasty, good = (
        fit(data(), vn.Converged(0.05, 3)),
        fit(data(), vn.Converged(1e-9, 50)),
    )
    assert (hasty.stop_reason, good.stop_reason) == (REASON.STALLED, REASON.CONVERGED)
    np.testing.assert_allclose(hasty.edm, by_jacobian(hasty.trainer, data()), rtol=1e-8)
    assert good.edm < 1e-3
    # Of minibatches there is no one loss.
    with pytest.warns(UserWarning, match="not checked"):
        some = fit(vn.Minibatches(data(), 20, key=KEY), vn.Converged(0.9, 2), 50)
    assert some.stop_reason is REASON.CONVERGED
    assert np.isnan(some.edm)
    assert np.isnan(fit(data(), None, 5).edm)


def test_hooks_lead_elsewhere():
    class Clipped(Pull):
        def constrain(self, model):
            return jax.tree.map(lambda x: jnp.maximum(x, 1.0), model)

    trainer = Clipped({"a": jnp.asarray(2.0)}, optax.sgd(0.1))
    batch = jnp.asarray(0.0)
    result = trainer.fit(batch, 500, stop=vn.Converged(1e-6, 3))
    assert result.stop_reason is REASON.CONVERGED
    assert np.isnan(result.edm)


def test_a_table_is_marked():
    trainer = GaussianFit(peak(0.0, 1.0, 3.0))
    short = trainer.solve(LM, data(), max_steps=2)
    note = short.trainer.table(data()).splitlines()[-1]
    edm = float(by_jacobian(short.trainer, data()))
    assert note.startswith(f"not at a minimum: edm {edm:.3g}, along ")
    assert f"{edm:.3g}" in short.explain()
    good = trainer.solve(LM, data()).trainer
    assert "minimum" not in good.table(data())
    assert "minimum" not in short.trainer.table()
    # It is of the likelihood, and a loss beside it may have its minimum elsewhere.
    model, batch = rates()
    assert "not at a minimum" in Poisson(model).table(batch)


class Offset(vn.Trainer):
    """In single precision the square of a residual overflows beyond 1e19."""

    def residuals(self, model, batch):
        return model["a"] + model["b"] * batch[0] - batch[1]


class OffsetNll(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Offset.residuals(self, model, batch)))


def offset(cls=Offset, **options):
    start = {"a": jnp.zeros((), jnp.float32), "b": jnp.ones((), jnp.float32)}
    return cls(start, **options)


NAMED = {
    "nan": (lambda y: y.at[3].set(jnp.nan), r"`batch\[1\]` has 1 NaN, at \[3\]"),
    "inf": (lambda y: y.at[2].set(jnp.inf), r"`batch\[1\]` has 1 infinity, at \[2\]"),
    "overflow": (lambda y: y + 1e25, "data and the parameters are finite: .* infinite"),
}
LINE = jnp.arange(5.0, dtype=jnp.float32), 2 * jnp.arange(5.0, dtype=jnp.float32)


@pytest.mark.parametrize("cls", [Offset, OffsetNll])
@pytest.mark.parametrize("case", NAMED)
def test_what_is_not_finite_is_named_and_has_no_distance(case, cls):
    spoil, match = NAMED[case]
    batch = LINE[0], spoil(LINE[1])
    solver = LM if cls is Offset else BFGS
    with jax.enable_x64(False):
        with pytest.warns(UserWarning, match=f"`solve`: Ended at .*{match}"):
            result = offset(cls).solve(solver, batch)
        assert result.stop_reason is REASON.NON_FINITE
        assert np.isnan(result.edm)
        careful = offset(cls, nan_policy=vn.RaiseOnNan())
        with pytest.raises(vn.NonFiniteError, match=match):
            careful.solve(solver, batch)


def test_what_is_not_finite_in_many_is_named():
    batch = LINE[0], jnp.stack([LINE[1], LINE[1].at[3].set(jnp.nan)])
    options = {"data_axis": (None, 0), "solver": LM, "jac": "bwd"}
    result = vn.fit_many([offset()] * 2, batch, 50, **options)
    assert result.stop_reasons == (REASON.CONVERGED, REASON.NON_FINITE)
    np.testing.assert_array_equal(np.isnan(result.edms), [False, True])
    match = NAMED["nan"][1]
    careful = offset(nan_policy=vn.RaiseOnNan())
    with pytest.raises(vn.NonFiniteError, match=match):
        vn.fit_many([careful] * 2, batch, 50, **options)
    batch = LINE[0], batch[1].at[:, 3].set(jnp.nan)
    with pytest.warns(UserWarning, match=f"all 2 trainers .*{match}"):
        vn.fit_many([offset()] * 2, batch, 50, **options)
    with pytest.raises(TypeError, match="`jac` is for a `solver`"):
        vn.fit_many([offset(optimiser=optax.sgd(0.1))] * 2, LINE, 5, jac="bwd")


class PeakNll(vn.Trainer):
    def nll(self, model, batch):
        x, y, sigma = batch
        return 0.5 * jnp.sum(jnp.square((model(x) - y) / sigma))


@pytest.mark.parametrize("cls", [GaussianFit, PeakNll])
def test_a_peak_far_from_all_data_is_no_minimum(cls):
    trainer = cls(peak(1e3, 1.0, 3.0))
    result = trainer.solve(BFGS, data())
    assert result.stop_reason is REASON.STALLED
    assert "flat" in result.explain()
    if cls is PeakNll:
        many = vn.fit_many([trainer] * 2, data(), 50, solver=BFGS)
        assert set(many.stop_reasons) == {REASON.STALLED}


def test_no_data_at_all_are_no_minimum():
    nothing = LINE[0][:0], LINE[1][:0]
    with pytest.raises(ValueError, match="no residual in it"):
        offset().solve(LM, nothing)


@pytest.mark.parametrize(
    ("dtype", "cls"), [(jnp.float16, Offset), (jnp.bfloat16, OffsetNll)]
)
def test_in_half_precision(dtype, cls):
    batch = jax.tree.map(lambda x: x.astype(dtype), LINE)
    start = {"a": jnp.ones((), dtype), "b": jnp.ones((), dtype)}
    result = cls(start).solve(IDLE, batch, max_steps=1)
    vector = np.asarray(1.0 - LINE[0])
    # A straight line has all of it as its distance.
    np.testing.assert_allclose(result.edm, 0.5 * vector @ vector, rtol=1e-2)


class Slope(vn.Trainer):
    def residuals(self, model, batch):
        return model["a"] * batch - 2 * batch


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_many_spacings_in_half_precision_are_no_minimum(dtype):
    """Without scatter, where a few of them are all that rounding leaves."""
    batch, eps = jnp.linspace(0, 1, 10, dtype=dtype), float(jnp.finfo(dtype).eps)
    for ulps in (2, 7):
        trainer = Slope({"a": jnp.asarray(2 + 2 * ulps * eps, dtype)})
        result = trainer.solve(IDLE, batch, max_steps=1)
        assert (result.stop_reason is REASON.CONVERGED) is (ulps == 2)


def rate_of(model):
    x = jnp.linspace(0, 1, 100, dtype=jnp.float32)
    return jnp.float32(1e5) * (model["a"] + model["b"] * x)


class Counts(vn.Trainer):
    """A Poisson likelihood without its constants, which is 1e8 for 1e5 counts each."""

    def nll(self, model, counts):
        rate = rate_of(model)
        return jnp.sum(rate - counts * jnp.log(rate))


class AllOfCounts(vn.Trainer):
    def residuals(self, model, counts):
        return vn.likelihoods.Poisson(rate_of(model), counts)


def counts_from(start):
    return {"a": jnp.float32(start), "b": jnp.float32(0.8)}


@pytest.mark.parametrize("start", [0.7, 0.85, 0.95, 1.2])
def test_rounding_of_the_loss_does_not_hide_a_distance(start):
    truth = rate_of({"a": 1.0, "b": 0.5})
    counts = np.random.default_rng(0).poisson(truth).astype(np.float32)
    solver = optx.BFGS(1e-6, 1e-6)
    best = AllOfCounts(counts_from(1.0)).solve(LM_32, counts).trainer
    errors = best.standard_errors(counts)
    result = Counts(counts_from(start)).solve(solver, counts)
    off = {k: (result.model[k] - best.model[k]) / errors[k] for k in "ab"}
    note = result.trainer.table(counts).splitlines()[-1]
    if result.stop_reason is REASON.CONVERGED:
        assert max(map(abs, off.values())) < 0.25
        assert "minimum" not in note
        return
    remedy = "The loss is rounded, in float32, by more than that: compute in float64"
    assert result.stop_reason is REASON.STALLED
    assert remedy in result.explain()
    assert remedy in note
    with pytest.raises(ValueError, match="is not at a minimum"):
        result.trainer.intervals(solver, counts)


def test_rounding_of_the_loss_hides_most_starts():
    """So that the test above has a case of each kind."""
    truth = rate_of({"a": 1.0, "b": 0.5})
    counts = np.random.default_rng(0).poisson(truth).astype(np.float32)
    trainers = [Counts(counts_from(a)) for a in np.linspace(0.7, 1.2, 9)]
    found = vn.fit_many(trainers, counts, 100, solver=optx.BFGS(1e-6, 1e-6))
    assert {REASON.CONVERGED, REASON.STALLED} == set(found.stop_reasons)
    is_near = np.asarray(found.edms) < 0.02
    assert [r is REASON.CONVERGED for r in found.stop_reasons] == list(is_near)


class Mass(vn.Trainer):
    """A mass in kilogram: the second derivative is zero in single precision."""

    def nll(self, model, batch):
        return 0.5 * jnp.sum(((model["mass"] / 2e30 - batch) / 0.1) ** 2)


BFGS_32 = optx.BFGS(1e-6, 1e-6)
OF_HESSIANS = {
    "standard_errors": lambda t, batch: t.standard_errors(batch),
    "table": lambda t, batch: t.table(batch),
    "whiten": lambda t, batch: t.whiten(batch),
    "fisher": lambda t, batch: t.fisher(batch),
    "intervals": lambda t, batch: t.intervals(BFGS_32, batch),
}


@pytest.mark.parametrize("name", OF_HESSIANS)
def test_a_second_derivative_that_underflows_is_refused(name):
    batch = jnp.asarray([0.9, 1.0, 1.2], jnp.float32)
    trainer = Mass({"mass": jnp.float32(2e30)})
    with pytest.raises(ValueError, match=r"'mass', which is 2e\+30, is zero.*float64"):
        OF_HESSIANS[name](trainer, batch)


def test_a_second_derivative_that_underflows_is_no_minimum():
    batch = jnp.asarray([0.9, 1.0, 1.2], jnp.float32)
    trainer = Mass({"mass": jnp.float32(2.5e30)})
    assert trainer.solve(BFGS_32, batch).stop_reason is REASON.STALLED
    many = vn.fit_many([trainer, trainer], batch, 9, solver=BFGS_32)
    assert many.stop_reasons == (REASON.STALLED, REASON.STALLED)
    double = Mass({"mass": jnp.asarray(2e30)}), batch.astype(float)
    errors = double[0].standard_errors(double[1])
    np.testing.assert_allclose(errors["mass"], 2e30 * 0.1 / 3**0.5)


class Column(vn.Trainer):
    """A density that is large, and known so well that nothing underflows."""

    def nll(self, model, batch):
        return 0.5 * jnp.sum(((model["n"] / 1e20 - batch) / 0.01) ** 2)


def test_a_large_unit_alone_is_no_fault():
    batch = jnp.asarray([1.0, 1.01, 0.99, 1.02], jnp.float32)
    errors = Column({"n": jnp.float32(1.005e20)}).standard_errors(batch)
    np.testing.assert_allclose(errors["n"] / 1e20, 0.005, rtol=1e-3)


class Offsets(vn.Trainer):
    """Has a large density, known by its prior alone or held at its bound."""

    def nll(self, model, batch):
        scale, counts = batch
        left = model["n"] / 1e20 * scale + model["c"] - counts
        return 0.5 * jnp.sum((left / 0.01) ** 2)


WITHOUT_CURVATURE = {
    "held": (1.0, {"bounds": {"n": (2e20, 3e20)}}, np.nan),
    "by its prior": (0.0, {"priors": {"n": vn.Normal(2e20, 1e18)}}, 1e18),
}


@pytest.mark.parametrize("case", WITHOUT_CURVATURE)
def test_no_curvature_of_a_large_unit_is_no_fault(case):
    scale, options, expected = WITHOUT_CURVATURE[case]
    # One datum measures it, and would have it below its bound.
    scales = np.float32([scale, 0.0, 0.0, 0.0])
    batch = scales, np.float32([1.0, 1.01, 0.99, 1.02])
    model = {"n": jnp.float32(2e20), "c": jnp.float32(0.0)}
    result = Offsets(model, **options).solve(BFGS_32, batch)
    assert result.stop_reason is REASON.CONVERGED
    report = result.report(batch)
    errors = {row.name: row.error for row in report.parameters}
    np.testing.assert_allclose(errors["c"], 0.005, rtol=1e-3)
    np.testing.assert_allclose(errors["n"], expected, rtol=1e-3)


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_units_do_not_matter(unit):
    start = {"a": jnp.asarray(0.5 / unit, jnp.float32), "b": jnp.zeros((), jnp.float32)}
    batch = jnp.float32(unit) * LINE[0], jnp.sin(LINE[1])
    result = Line(start).solve(IDLE, batch, max_steps=1)
    line, y = np.vander(LINE[0], 2).astype(float), np.sin(np.asarray(LINE[1], float))
    span, _ = np.linalg.qr(line)
    expected = 0.5 * np.sum(np.square(span.T @ (line[:, 0] * 0.5 - y)))
    np.testing.assert_allclose(result.edm, expected, rtol=1e-4)


def test_derivatives_that_overflow_are_no_minimum():
    class Steep(vn.Trainer):
        def nll(self, model, batch):
            return 0.5 * jnp.sum(((model - batch) * 1e26) ** 2)

    batch = jnp.asarray([1e-26, 2e-26, 3e-26], jnp.float32)
    result = Steep(jnp.asarray(5e-26, jnp.float32)).solve(optx.BFGS(1e-8, 1e-8), batch)
    assert result.stop_reason is vn.StopReason.STALLED
    assert result.explain().endswith("Its derivatives there are not finite.")

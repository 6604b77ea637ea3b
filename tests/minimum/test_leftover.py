"""Degenerate models: a fit ends beside the minimum, and its gradient has curvature."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from scipy.optimize import minimize

import vernal as vn

PLACES = np.linspace(0.1, 1.0, 30)
NOISE = 0.05
TRUTH = {"a": 1.3, "b": 0.8, "c": 0.5}
LOOSE, TIGHT = optx.BFGS(1e-3, 1e-3), optx.BFGS(1e-6, 1e-6)

# Models of which `a` and `b` are degenerate, in the last one `c` as well.
DEGENERATE = {
    "product": lambda a, b, c, x: a * b * x + c,
    "ratio": lambda a, b, c, x: a / b * x + c,
    "phases": lambda a, b, c, x: c * jnp.sin(a + b + 6 * x),
    "three": lambda a, b, c, x: a * b * c * x,
}
ALIKE = {
    "quadratic": lambda a, b, c, x: a + b * (1 + x) + c * (1 + x) ** 2,
    "decay": lambda a, b, c, x: a * jnp.exp(-b * x) + c,
    "saturation": lambda a, b, c, x: a * x / (b + x) + c,
}
MODELS = {**DEGENERATE, **ALIKE}


class Named(vn.Trainer):
    name: str

    def __init__(self, model, name, **options):
        super().__init__(model, **options)
        self.name = name


class Likelihood(Named):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(misfit(self.name, model, batch)))


class Squares(Named):
    def residuals(self, model, batch):
        return misfit(self.name, model, batch)


def misfit(name, model, batch):
    x = jnp.asarray(PLACES, batch.dtype)
    fitted = MODELS[name](model["a"], model["b"], model["c"], x)
    return (fitted - batch) / jnp.asarray(NOISE, batch.dtype)


def start(seed, dtype):
    values = np.random.default_rng(100 + seed).uniform(0.7, 1.4, 3)
    return {key: jnp.asarray(v, dtype) for key, v in zip("abc", values, strict=True)}


def measured(name, dtype, seed=0, size=1.0):
    noise = np.random.default_rng(seed).normal(size=len(PLACES))
    return jnp.asarray(MODELS[name](**TRUTH, x=PLACES) + size * NOISE * noise, dtype)


def error_of_c(name, batch):
    """That of the model with no parameter too many, which is linear."""
    if name == "phases":
        # The length of what two waves are multiplied by.
        columns = np.stack([np.sin(6 * PLACES), np.cos(6 * PLACES)], axis=1)
        slope = np.linalg.lstsq(columns, batch, rcond=None)[0]
        slope /= np.linalg.norm(slope)
    else:
        columns, slope = np.vander(PLACES, 2), np.array([0.0, 1.0])
    return NOISE * np.sqrt(slope @ np.linalg.inv(columns.T @ columns) @ slope)


CASES = [(Likelihood, name, jnp.float64) for name in DEGENERATE if name != "ratio"]
CASES += [(Likelihood, "ratio", jnp.float32), (Squares, "product", jnp.float64)]


HIDDEN = (
    "rounding may hide how well the data constrain what is unconstrained here: compute "
    "in float64"
)


@pytest.mark.parametrize(("kind", "name", "dtype"), CASES)
def test_what_is_degenerate_has_no_errors(kind, name, dtype):
    data = jnp.stack([measured(name, dtype, seed) for seed in range(3)])
    members = [kind(start(seed, dtype), name) for seed in range(3)]
    errors = {}
    if dtype == jnp.float32:
        many = vn.fit_many(members, data, 500, data_axis=0, solver=TIGHT)
        assert set(many.stop_reasons) == {vn.StopReason.CONVERGED}
        errors = many.errors(data, kind="observed")
    for index, (member, batch) in enumerate(zip(members, data, strict=True)):
        result = member.solve(LOOSE, batch)
        assert result.stop_reason is vn.StopReason.CONVERGED
        report = result.report(batch, kind="observed")
        # In float64 rounding hides nothing.
        notes = (None,) if dtype == jnp.float64 else (None, HIDDEN)
        assert report.note in notes
        found = [{row.name: row.error for row in report.parameters}]
        if errors:
            found += [{key: float(column[index]) for key, column in errors.items()}]
        right = np.inf if name == "three" else error_of_c(name, np.asarray(batch))
        for own in found:
            assert own["a"] == own["b"] == np.inf
            np.testing.assert_allclose(own["c"], right, rtol=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_degenerate_may_be_no_more_than_noise(seed):
    """Within its error bar the model is far from linear: the product is about zero."""
    noise = np.random.default_rng(seed).normal(size=len(PLACES))
    batch = jnp.asarray(0.5 + NOISE * noise)
    for solver in (LOOSE, TIGHT):
        end = Likelihood(start(seed, jnp.float64), "product").solve(solver, batch)
        assert end.stop_reason is vn.StopReason.CONVERGED
        errors = end.trainer.standard_errors(batch)
        assert errors["a"] == errors["b"] == np.inf
        np.testing.assert_allclose(errors["c"], error_of_c("product", batch), rtol=0.02)


def test_a_program_has_the_same_errors():
    batch = measured("ratio", jnp.float64)
    end = Likelihood(start(0, jnp.float64), "ratio").solve(LOOSE, batch).trainer
    own = end.standard_errors(batch)
    found = eqx.filter_jit(lambda trainer, batch: trainer.standard_errors(batch))
    for key, error in found(end, batch).items():
        np.testing.assert_allclose(error, own[key], rtol=1e-6)


def test_a_program_evaluates_the_model_once_at_a_minimum():
    calls = []

    class Told(Likelihood):
        def nll(self, model, batch):
            jax.debug.callback(lambda: calls.append(1))
            return super().nll(model, batch)

    batch = measured("decay", jnp.float64)
    end = Likelihood(start(0, jnp.float64), "decay").solve(TIGHT, batch).model
    errors = lambda trainer, batch: trainer.standard_errors(batch)
    errors(Told(end, "decay"), batch)
    jax.effects_barrier()
    outside = len(calls)
    eqx.filter_jit(errors)(Told(end, "decay"), batch)
    jax.effects_barrier()
    assert len(calls) == 2 * outside > 0


class Cancelling(vn.Trainer):
    """A product on a large background, of which the residuals are rounded by more."""

    def residuals(self, model, batch):
        background, data = batch
        x = jnp.asarray(PLACES, data.dtype)
        fitted = background + model["a"] * model["b"] * x
        return (fitted - data) / jnp.asarray(NOISE, data.dtype)


class CancellingLikelihood(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Cancelling.residuals(self, model, batch)))


@eqx.filter_jit
def in_a_program(trainer, batch, kind):
    return trainer.standard_errors(batch, kind=kind)


# A sandwich has the observed curvature in it.
LARGE = [
    (jnp.float64, 1e5, "sandwich"),
    (jnp.float64, 1e7, "sandwich"),
    (jnp.float32, 1e2, "observed"),
]


@pytest.mark.parametrize(("dtype", "background", "kind"), LARGE)
def test_where_large_numbers_cancel_rounding_has_no_curvature(dtype, background, kind):
    noise = np.random.default_rng(0).normal(size=(3, len(PLACES)))
    data = jnp.asarray(background + PLACES + NOISE * noise, dtype)
    data, first = ((jnp.asarray(background, dtype), y) for y in (data, data[0]))
    start = {"a": jnp.asarray(0.7, dtype), "b": jnp.asarray(1.1, dtype)}
    solver = optx.LevenbergMarquardt(1e-4, 1e-4)
    options = {"data_axis": (None, 0), "solver": solver}
    many = vn.fit_many([Cancelling(start)] * 3, data, 100, **options)
    end = Cancelling(start).solve(solver, first).trainer
    columns = many.errors(data, kind=kind)
    assert np.isinf([columns["a"], columns["b"]]).all()
    report, found = end.report(first, kind=kind), in_a_program(end, first, kind)
    for own in (end.standard_errors(first, kind=kind), found):
        assert own["a"] == own["b"] == np.inf
    assert all(row.error == np.inf for row in report.parameters)
    rows = end.table(first, kind=kind).splitlines()[2:4]
    assert all(row.endswith("unconstrained") for row in rows)
    # Of the likelihood, too.
    errors = CancellingLikelihood(end.model).standard_errors(first)
    assert errors["a"] == errors["b"] == np.inf


Z = np.linspace(0.02, 0.1, 20)


def distance(z, q):
    return 5 * jnp.log10(3e5 * z * (1 + (1 - q) * z / 2)) + 25


class Hubble(vn.Trainer):
    """Supernovae: the constant of Hubble and the magnitude are degenerate."""

    def residuals(self, model, batch):
        fitted = distance(Z, model["q"]) - 5 * jnp.log10(model["h"]) + model["m"]
        return (fitted - batch) / 0.1


@pytest.mark.parametrize("start", [(2.0, 2.0), (5.0, 1.0), (70.0, -19.3)])
def test_a_rounded_loss_hides_no_minimum(start):
    batch = distance(Z, -0.55) - 5 * np.log10(70.0) - 19.3 + 0.1 * np.sin(37 * Z)
    model = dict(zip("hmq", [*start, 0.0], strict=True))
    trainer = Hubble({key: jnp.asarray(value) for key, value in model.items()})
    solver = optx.LevenbergMarquardt(1e-6, 1e-6)
    end = trainer.whiten(batch).solve(solver, batch).trainer
    # By the one parameter of the shape, and one of the level.
    q = float(end.model["q"])
    slope = -5 / np.log(10) * (Z / 2) / (1 + (1 - q) * Z / 2) / 0.1
    centred = slope - slope.mean()
    left = np.asarray(end.residuals(end.model, batch))
    known = {
        "expected": 1 / np.linalg.norm(centred),
        "sandwich": np.linalg.norm(centred * left) / np.sum(centred**2),
    }
    for kind in ("expected", "observed", "sandwich"):
        errors = end.standard_errors(batch, kind=kind)
        assert errors["h"] == errors["m"] == np.inf
        right = known.get(kind, known["expected"])
        np.testing.assert_allclose(errors["q"], right, rtol=0.02)


def test_what_is_linear_and_nearly_degenerate_keeps_its_errors():
    """Powers of years, of which the terms cancel: the curvature is no rounding."""
    years = np.linspace(2000.0, 2024.0, 30)
    rows = np.stack([np.ones(30), years, years**2], axis=1)

    class Powers(vn.Trainer):
        def nll(self, model, batch):
            return 0.5 * jnp.sum(jnp.square((rows @ model - batch) / NOISE))

    noise = np.random.default_rng(0).normal(size=30)
    batch = 0.1 * (years - 2010.0) + 1e-3 * (years - 2010.0) ** 2 + NOISE * noise
    # The best fit, rounded, but for what is left of the powers about the middle.
    centred = years - 2010.0
    best = np.polyfit(centred, batch, 2)
    end = np.array(
        [
            best[2] - 2010.0 * best[1] + 2010.0**2 * best[0],
            best[1] - 2 * 2010.0 * best[0],
            best[0],
        ]
    )
    errors = Powers(jnp.asarray(end)).standard_errors(batch)
    inverse = np.linalg.inv(np.vander(centred, 3).T @ np.vander(centred, 3))
    np.testing.assert_allclose(errors[2], NOISE * np.sqrt(inverse[0, 0]), rtol=0.02)


@pytest.mark.parametrize("is_program", [False, True])
def test_data_may_be_of_another_precision(is_program):
    class Mixed(vn.Trainer):
        def residuals(self, model, batch):
            x = jnp.asarray(PLACES, "float32")
            return (model["a"] * x + model["c"]).astype(batch.dtype) - batch

    batch = jnp.asarray(PLACES + 0.5 + NOISE * np.cos(40 * PLACES))
    slope, level = np.polyfit(PLACES, batch, 1)
    model = {"a": jnp.asarray(slope, "float32"), "c": jnp.asarray(level, "float32")}
    errors = lambda trainer, batch: trainer.standard_errors(batch, kind="observed")
    errors = eqx.filter_jit(errors) if is_program else errors
    columns = np.stack([PLACES, np.ones_like(PLACES)], axis=1)
    right = np.sqrt(np.diag(np.linalg.inv(columns.T @ columns)))
    found = errors(Mixed(model), batch)
    np.testing.assert_allclose([found["a"], found["c"]], right, rtol=1e-4)


def test_residuals_may_be_without_error_bars():
    class Bare(Named):
        def residuals(self, model, batch):
            return 1e-3 * NOISE * misfit(self.name, model, batch)

    batch = measured("product", jnp.float64)
    solver = optx.LevenbergMarquardt(1e-4, 0)
    end = Bare(start(0, jnp.float64), "product").solve(solver, batch)
    assert end.stop_reason is vn.StopReason.CONVERGED
    errors = end.trainer.standard_errors(batch, kind="observed", scale_errors=True)
    expected = end.trainer.standard_errors(batch, scale_errors=True)
    assert errors["a"] == errors["b"] == np.inf
    np.testing.assert_allclose(errors["c"], expected["c"], rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("name", ALIKE)
def test_what_is_nearly_so_has_those_of_its_minimum(name, dtype):
    batch = measured(name, jnp.float64, size=0.3)

    @jax.jit
    def nll(p):
        model = dict(zip("abc", p, strict=True))
        return 0.5 * jnp.sum(jnp.square(misfit(name, model, batch)))

    slope, options = jax.jit(jax.grad(nll)), {"gtol": 1e-9}
    start_at = [1.3, 0.8, 0.5]
    end = minimize(nll, start_at, jac=slope, method="BFGS", options=options).x
    right = np.sqrt(np.diag(np.linalg.inv(jax.jit(jax.hessian(nll))(end))))
    trainer = Likelihood(start(0, dtype), name)
    batch = batch.astype(dtype)
    result = trainer.solve(TIGHT, batch, max_steps=2_000)
    # By this the errors come out wrong, where they are not those of the minimum.
    off = {key: x * (1 + 1e-5) for key, x in result.model.items()}
    for found in (result.trainer, result.trainer.replace(model=off)):
        errors = found.standard_errors(batch)
        np.testing.assert_allclose(list(errors.values()), right, rtol=0.05)


def test_a_saddle_is_none_of_it():
    class Saddle(vn.Trainer):
        def nll(self, model, batch):
            a, b = model["a"], model["b"]
            return 0.5 * (batch * (a + b) ** 2 - 1e-3 * (a - b) ** 2 + (a - b) ** 4)

    # A little beside: a gradient is left, of which the curvature is clear or not.
    for beside in (1e-5, 1e-3):
        trainer = Saddle({"a": jnp.array(beside), "b": jnp.array(beside)})
        for method in (trainer.standard_errors, trainer.whiten):
            with pytest.raises(ValueError, match="indefinite"):
                method(1.0)


@pytest.mark.parametrize("name", ["product", "ratio"])
def test_it_is_whitened_without_what_is_degenerate(name):
    batch = measured(name, jnp.float64)
    trainer = Likelihood(start(1, jnp.float64), name)
    trainer = trainer.solve(LOOSE, batch).trainer
    projector = trainer.whiten(batch, on_null="drop").projector
    assert projector.latent_size == 2


@pytest.mark.parametrize("is_error", [False, True])
def test_what_the_model_does_beside_the_minimum_is_none_of_the_fit(is_error):
    """It has an error there, or is not finite."""

    class Guarded(Likelihood):
        def nll(self, model, batch):
            loss = super().nll(model, batch)
            is_lower = loss < here - 1e-12
            if is_error:
                return eqx.error_if(loss, is_lower, "too good")
            return jnp.where(is_lower, jnp.nan, loss)

    batch = measured("product", jnp.float64)
    end = Likelihood(start(0, jnp.float64), "product").solve(LOOSE, batch).trainer
    here = float(end.nll(end.model, batch))
    result = Guarded(start(0, jnp.float64), "product").solve(LOOSE, batch)
    assert result.stop_reason is vn.StopReason.STALLED
    assert float(result.model["a"]) == float(end.model["a"])
    with pytest.raises(ValueError, match=r"indefinite.*`table\(\)`, without a batch"):
        result.trainer.standard_errors(batch)


@pytest.mark.parametrize("is_program", [False, True])
def test_a_bound_beside_the_minimum_holds_nothing(is_program):
    batch = measured("decay", jnp.float64)
    end = Likelihood(start(0, jnp.float64), "decay").solve(TIGHT, batch)
    right = end.trainer.standard_errors(batch)
    # From here the step to the minimum leads beyond the bound.
    model = end.model | {"b": end.model["b"] + 1e-3}
    bounds = {"b": (float(model["b"]) - 1e-7, None)}
    errors = lambda trainer, batch: trainer.standard_errors(batch)
    errors = eqx.filter_jit(errors) if is_program else errors
    found = errors(Likelihood(model, "decay", bounds=bounds), batch)
    for key, error in found.items():
        np.testing.assert_allclose(error, right[key], rtol=0.2)

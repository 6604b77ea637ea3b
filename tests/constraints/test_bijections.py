"""Bijections: a fit moves free coordinates, and all else is in the parameters."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

LM = optx.LevenbergMarquardt(1e-10, 1e-10)


class Positive(vn.Bijection):
    def forward(self, free):
        return jnp.exp(free)

    def inverse(self, value):
        return jnp.log(value)


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


class AsOfFlowjax:
    """A bijection with the methods of flowjax, and no pytree."""

    def transform(self, x):
        return jnp.exp(x)

    def inverse(self, y):
        return jnp.log(y)


class AsOfNumpyro:
    def __call__(self, x):
        return jnp.exp(x)

    @property
    def inv(self):
        return jnp.log


# Each bijection with a start, and the parameter behind the data.
BIJECTIONS = {
    "a number": (Positive(), 1.0, 2.5),
    "an array": (Positive(), [1.0, 1.0], [0.2, 4.0]),
    "an interval": (Between(-1.0, 4.0), [0.5, 1.0], [-0.6, 2.6]),
    "a simplex": (Simplex(), [0.4, 0.3, 0.3], [0.1, 0.7, 0.2]),
    "an order": (Ordered(), [-1.0, 0.0, 1.0], [0.3, 0.5, 2.0]),
    "a factor": (Triangle(), [[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [-0.5, 0.3]]),
    "of flowjax": (AsOfFlowjax(), 1.0, 0.3),
    "of numpyro": (AsOfNumpyro(), 1.0, 0.3),
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


class ByHand(vn.Trainer):
    """The same with the free coordinates in the model."""

    forward: object = eqx.field(static=True)

    def __init__(self, forward, *args, **options):
        self.forward = forward
        super().__init__(*args, **options)

    def residuals(self, model, batch):
        return _curve(self.forward(model["a"]["x"]), model["b"][0], batch)


def _curve(x, offset, batch):
    matrix, y = batch
    flat = jnp.ravel(x)
    basis = matrix[:, : flat.size].astype(flat.dtype)
    return (basis @ flat + 0.1 * (basis @ flat) ** 2 + offset - y[: len(basis)]) / 0.01


def model(x, dtype=jnp.float64):
    return {"a": {"x": jnp.asarray(x, dtype), "none": None}, "b": [jnp.zeros((), dtype)]}


def batch_of(truth, dtype=jnp.float64):
    random = np.random.default_rng(3)
    matrix = jnp.asarray(random.normal(size=(40, 4)), dtype)
    noise = 0.01 * random.normal(size=40)
    like = model(truth, dtype)
    y = 0.01 * _curve(like["a"]["x"], 0.2, (matrix, jnp.zeros(40, dtype)))
    return matrix, (y + jnp.asarray(noise, dtype)).astype(dtype)


def pair(name, optimiser=None, dtype=jnp.float64):
    """A trainer with a bijection, the one by hand, and the data."""
    bijection, start, truth = BIJECTIONS[name]
    own = model(start, dtype)
    inner = {**own, "a": {**own["a"], "x": inverse_of(bijection)(own["a"]["x"])}}
    trainer = Fit(own, optimiser, bounds={"a.x": bijection})
    by_hand = ByHand(forward_of(bijection), inner, optimiser)
    return trainer, by_hand, batch_of(truth, dtype)


def same_bits(a, b):
    for leaf, other in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_a_fit_is_that_of_free_coordinates_by_hand(name):
    trainer, by_hand, batch = pair(name, optax.adam(0.02))
    options = {"progress": False, "record": ("a.x", "grad_norm")}
    result, other = (t.fit(batch, 60, **options) for t in (trainer, by_hand))
    forward = forward_of(BIJECTIONS[name][0])
    np.testing.assert_allclose(result.history.loss, other.history.loss, rtol=1e-9)
    for own, free in ((result.model, other.model), (result.best, other.best)):
        np.testing.assert_allclose(own["a"]["x"], forward(free["a"]["x"]), rtol=1e-9)
        np.testing.assert_allclose(own["b"][0], free["b"][0], rtol=1e-9)
    # What is recorded is in the parameters too.
    recorded = result.history["a.x"]
    np.testing.assert_array_equal(recorded[0], trainer.model["a"]["x"])
    expected = jax.vmap(forward)(jnp.asarray(other.history["a.x"]))
    np.testing.assert_allclose(recorded, expected, rtol=1e-9)
    assert jax.tree.structure(result.params) == jax.tree.structure(trainer.params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", BIJECTIONS)
def test_a_solve_and_its_errors_are_those_by_hand(name, dtype):
    trainer, by_hand, batch = pair(name, dtype=dtype)
    tol = 1e-10 if dtype == jnp.float64 else 1e-6
    solver = optx.LevenbergMarquardt(tol, tol)
    result, other = (t.solve(solver, batch) for t in (trainer, by_hand))
    digits = 1e-6 if dtype == jnp.float64 else 1e-3
    forward = forward_of(BIJECTIONS[name][0])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=digits, atol=1e-7)
    close(result.model["a"]["x"], forward(other.model["a"]["x"]))
    assert result.model["a"]["x"].dtype == dtype
    # The errors are those of the function of the free coordinates.
    value, error = other.trainer.propagate(lambda m: forward(m["a"]["x"]), batch)
    _, of_offset = other.trainer.propagate(lambda m: m["b"][0], batch)
    close(value, result.model["a"]["x"])
    errors = result.standard_errors(batch)
    close(errors["a"]["x"], error)
    close(errors["b"][0], of_offset)
    report, again = result.report(batch), other.report(batch)
    assert report.free_count == again.free_count
    assert report.degrees_of_freedom == again.degrees_of_freedom
    close(report.chi_squared, again.chi_squared)
    rows = [row for row in report.parameters if row.name.startswith("a.x")]
    known = np.ravel(error)
    close([row.error for row in rows], np.where(known == 0, np.nan, known))
    assert [row.status for row in rows] == ["fixed" if e == 0 else "" for e in known]
    total = lambda fn, t: t.propagate(fn, batch)[1]
    mixed = lambda x: jnp.sum(x * jnp.arange(1, 1 + x.size, dtype=dtype).reshape(x.shape))
    close(
        total(lambda m: mixed(m["a"]["x"]) + m["b"][0], result.trainer),
        total(lambda m: mixed(forward(m["a"]["x"])) + m["b"][0], other.trainer),
    )


def test_correlations_are_those_of_the_elements():
    trainer, _, batch = pair("a simplex")
    at = trainer.solve(LM, batch).trainer
    correlations = {(c.first, c.second): c.value for c in at.report(batch).correlations}
    names = [f"a.x[{i}]" for i in range(3)]
    error = at.standard_errors(batch)["a"]["x"]
    # Fractions that sum to one: the variance of their sum is zero.
    covariance = np.diag(np.square(error))
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            if i < j:
                value = correlations.get((first, second), correlations.get((second, first)))
                covariance[i, j] = covariance[j, i] = value * error[i] * error[j]
    np.testing.assert_allclose(covariance.sum(axis=0), 0, atol=1e-9)


@pytest.mark.parametrize("is_whitened", [False, True])
def test_n_and_m_steps_are_n_plus_m(is_whitened, tmp_path):
    trainer, _, batch = pair("a simplex", optax.adam(0.02))
    if is_whitened:
        trainer = trainer.whiten(batch, optimiser=optax.adam(0.1))
    whole = trainer.fit(batch, 50, progress=False).trainer
    part = trainer.fit(batch, 30, progress=False).trainer
    same_bits(part.fit(batch, 20, progress=False).trainer, whole)
    vn.save(tmp_path / "part", part)
    loaded = vn.load(tmp_path / "part", trainer)
    same_bits(loaded.fit(batch, 20, progress=False).trainer, whole)
    same_bits(vn.unroll(part, batch, 20)[0].model, whole.model)


@pytest.mark.parametrize("name", ["an array", "a simplex", "a factor"])
def test_whitened_spaces_are_of_the_free_coordinates(name):
    trainer, by_hand, batch = pair(name, optax.adam(0.1))
    expected = trainer.solve(LM, batch).model
    whitened = trainer.whiten(batch, optimiser=optax.adam(0.1))
    same = by_hand.whiten(batch, optimiser=optax.adam(0.1))
    losses = [t.fit(batch, 40, progress=False).history.loss for t in (whitened, same)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    for solver in (LM, optx.BFGS(1e-9, 1e-9)):
        found = whitened.solve(solver, batch)
        assert found.stop_reason is vn.StopReason.CONVERGED
        close = np.testing.assert_allclose
        close(found.model["a"]["x"], expected["a"]["x"], rtol=1e-5, atol=1e-7)


def test_beside_intervals_and_whitened_the_fit_ends_at_the_best_point_within():
    bijection, start, truth = BIJECTIONS["a simplex"]
    batch = batch_of(truth)
    bounds = {"a.x": bijection, "b.0": (None, 0.1)}
    trainer = Fit(model(start), bounds=bounds)
    solved = trainer.solve(LM, batch)
    assert float(solved.model["b"][0]) == 0.1
    rate = optax.cosine_decay_schedule(2.0, 600)
    whitened = trainer.whiten(batch, optimiser=optax.adam(rate))
    fit = whitened.fit(batch, 600, progress=False)
    assert float(fit.model["b"][0]) == 0.1
    close = np.testing.assert_allclose
    close(fit.model["a"]["x"], solved.model["a"]["x"], atol=1e-5)
    row = solved.report(batch)["b.0"]
    assert row.status == "at its bound (0.1)"
    assert solved.report(batch).free_count == 2
    models = solved.trainer.draw(jax.random.key(0), 100, batch)
    close(models["a"]["x"].sum(axis=1), 1, rtol=1e-12)
    assert np.all(models["b"][0] == 0.1)

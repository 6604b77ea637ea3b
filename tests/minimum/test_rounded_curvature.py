"""Second derivatives of which rounding decides the sign, far out in a tail."""

import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax.scipy.special import gammaln
from jax.scipy.stats import t as student

import vernal as vn

NORMAL = np.random.default_rng(0).normal(size=200)
COUNTS = np.random.default_rng(0).binomial(40, 0.3, 200)  # less scatter than Poisson
MEAN, LOG_STD = NORMAL.mean(), np.log(NORMAL.std())


class Student(vn.Trainer):
    def nll(self, model, batch):
        tail, scale = jnp.exp(model["log_tail"]), jnp.exp(model["log_scale"])
        return -jnp.sum(student.logpdf(batch, tail, model["mean"], scale))


class Dispersed(vn.Trainer):
    """The negative binomial distribution, that of Poisson if its size is infinite."""

    def nll(self, model, batch):
        mean, size = jnp.exp(model["log_mean"]), jnp.exp(model["log_size"])
        constant = gammaln(batch + size) - gammaln(size) - gammaln(batch + 1)
        shares = batch * jnp.log(mean / (mean + size))
        return -jnp.sum(constant + shares - size * jnp.log1p(mean / size))


def student_at(log_tail, dtype=float):
    model = {"mean": MEAN, "log_scale": LOG_STD, "log_tail": log_tail}
    trainer = Student({k: jnp.asarray(v, dtype) for k, v in model.items()})
    return trainer, jnp.asarray(NORMAL, dtype)


@pytest.mark.parametrize("log_tail", [17.42, 19.0, 21.6, 24.0, 29.5, 37.5, 112.0])
@pytest.mark.parametrize("shift", [0.0, 1e-9, 3e-9])
def test_the_tail_of_normal_data_has_no_error(log_tail, shift):
    trainer, batch = student_at(log_tail + shift)
    errors = trainer.standard_errors(batch)
    # Rounding may also make it seem curved upwards.
    assert errors["log_tail"] > 10
    right = NORMAL.std() / np.sqrt(len(NORMAL)), 1 / np.sqrt(2 * len(NORMAL))
    found = errors["mean"], errors["log_scale"]
    np.testing.assert_allclose(found, right, rtol=1e-3)


def test_a_table_says_unconstrained():
    (trainer, batch), lines = student_at(112.0), []
    for method in (trainer.table, lambda batch: str(trainer.report(batch))):
        (line,) = [x for x in method(batch).splitlines() if x.startswith("log_tail")]
        lines.append(line)
    assert all("112" in line and line.endswith("unconstrained") for line in lines)
    assert trainer.whiten(batch).projector.null_space()


@pytest.mark.parametrize("log_tail", [9.5, 12.0, 17.0])
def test_in_single_precision(log_tail):
    trainer, batch = student_at(log_tail, np.float32)
    errors = trainer.standard_errors(batch)
    assert errors["log_tail"] > 1
    np.testing.assert_allclose(errors["mean"], NORMAL.std() / np.sqrt(200), rtol=0.01)


@pytest.mark.parametrize(("kind", "log_tail"), [(optx.LBFGS, 9.2), (optx.BFGS, 16.5)])
def test_a_solve_ends_at_the_minimum(kind, log_tail):
    trainer, batch = student_at(log_tail)
    result = trainer.solve(kind(1e-8, 1e-8), batch)
    assert result.stop_reason is vn.StopReason.CONVERGED
    np.testing.assert_allclose(result.model["mean"], MEAN, atol=1e-3)
    assert result.trainer.standard_errors(batch)["log_tail"] > 10


@pytest.mark.parametrize("log_size", [20.0, 24.0, 30.0])
def test_the_size_of_counts_without_more_scatter(log_size):
    model = {"log_mean": np.log(COUNTS.mean()), "log_size": log_size}
    trainer = Dispersed({k: jnp.asarray(v) for k, v in model.items()})
    errors = trainer.standard_errors(jnp.asarray(COUNTS, float))
    assert errors["log_size"] > 10
    right = 1 / np.sqrt(COUNTS.sum())
    np.testing.assert_allclose(errors["log_mean"], right, rtol=1e-3)


class Product(vn.Trainer):
    """Its Hessian is zero on the diagonal, and a saddle."""

    def nll(self, model, batch):
        return batch * model["a"] * model["b"] + 0.5 * model["c"] ** 2


class Hill(vn.Trainer):
    """Its top is far away, as a date is."""

    def nll(self, model, batch):
        return jnp.cos(batch * (model["a"] - 2459000)) + 0.5 * model["c"] ** 2


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        (Product, {"a": 0.0, "b": 0.0}),
        (Product, {"a": 0.3, "b": -0.2}),
        (Hill, {"a": 2459000.0}),
        (Hill, {"a": 2459000.0 + 1e-4}),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_saddle_is_one_still(kind, model, scale):
    trainer = kind({k: jnp.asarray(v) for k, v in (model | {"c": 0.0}).items()})
    with pytest.raises(ValueError, match="indefinite"):
        trainer.standard_errors(jnp.asarray(scale))

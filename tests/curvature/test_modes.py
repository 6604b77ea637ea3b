"""Derivatives in the mode that is possible, forward or reverse."""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vernal as vn

X = jnp.linspace(0.1, 1.0, 6)


def start():
    return {"rate": jnp.asarray(0.7), "nested": {"height": jnp.asarray(1.5)}}


def either(model, x):
    return model["nested"]["height"] * jnp.exp(-model["rate"] * x)


def looped(model, x):
    """The series of an exponential, by a loop whose length is not known."""

    def body(carry):
        k, term, total = carry
        term = -term * model["rate"] * x / k
        return k + 1, term, total + term

    def goes_on(carry):
        return jnp.any(abs(carry[1]) > 1e-14)

    one = jnp.ones_like(x)
    _, _, total = jax.lax.while_loop(goes_on, body, (1.0, one, one))
    return model["nested"]["height"] * total


@jax.custom_vjp
def exponential(rate, x):
    return jnp.exp(-rate * x)


def _forward(rate, x):
    return jnp.exp(-rate * x), (rate, x)


def _backward(kept, cotangent):
    rate, x = kept
    return jnp.sum(-x * jnp.exp(-rate * x) * cotangent), jnp.zeros_like(x)


exponential.defvjp(_forward, _backward)


def customised(model, x):
    return model["nested"]["height"] * exponential(model["rate"], x)


class Decay(vn.Trainer):
    curve: str = eqx.field(static=True)

    def __init__(self, curve, *args, **options):
        self.curve = curve
        super().__init__(*args, **options)

    def residuals(self, model, batch):
        x, y = batch
        return (CURVES[self.curve](model, x) - y) / 0.1


class Likelihood(Decay):
    """The same, by its `nll` and a mean of its own."""

    residuals = None

    def nll(self, model, batch):
        x, y = batch
        return 0.5 * jnp.sum(((CURVES[self.curve](model, x) - y) / 0.1) ** 2)


def solved(adjoint):
    def curve(model, x):
        term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
        solution = diffrax.diffeqsolve(
            term,
            diffrax.Euler(),  # the smallest program that there is
            t0=0.0,
            t1=1.0,
            dt0=0.005,
            y0=model["nested"]["height"],
            args=model["rate"],
            saveat=diffrax.SaveAt(ts=x),
            adjoint=adjoint,
            max_steps=256,
        )
        return solution.ys

    return curve


CURVES = {
    "either": either,
    "while_loop": looped,
    "custom_vjp": customised,
    "RecursiveCheckpointAdjoint": solved(diffrax.RecursiveCheckpointAdjoint()),
    "DirectAdjoint": solved(diffrax.DirectAdjoint()),
    "ForwardMode": solved(diffrax.ForwardMode()),
}
ONE_WAY = {
    "while_loop": "fwd",
    "ForwardMode": "fwd",
    "custom_vjp": "bwd",
    "RecursiveCheckpointAdjoint": "bwd",
}


def data():
    return X, either(start(), X) + 0.05 * jnp.cos(9 * X)


def expected_jacobian():
    model = start()
    decay = jnp.exp(-model["rate"] * X)
    columns = [decay, -X * model["nested"]["height"] * decay]
    return np.stack(columns, axis=1) / 0.1


# That of the solver.
TOLERANCE = {"rtol": 1e-2}


@pytest.fixture(autouse=True)
def untold():
    """Warnings of the mode are tested by themselves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be differentiated")
        yield


@pytest.mark.parametrize("curve", CURVES)
def test_residuals_are_differentiated_in_the_mode_that_is_possible(curve):
    trainer, jac = Decay(curve, start()), expected_jacobian()
    np.testing.assert_allclose(trainer.fisher(data()), jac.T @ jac, **TOLERANCE)
    if curve.endswith(("Adjoint", "Mode")):
        return  # each leaves a mode, in which all is as for those above
    white = trainer.whiten(data())
    part = np.asarray(white.projector.matrix)
    np.testing.assert_allclose(part.T @ jac.T @ jac @ part, np.eye(2), atol=1e-2)
    errors = jax.tree.leaves(trainer.standard_errors(data()))
    expected = np.sqrt(np.diag(np.linalg.inv(jac.T @ jac)))
    np.testing.assert_allclose(errors, expected, **TOLERANCE)


@pytest.mark.parametrize("curve", ["while_loop", "custom_vjp", "either"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_some_at_a_time(curve, batch_size):
    trainer, jac = Decay(curve, start()), expected_jacobian()
    found = trainer.fisher(data(), batch_size=batch_size)
    np.testing.assert_allclose(found, jac.T @ jac, rtol=1e-10)
    part = trainer.whiten(data(), batch_size=batch_size).projector.matrix
    np.testing.assert_allclose(part.T @ jac.T @ jac @ part, np.eye(2), atol=1e-10)


@pytest.mark.parametrize("curve", ["while_loop", "custom_vjp"])
def test_hessians(curve):
    expected = Likelihood("either", start()).fisher(data())
    found = Likelihood(curve, start())
    np.testing.assert_allclose(found.fisher(data()), expected, rtol=1e-9)
    np.testing.assert_allclose(found.curvature(data()), expected, rtol=1e-9)
    np.testing.assert_allclose(
        found.whiten(data()).projector.eigenvalues,
        Likelihood("either", start()).whiten(data()).projector.eigenvalues,
        rtol=1e-8,
    )


@pytest.mark.parametrize("curve", ["while_loop", "custom_vjp"])
def test_tables_and_samplers(curve):
    trainer, plain = Decay(curve, start()), Decay("either", start())
    assert trainer.table(data()) == plain.table(data())
    (potential, point), (expected, _) = (
        t.whiten(data()).objective(data()) for t in (trainer, plain)
    )
    np.testing.assert_allclose(potential(point), expected(point), rtol=1e-12)


@pytest.mark.seams
@pytest.mark.parametrize("curve", ["while_loop", "custom_vjp"])
def test_functions(curve):
    residuals = lambda model: CURVES[curve](model, X)
    plain = lambda model: either(model, X)
    square = lambda fn: lambda model: 0.5 * jnp.sum(fn(model) ** 2)
    for of, wrap in (
        (vn.jacobian, lambda fn: fn),
        (vn.gauss_newton, lambda fn: fn),
        (vn.hessian, square),
    ):
        found, expected = of(wrap(residuals), start()), of(wrap(plain), start())
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        asked = of(wrap(residuals), start(), jac=ONE_WAY[curve])
        np.testing.assert_allclose(asked, expected, rtol=1e-9, atol=1e-12)


def test_products():
    """Of a `custom_vjp` the reverse mode is linear, and its transpose is the other."""
    square = lambda curve: lambda m: 0.5 * jnp.sum(CURVES[curve](m, X) ** 2)
    residuals = lambda curve: lambda m: CURVES[curve](m, X)
    for curve, of, fn in (
        ("custom_vjp", vn.gauss_newton_matvec, residuals),
        ("custom_vjp", vn.hessian_matvec, square),
        ("while_loop", vn.hessian_matvec, square),
    ):
        found, expected = (of(fn(c), start())(start()) for c in (curve, "either"))
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)
    with pytest.raises(TypeError, match="`gauss_newton_matvec` needs both"):
        vn.gauss_newton_matvec(residuals("while_loop"), start())(start())


@pytest.mark.own_words
@pytest.mark.parametrize("curve", ["while_loop", "custom_vjp"])
def test_the_other_mode_is_refused_by_name(curve):
    trainer = Decay(curve, start())
    other = {"fwd": "bwd", "bwd": "fwd"}[ONE_WAY[curve]]
    match = f'(?s)`residuals` of `Decay`.*`jac="{other}"`.*JAX says.*adjoint'
    calls = (trainer.fisher, trainer.whiten, trainer.standard_errors, trainer.table)
    for call in calls:
        with pytest.raises(TypeError, match=match):
            call(data(), jac=other)
    with pytest.raises(ValueError, match="`jac` is 'forward'"):
        trainer.fisher(data(), jac="forward")


def test_neither_mode_is_an_error_with_a_remedy():
    class Neither(vn.Trainer):
        def residuals(self, model, batch):
            return looped(model, X) + customised(model, X)

    with pytest.raises(TypeError, match=r"`residuals` of `Neither`.*DirectAdjoint"):
        Neither(start()).fisher(None)


def test_an_error_of_the_model_stays_what_it_is():
    class Wrong(vn.Trainer):
        def residuals(self, model, batch):
            raise RuntimeError("no such star")

    with pytest.raises(RuntimeError, match="no such star"):
        Wrong(start()).fisher(None)


def test_it_is_told_once():
    # Under other filters each warning is given again: one context for all of it.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _require_told_once(caught)


def _require_told_once(caught):
    def told(call):
        caught.clear()
        call()
        return [str(w.message) for w in caught]

    class Custom(vn.Trainer):
        def residuals(self, model, batch):
            return customised(model, batch)

    class Loop(vn.Trainer):
        def nll(self, model, batch):
            return jnp.sum(looped(model, batch) ** 2)

    (said,) = told(lambda: Custom(start()).fisher(X))
    assert "`residuals` of `Custom`" in said
    assert "a pass for each datum" in said
    assert 'jac="bwd"' in said
    assert told(lambda: Custom(start()).whiten(X[:4])) == []
    (said,) = told(lambda: Loop(start()).fisher(X))
    assert "a pass for each parameter" in said
    # What was asked for is not told, nor is what is as good.
    assert told(lambda: Decay("custom_vjp", start()).fisher(data(), jac="bwd")) == []
    assert told(lambda: Decay("while_loop", start()).fisher(data())) == []


def test_a_residual_function_is_called_once():
    calls = 0

    class Counted(vn.Trainer):
        def residuals(self, model, batch):
            nonlocal calls
            calls += 1
            return customised(model, batch)

    Counted(start()).fisher(X)
    Counted(start()).whiten(X)
    assert calls == 1

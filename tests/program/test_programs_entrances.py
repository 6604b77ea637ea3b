"""Whatever is called, it follows the code: and compiles no more than it must."""

import functools as ft

import jax
import jax.numpy as jnp
import optax
import optimistix as optx
import pytest

import vernal as vn
from notebook import MODEL, Notebook, X, fisher

LM = optx.LevenbergMarquardt(rtol=1e-6, atol=1e-6)


def at(steps, s):
    """The parameter after so many steps of `sgd(0.01)`, with the factor `s`."""
    return (6 + (s - 6) * (1 - 0.05 * s**2) ** steps) / s


def loss_at(steps, s):
    return 2.5 * (s * at(steps, s) - 6) ** 2


def curvature(s):
    return 5 * s**2


def error(s):
    return curvature(s) ** -0.5


def solution(s):
    return 6 / s


def function_fit(t):
    loss = lambda m, x: 0.5 * jnp.sum(t.residuals(m, x) ** 2)
    return vn.fit(loss, t.model, optax.sgd(0.01), X, 60)


# What is called, and what it returns at a factor.
ENTRANCES = {
    "fit": (lambda t: t.fit(X, 60).model.w, ft.partial(at, 60)),
    "fit in chunks": (lambda t: t.fit(X, 60, chunk=20).model.w, ft.partial(at, 60)),
    "fit of a stream": (
        lambda t: t.fit(vn.Stream([X] * 9), 9).model.w,
        ft.partial(at, 9),
    ),
    "step": (lambda t: t.step(X)[0].params.w, ft.partial(at, 1)),
    "step under jit": (
        lambda t: jax.jit(lambda t: t.step(X)[1].loss)(t),
        ft.partial(loss_at, 0),
    ),
    "solve": (lambda t: t.solve(LM, X).model.w, solution),
    "fisher": (fisher, curvature),
    "curvature": (lambda t: t.curvature(X)[0, 0], curvature),
    "whiten": (lambda t: t.whiten(X).projector.standard_errors().w, error),
    "table": (
        lambda t: float(t.table(X).splitlines()[2].split()[-1]),
        lambda s: round(error(s), 2),
    ),
    "objective": (
        lambda t: (lambda fn, u: fn(u))(*t.objective(X)),
        ft.partial(loss_at, 0),
    ),
    "unroll": (lambda t: vn.unroll(t, X, 3)[1][-1], ft.partial(loss_at, 2)),
    "fit_many": (
        lambda t: vn.fit_many([t, t], X, 60).trainer(0).model.w,
        ft.partial(at, 60),
    ),
    "fit_many with a solver": (
        lambda t: vn.fit_many([t, t], X, 60, solver=LM).trainer(0).model.w,
        solution,
    ),
    "a function": (lambda t: function_fit(t).model.w, ft.partial(at, 60)),
    "hessian": (lambda t: vn.hessian(t.loss_of, t.params)[0, 0], curvature),
    "gauss_newton": (
        lambda t: vn.gauss_newton(t.residuals_of, t.params)[0, 0],
        curvature,
    ),
    "hessian_matvec": (
        lambda t: vn.hessian_matvec(t.loss_of, t.params)(t.params).w,
        curvature,
    ),
    "gauss_newton_matvec": (
        lambda t: vn.gauss_newton_matvec(t.residuals_of, t.params)(t.params).w,
        curvature,
    ),
}

OF_PARAMS = """
class T(T):
    def loss_of(self, params):
        return 0.5 * jnp.sum(self.residuals_of(params) ** 2)
    def residuals_of(self, params):
        return self.residuals(params, jnp.arange(3.0))
"""


@pytest.fixture(scope="module")
def book():
    """One for all: what several entrances call is compiled once for each factor."""
    return Notebook(MODEL.format("SCALE"), OF_PARAMS)


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance(entrance, book):
    call, expected = ENTRANCES[entrance]
    book.run("SCALE = 1.0")
    trainer = book["trainer"]()
    assert call(trainer) == pytest.approx(expected(1.0), rel=1e-4)
    count = len(book["traces"])
    assert call(trainer) == pytest.approx(expected(1.0), rel=1e-4)
    # What a user compiles around vernal is another function each time here.
    is_anew = entrance in ("step under jit", "objective")
    assert len(book["traces"]) == count or is_anew
    book.run("SCALE = 2.0")
    assert call(trainer) == pytest.approx(expected(2.0), rel=1e-4)
    # The program of before is still there.
    book.run("SCALE = 1.0")
    count = len(book["traces"])
    assert call(trainer) == pytest.approx(expected(1.0), rel=1e-4)
    assert len(book["traces"]) == count or is_anew

"""Losses that fall without end, as by a wrong sign: `explain` and errors say so."""

import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import vernal as vn
from inside import diagnosed

X = jnp.asarray(np.linspace(1.0, 2.0, 20))
HINT = "it has no lowest value: check its sign, and whether a term is missing"


class Fit(vn.Trainer):
    """By its sign it has a minimum, or none."""

    def nll(self, model, batch):
        sign, power = model["constants"]
        apart = jnp.abs(model["a"] * batch - 1) ** power
        return sign * jnp.sum(apart) / 2


def fit_of(sign, power):
    constants = jnp.array([sign, power])
    return Fit({"a": jnp.array(1.5), "constants": constants}, train="a")


SOLVER = optx.GradientDescent(1e-3, rtol=1e-12, atol=1e-12)


# The sign, the power, the steps, and whether the loss falls as if without end.
@pytest.mark.parametrize(
    ("sign", "power", "steps", "falls"),
    [
        (-1.0, 2.0, 40, True),
        (-1.0, 1.0, 40, True),
        (-1.0, 2.0, 8, False),
        (1.0, 2.0, 40, False),
        (1.0, 2.0, 2_000, False),
    ],
)
def test_a_solve_says_so(sign, power, steps, falls):
    result = fit_of(sign, power).solve(SOLVER, X, max_steps=steps)
    told = result.explain()
    assert (f"perhaps {HINT}" in told) == falls
    if falls:
        assert f"to {float(result.history.loss[-1]):.6g} in the last 10 steps" in told


def test_it_is_said_of_the_member_of_many_whose_loss_does():
    both = [fit_of(sign, 2.0) for sign in (-1.0, 1.0)]
    many = vn.fit_many(both, X, 40, solver=SOLVER)
    assert [f"perhaps {HINT}" in many.explain(i) for i in range(2)] == [True, False]


class Log(vn.Trainer):
    def nll(self, model, batch):
        return jnp.sum(jnp.log(model["a"] * batch))


class Steep(vn.Trainer):
    """Is finite, and so is its slope, where its curvature is not."""

    def nll(self, model, batch):
        return -batch * jnp.abs(model["a"]) ** 1.5


def test_minus_infinity_is_named():
    trainer = Log({"a": jnp.array(0.0)})
    assert "`nll` is minus infinity: check its sign." in str(diagnosed(trainer, X))


def test_a_fit_that_fell_to_it_says_so():
    trainer = Log({"a": jnp.array(1.0)}, bounds={"a": (0, None)})
    with pytest.warns(UserWarning, match="minus infinity"):
        result = trainer.solve(optx.BFGS(1e-8, 1e-8), X, max_steps=99)
    assert f"The loss fell to minus infinity: {HINT}" in result.explain()


def test_an_error_of_second_derivatives_asks_for_the_sign():
    trainer = Steep({"a": jnp.array(0.0)})
    words = r"its gradient are finite\. Only its second .* check its sign"
    with pytest.raises(ValueError, match=words):
        trainer.standard_errors(1.0)

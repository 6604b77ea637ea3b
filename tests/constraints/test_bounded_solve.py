"""Solvers with bounds: the optimum of SciPy, and the same elements on their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize

import vernal as vn
from bounded import PROBLEMS

# Whose minimum within the bounds is flat, so that only the loss can be compared.
FLAT = {"penalty", "brown almost linear", "watson, 12"}
# From some starts another local minimum is found, as by SciPy from others.
SEVERAL = {"wood", "kowalik and osborne"}

SOLVERS = {
    "LevenbergMarquardt": optx.LevenbergMarquardt(1e-10, 1e-10),
    "BFGS": optx.BFGS(1e-10, 1e-10),
}


class Fit(vn.Trainer):
    problem: object

    def __init__(self, problem, start):
        self.problem = problem.residuals
        super().__init__(
            jnp.asarray(start, float), bounds={"": (problem.low, problem.high)}
        )

    def residuals(self, model, batch):
        return self.problem(model)


def starts(problem):
    """Inside, close to the bounds, and on them."""
    low, high = np.array(problem.low, float), np.array(problem.high, float)
    given = np.array(problem.start)
    width = np.where(np.isfinite(high - low), high - low, 1.0)
    near = np.where(np.isfinite(low), low + 1e-6 * width, given)
    on = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high, given))
    return {"inside": given, "near": near, "on": on}


def by_scipy(problem, starts):
    """The local minima that SciPy finds, from all of the starts."""
    low, high = np.array(problem.low, float), np.array(problem.high, float)
    fn, jac = jax.jit(problem.residuals), jax.jit(jax.jacfwd(problem.residuals))
    width = np.where(np.isfinite(high - low), high - low, 1.0)
    found = []
    for start in starts:
        inside = np.clip(start, low + 1e-10 * width, high - 1e-10 * width)
        with np.errstate(all="ignore"):
            found.append(
                scipy.optimize.least_squares(
                    lambda x: np.asarray(fn(x)),
                    inside,
                    lambda x: np.asarray(jac(x)),
                    bounds=(low, high),
                    **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
                    max_nfev=5000,
                )
            )
    return found


def on_bound(x, problem):
    """Which elements are on their lower, and on their upper bounds."""
    low, high = np.array(problem.low, float), np.array(problem.high, float)
    scale = 1e-7 * np.maximum(np.abs(x), 1e-3)
    return np.stack([x - low < scale, high - x < scale])


def is_minimum(problem, x):
    """Whether the gradient is zero, or points out of the bounds."""
    at_low, at_high = on_bound(x, problem)
    residuals, jac = problem.residuals(x), jax.jacfwd(problem.residuals)(x)
    slope = np.asarray(jac.T @ residuals)
    free = jac[:, ~(at_low | at_high)]
    along = np.linalg.lstsq(free, residuals, rcond=None)[0]
    could_fall = 0.5 * np.sum(np.square(free @ along))
    is_pushed = np.all(slope[at_low] > 0) and np.all(slope[at_high] < 0)
    return is_pushed and could_fall < 1e-10 * np.sum(np.square(residuals))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_solvers_end_where_scipy_does(name, solver):
    problem = PROBLEMS[name]
    own = starts(problem)
    known = by_scipy(problem, own.values())
    costs = np.array([end.cost for end in known])
    for where, start in own.items():
        result = Fit(problem, start).solve(SOLVERS[solver], 0.0, max_steps=4000)
        x, cost = np.asarray(result.model), float(result.trainer.best_loss)
        assert np.all((x >= problem.low) & (x <= problem.high)), where
        close = np.abs(cost - costs) <= 1e-6 * costs + 1e-12
        is_best = cost <= costs.min() * (1 + 1e-6) + 1e-12
        is_local = name in SEVERAL and is_minimum(problem, x)
        assert is_best or is_local, (where, cost, costs)
        if close.any() and name not in FLAT:
            end = known[int(np.argmax(close))]
            np.testing.assert_array_equal(
                on_bound(x, problem), on_bound(end.x, problem), err_msg=where
            )

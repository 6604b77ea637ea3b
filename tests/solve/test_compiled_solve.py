"""What `whiten` and `solve` compile: a model is compiled as often as must be."""

import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

import vernal as vn
from inside import cache_size
from vernal._inference.derivatives import run_derive
from vernal._solve.problem import Problem, Start, checked_solver, run
from vernal._step import stripped

SOLVERS = {
    "LevenbergMarquardt": optx.LevenbergMarquardt(1e-8, 1e-8),
    "Dogleg": optx.Dogleg(1e-8, 1e-8),
    "BFGS": optx.BFGS(1e-8, 1e-8),
    "LBFGS": optx.LBFGS(1e-8, 1e-8),
}
DATA = jnp.linspace(0.5, 2.0, 7)


class Roots(vn.Trainer):
    """Each evaluation takes one cube root, which its derivatives use too."""

    def residuals(self, model, batch):
        return jnp.cbrt(model["scale"] * batch + model["shift"]) - batch


def trainer():
    return Roots({"scale": jnp.array(1.5), "shift": jnp.array(0.2)})


@pytest.mark.parametrize("name", SOLVERS)
def test_the_solver_s_program_has_the_model_once(name):
    whitened, goal = trainer().whiten(DATA), jnp.asarray(10, "int32")
    encoded, rows = checked_solver(SOLVERS[name], 10, "max_steps")
    problem = Problem(DATA, encoded, rows, None, is_shared=True)
    args = stripped(whitened), whitened.projector, Start.of(whitened), problem, goal
    assert run.lower(*args).as_text().count("stablehlo.cbrt") == 1


def test_whitening_and_the_distance_share_a_jacobian():
    whitened = trainer().whiten(DATA)
    compiled = cache_size(run_derive)
    result = whitened.solve(SOLVERS["LevenbergMarquardt"], DATA)
    result.trainer.standard_errors(DATA)
    assert cache_size(run_derive) == compiled
    assert result.stop_reason is vn.StopReason.CONVERGED


def test_whitening_compiles_few_programs():
    compiled = []
    count = lambda event, *_, **__: compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        trainer().whiten(jnp.linspace(0.5, 2.0, 11))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    name = "/jax/core/compile/backend_compile_duration"
    # The Jacobian, its decomposition, the space, and what checks and joins arrays.
    assert compiled.count(name) <= 14

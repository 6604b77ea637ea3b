"""`whiten` and `solve` against Optimistix called by hand, and against zodiax with it.

The telescope is that of the example; the star, where a step is so short that all
around it shows, that of `bench_fit`. By hand the projected function and the call of
Optimistix are one jitted function: it neither keeps the losses nor the best point,
which `solve` does.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import zodiax as zdx

import vernal as vn

from . import bench_fit

ROUNDS = 9
SOLVERS = {
    "LevenbergMarquardt": optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8),
    "BFGS": optx.BFGS(rtol=1e-8, atol=1e-8),
    "LBFGS": optx.LBFGS(rtol=1e-8, atol=1e-8),
}


def telescope() -> tuple[vn.Trainer, Any]:
    """The example's trainer at the example's start, and its images."""
    path = Path(__file__).parents[2] / "examples/telescope.py"
    spec = importlib.util.spec_from_file_location("telescope", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    truth, batch = example.observe(seed=0)
    return example.Fit(example.guess(truth), train=example.PARAMETERS), batch


def star() -> tuple[vn.Trainer, Any]:
    """The light curve of a pulsating star, of 500 points."""
    model, batch = bench_fit.problem("star", 500)
    return bench_fit.ChiSquared(model), batch


def by_vernal(trainer: Any, solver: Any) -> Callable[[Any], tuple[Any, int]]:
    def run(batch: Any) -> tuple[Any, int]:
        result = trainer.solve(solver, batch)
        return result.trainer.params, len(result.history)

    return run


def by_hand(trainer: Any, solver: Any) -> Callable[[Any], tuple[Any, int]]:
    to_params = trainer.projector.to_params
    frozen = trainer.model
    start = trainer.latent
    params, static = eqx.partition(frozen, _trained(trainer))

    def residuals(latent: Any, batch: Any) -> jax.Array:
        model = eqx.combine(to_params(latent), static)
        return trainer.residuals(model, batch)

    def loss(latent: Any, batch: Any) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(residuals(latent, batch)))

    @jax.jit
    def solve(start: Any, batch: Any) -> tuple[Any, jax.Array]:
        if isinstance(solver, optx.AbstractMinimiser):
            ended = optx.minimise(loss, solver, start, batch, throw=False)
        else:
            ended = optx.least_squares(residuals, solver, start, batch, throw=False)
        return to_params(ended.value), ended.stats["num_steps"]

    def run(batch: Any) -> tuple[Any, int]:
        params, steps = solve(start, batch)
        return jax.block_until_ready(params), int(steps)

    return run

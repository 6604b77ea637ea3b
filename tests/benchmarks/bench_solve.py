"""`solve` against Optimistix, called by hand on the same projected function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optimistix as optx

from vernal._fit.arrival import _measure
from vernal._minimum.edm import distance_of
from vernal._step import stripped

from .bench_fit import ChiSquared, problem
from .timing import in_turns

SOLVERS: dict[str, Callable[..., Any]] = {
    "LevenbergMarquardt": optx.LevenbergMarquardt,
    "BFGS": optx.BFGS,
}


def sides(name: str, points: int) -> dict[str, Callable[[], Any]]:
    """Returns the two ways, which take as many steps."""
    model, batch = problem("star", points)
    trainer = ChiSquared(model).whiten(batch)
    projector, solver = trainer.projector, SOLVERS[name](rtol=1e-8, atol=1e-8)
    assert projector is not None

    def residuals(latent: Any, batch: Any) -> jax.Array:
        x, y, sigma = batch
        return (projector.to_params(latent)(x) - y) / sigma

    def loss(latent: Any, batch: Any) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(residuals(latent, batch)))

    is_minimiser = isinstance(solver, optx.AbstractMinimiser)
    function = loss if is_minimiser else residuals
    of = optx.minimise if is_minimiser else optx.least_squares
    by_hand = lambda: of(function, solver, trainer.latent, batch, throw=False)
    by_vernal = lambda: trainer.solve(solver, batch)
    steps = by_hand().stats["num_steps"], len(by_vernal().history)
    assert steps[0] == steps[1], f"{name} takes {steps} steps"
    return {
        "hand": lambda: projector.to_params(by_hand().value),
        "vernal": lambda: by_vernal().trainer.params,
    }


def distance(points: int) -> dict[str, Callable[[], Any]]:
    """Returns the distance to the minimum by itself, and a whole solve."""
    model, batch = problem("star", points)
    trainer = ChiSquared(model).whiten(batch)
    bare, zero = stripped(trainer), jnp.zeros(())
    solver = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    return {
        "edm": lambda: distance_of(_measure(bare, None, batch, "residuals", zero)),
        "solve": lambda: trainer.solve(solver, batch).trainer.params,
    }


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio, bound."""
    table = []
    for name in SOLVERS:
        for points in (500, 20_000):
            runs = in_turns(sides(name, points), rounds=30)
            best = {side: min(times) for side, times in runs.items()}
            what = (
                f"`solve`, {name} on the light curve, {points:,} points, against "
                f"Optimistix by hand ({best['hand'] * 1e3:.1f} ms)"
            )
            table.append((what, f"{best['vernal'] / best['hand']:.2f}", "1.10"))
    for points in (500, 20_000):
        runs = in_turns(distance(points), rounds=30)
        best = {side: min(times) for side, times in runs.items()}
        what = (
            f"`edm`, which `solve` ends with, {points:,} points, against the whole of "
            f"`solve` ({best['solve'] * 1e3:.1f} ms)"
        )
        table.append((what, f"{best['edm'] / best['solve']:.2f}", "0.30"))
    return table


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for row in rows():
        print(" | ".join(row), flush=True)

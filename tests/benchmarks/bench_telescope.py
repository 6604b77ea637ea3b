"""The telescope of the examples: `whiten` and `solve`, and the same by hand.

    python -m tests.benchmarks.bench_telescope

prints the rows; with the name of a side it times that side's first call, and its best
later one, which wants a process of its own.
"""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import zodiax.diffops
import zodiax.optimisation
import zodiax.stats
from jax.flatten_util import ravel_pytree

from .timing import in_turns, seconds

EXAMPLE = Path(__file__).parents[2] / "examples" / "telescope.py"


def sides() -> dict[str, Callable[[], Any]]:
    """Levenberg-Marquardt from one start: by Optimistix alone, by it in a space that is
    whitened by hand, and by vernal."""
    example = runpy.run_path(str(EXAMPLE))
    truth, batch = example["observe"](seed=0)
    start, names = example["guess"](truth), example["PARAMETERS"]
    trainer, solver = example["Fit"](start, train=names), example["SOLVER"]
    flat, unravel = ravel_pytree(trainer.params)
    frozen = eqx.tree_at(lambda m: [getattr(m, n) for n in names], start, [None] * 3)

    def residuals(params: Any, args: Any) -> jax.Array:
        frozen, (images, sigma) = args
        return (eqx.combine(params, frozen)() - images) / sigma

    def in_latent(latent: jax.Array, args: Any) -> jax.Array:
        origin, projection, args = args
        return residuals(unravel(origin + projection @ latent), args)

    @eqx.filter_jit
    def projection(flat: jax.Array, args: Any) -> jax.Array:
        jacobian = jax.jacfwd(lambda x: residuals(unravel(x), args).ravel())(flat)
        scale = 1 / jnp.linalg.norm(jacobian, axis=0)
        values, vectors = jnp.linalg.eigh((jacobian * scale).T @ (jacobian * scale))
        return scale[:, None] * vectors / jnp.sqrt(values)

    @eqx.filter_jit
    def solve(fn: Any, start: Any, args: Any) -> Any:
        return optx.least_squares(fn, solver, start, args, throw=False).value

    def whitened() -> Any:
        args = frozen, batch
        space = flat, projection(flat, args), args
        return flat + space[1] @ solve(in_latent, 0 * flat, space)

    return {
        "hand": lambda: solve(residuals, trainer.params, (frozen, batch)),
        "whitened": whitened,
        "vernal": lambda: trainer.whiten(batch).solve(solver, batch).trainer.params,
    }


def in_processes(rounds: int = 3) -> dict[str, tuple[float, float]]:
    """The least time of the first call of each side, and of a later one."""
    times: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(rounds):
        for side in ("hand", "whitened", "vernal"):
            command = [sys.executable, "-m", __spec__.name, side]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            took = tuple(map(float, done.stdout.split()[-2:]))
            times.setdefault(side, []).append(took)
    return {
        side: (min(cold for cold, _ in runs), min(warm for _, warm in runs))
        for side, runs in times.items()
    }


def rows_of_solve() -> list[tuple[str, str, str]]:
    """The rows of the first call, and of later ones, against Optimistix."""
    best = in_processes()
    table = []
    for index, when in enumerate(("the first call, compiled", "warm")):
        hand, whitened, vernal = (run[index] for run in best.values())
        table += [
            (
                f"`whiten` and `solve`, Levenberg–Marquardt, {when}, against "
                f"Optimistix alone from the same start ({hand:.2f} s)",
                f"{vernal / hand:.2f}",
                "1.20",
            ),
            (
                f"the same against Optimistix in a space that is whitened by hand, "
                f"without checks ({whitened:.2f} s)",
                f"{vernal / whitened:.2f}",
                "",
            ),
        ]
    return table


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio, bound."""
    return [*rows_of_solve(), *rows_of_zodiax()]


def rows_of_zodiax() -> list[tuple[str, str, str]]:
    """The row against zodiax, with its own functions."""
    example = runpy.run_path(str(EXAMPLE))
    truth, batch = example["observe"](seed=0)
    start, names = example["guess"](truth), example["PARAMETERS"]
    trainer = example["Fit"](start, train=names)
    solver = optx.LBFGS(rtol=1e-6, atol=1e-6)
    flat, unravel = ravel_pytree(trainer.params)
    frozen = eqx.tree_at(lambda m: [getattr(m, n) for n in names], start, [None] * 3)

    def chi(flat: jax.Array) -> jax.Array:
        images, sigma = batch
        return ((eqx.combine(unravel(flat), frozen)() - images) / sigma).ravel()

    def loss(latent: jax.Array, args: Any) -> jax.Array:
        origin, projection = args
        return 0.5 * (chi(origin + projection @ latent) ** 2).sum()

    def with_zodiax() -> Any:
        jacobian, _ = zodiax.diffops.jacobian(chi, cast(Any, flat))
        fisher = zodiax.stats.gauss_hessian(jacobian)
        projection = zodiax.optimisation.eigen_projection(fisher)
        args, latent = (flat, projection), 0 * flat
        solution = optx.minimise(loss, solver, latent, args, throw=False)
        return flat + projection @ solution.value

    def with_vernal() -> Any:
        return trainer.whiten(batch).solve(solver, batch).trainer.params

    pair = ravel_pytree(with_vernal())[0], with_zodiax()
    errors = ravel_pytree(trainer.standard_errors(batch))[0]
    assert np.max(np.abs(pair[0] - pair[1]) / errors) < 0.05, "another minimum"
    runs = in_turns({"zodiax": with_zodiax, "vernal": with_vernal}, rounds=5)
    best = {side: min(times) for side, times in runs.items()}
    what = (
        "`whiten` and `solve`, LBFGS, on the telescope, warm, against zodiax and "
        f"Optimistix by hand ({best['zodiax']:.1f} s)"
    )
    return [(what, f"{best['vernal'] / best['zodiax']:.2f}", "1.00")]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if sys.argv[1:]:
        run = sides()[sys.argv[1]]
        print(seconds(run), min(seconds(run) for _ in range(5)))
    else:
        for row in rows():
            print(" | ".join(row), flush=True)

"""The telescope of the examples: `whiten` and `solve`, and the same with zodiax."""

import runpy
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optimistix as optx
import zodiax.diffops
import zodiax.optimisation
import zodiax.stats
from jax.flatten_util import ravel_pytree

from .timing import in_turns

EXAMPLE = Path(__file__).parents[2] / "examples" / "telescope.py"


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio, bound."""
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
        jacobian, _ = zodiax.diffops.jacobian(chi, flat)
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
    for row in rows():
        print(" | ".join(row), flush=True)

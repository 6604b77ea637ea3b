"""`fit_many` against `jax.vmap` of the scan that one would write by hand.

    python -m tests.benchmarks.bench_many

prints the rows; with an argument it is one side of a measurement that wants a process
of its own.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vernal as vn

from .bench_fit import ChiSquared, problem, rules
from .scan import chi_squared, scan_by_hand
from .timing import in_turns

STEPS = 2_000
STARTS = 64
ROUNDS = 5


def starts(name: str, points: int) -> tuple[list[Any], Any]:
    """Models around the start, and the data that all of them are fitted to."""
    model, batch = problem(name, points)
    draws = np.random.default_rng(1).normal(size=(STARTS, len(vn.paths(model))))
    leaves, structure = jax.tree.flatten(model)
    models = [
        structure.unflatten(
            [x * (1 + 0.01 * d) for x, d in zip(leaves, row, strict=True)]
        )
        for row in draws
    ]
    return models, batch


def by_hand(name: str, points: int) -> Callable[[], np.ndarray]:
    models, batch = starts(name, points)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    _, tx = rules(models[0])
    run = scan_by_hand(chi_squared, tx, STEPS)
    mapped = jax.jit(jax.vmap(run, in_axes=(0, None)))
    return lambda: np.asarray(mapped(stacked, batch)[1]).T


def by_vernal(name: str, points: int) -> Callable[[], np.ndarray]:
    models, batch = starts(name, points)
    optimiser, _ = rules(models[0])
    trainers = [ChiSquared(model, optimiser) for model in models]
    return lambda: vn.fit_many(trainers, batch, STEPS).history.loss


SIDES = {"hand": by_hand, "vernal": by_vernal}


def warm(name: str, points: int) -> tuple[float, float]:
    """The ratio of the two, and the time by hand in seconds."""
    sides = {side: make(name, points) for side, make in SIDES.items()}
    ours, theirs = sides["vernal"](), sides["hand"]()
    np.testing.assert_allclose(ours[:200], theirs[:200], rtol=1e-6)
    best = {side: min(times) for side, times in in_turns(sides, ROUNDS).items()}
    return best["vernal"] / best["hand"], best["hand"]


def _one_side(side: str, name: str, points: int) -> float:
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x).sum())(jnp.ones(3)))
    fit = SIDES[side](name, points)
    start = time.perf_counter()
    fit()
    return time.perf_counter() - start


def first(name: str, points: int) -> tuple[float, float]:
    """The same of the first call in a process, compilation included."""
    runs: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(3):
        for side in SIDES:
            command = [sys.executable, "-m", __spec__.name, side, name, str(points)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    best = {side: min(times) for side, times in runs.items()}
    return best["vernal"] / best["hand"], best["hand"]


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    table = []
    for name, points, bound in ("star", 500, "1.25"), ("line", 500, ""):
        ratio, seconds = warm(name, points)
        what = (
            f"`fit_many`, {STARTS} starts of a {name}, {points} points, {STEPS:,} "
            f"steps, against `jax.vmap` of a scan by hand ({seconds:.1f} s)"
        )
        table.append((what, f"{ratio:.2f}", bound))
        ratio, seconds = first(name, points)
        what = f"the same, first call, compilation included ({seconds:.1f} s)"
        table.append((what, f"{ratio:.2f}", "1.50" if bound else ""))
    return table


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if len(sys.argv) > 1:
        print(json.dumps(_one_side(*sys.argv[1:3], int(sys.argv[3]))))
    else:
        for row in rows():
            print(" | ".join(row), flush=True)

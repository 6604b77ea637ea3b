"""Curvature against the product that one writes by hand; Lanczos against matfree.

    python -m tests.benchmarks.bench_curvature

prints the rows; with the name of a side it measures that side's memory, which wants a
process of its own.
"""

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matfree.decomp import tridiag_sym

import vernal as vn
from vernal._curvature.flat import gauss_newton_matrix
from vernal._curvature.modes import Subject
from vernal._projection.lanczos import ITERATIONS_AFTER, find_leading

from .timing import in_turns

SIZE, RANK, ITERATIONS = 100_000, 40, 120


def images() -> tuple[Any, Any]:
    """Residuals of a chain of matrices: 400 parameters, 4,000 data."""
    rng = np.random.default_rng(0)
    inner = jnp.asarray(rng.normal(size=(600, 400)) / 20)
    outer = jnp.asarray(rng.normal(size=(4_000, 600)) / 24)

    def residuals(params: Any) -> jax.Array:
        return outer @ jnp.tanh(inner @ params["map"])

    return residuals, {"map": jnp.asarray(rng.normal(size=400))}


def gauss_newton() -> dict[str, float]:
    """Medians of a product by hand, and of vernal's."""
    residuals, params = images()

    @jax.jit
    def by_hand(flat: jax.Array) -> jax.Array:
        jacobian = jax.jacfwd(lambda x: residuals({"map": x}))(flat)
        return jacobian.T @ jacobian

    sides = {
        "hand": lambda: by_hand(params["map"]),
        "vernal": lambda: vn.gauss_newton(residuals, params),
    }
    runs = in_turns(sides, rounds=15)
    return {name: statistics.median(times) for name, times in runs.items()}


class Linear(vn.Trainer):
    """Residuals of a design that is the batch."""

    def residuals(self, model: Any, batch: Any) -> jax.Array:
        return batch @ model["map"]


def whitening(size: int = 2_000, data: int = 20_000) -> dict[str, float]:
    """Medians of whitening by J^T J alone, and by vernal: without and with a QR."""
    well = jax.random.normal(jax.random.key(0), (data, size))
    # Two columns that are almost the same have a condition number of 1e9.
    ill = well.at[:, 0].set(well[:, 1] + 1e-9 * well[:, 0])
    trainer = Linear({"map": jnp.zeros(size)})

    def by_fisher() -> Any:
        fisher = trainer.fisher(well)
        return vn.EigenProjector.from_fisher(fisher, trainer.params).matrix

    sides = {
        "fisher": by_fisher,
        "well": lambda: trainer.whiten(well).projector.matrix,
        "ill": lambda: trainer.whiten(ill).projector.matrix,
    }
    runs = in_turns(sides, rounds=3)
    return {name: statistics.median(times) for name, times in runs.items()}


def temporary_megabytes(batch_size: int | None) -> float:
    """What the compiled program needs beside its arguments and its result."""
    residuals, params = images()
    program = jax.jit(
        lambda p: gauss_newton_matrix(residuals, p, batch_size, Subject("`residuals`"))
    )
    analysis: Any = program.lower(params).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 1e6


def field() -> tuple[Any, Any]:
    """A map of 100,000 pixels, seen by 60 detectors of falling sensitivity."""
    key = jax.random.key(0)
    sensitivity = jnp.geomspace(1e3, 1.0, 60)[:, None]
    design = sensitivity * jax.random.normal(key, (60, SIZE)) / SIZE**0.5

    def residuals(params: Any) -> jax.Array:
        return jnp.concatenate([design @ params["map"], 0.1 * params["map"]])

    return residuals, {"map": jnp.zeros(SIZE)}


def from_matvec() -> Any:
    residuals, params = field()
    matvec = vn.gauss_newton_matvec(residuals, params)
    key = jax.random.key(1)
    return vn.EigenProjector.from_matvec(matvec, params, RANK, key=key)


def lanczos() -> dict[str, float]:
    """Medians of vernal's search, and of matfree's decomposition alone.

    With as many iterations: those that `from_matvec` takes here, and in the complement.
    """
    residuals, params = field()
    matvec: Any = vn.gauss_newton_matvec(residuals, params)
    ones, key = jnp.ones(SIZE), jax.random.key(1)
    iterations = ITERATIONS - ITERATIONS_AFTER
    found = find_leading(matvec, params, ones, key, RANK, iterations)
    assert found.is_converged, "`from_matvec` would take more iterations"
    decompose = tridiag_sym(ITERATIONS, reortho="full", custom_vjp=False)

    @jax.jit
    def by_matfree(matvec: Any, start: jax.Array) -> Any:
        decomposition: Any = decompose(matvec.flat(), start)
        return decomposition.Q_tall, decomposition.J_small

    sides = {
        "matfree": lambda: by_matfree(matvec, ones),
        "vernal": lambda: find_leading(matvec, params, ones, key, RANK, iterations),
    }
    runs = in_turns(sides, rounds=5)
    return {name: statistics.median(times) for name, times in runs.items()}


def peak_gigabytes() -> float:
    """The peak of a process that makes the projector, and of nothing else."""
    command = [sys.executable, "-m", __spec__.name, "memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    product, search, white = gauss_newton(), lanczos(), whitening()
    whole, some, few = map(temporary_megabytes, (None, 40, 4))
    return [
        (
            "`gauss_newton`, 400 parameters, 4,000 data, against `jacfwd` by hand",
            f"{product['vernal'] / product['hand']:.2f}",
            "1.10",
        ),
        (
            "its memory with `batch_size` 40 and 4, against the whole "
            f"({whole:.1f} MB)",
            f"{some / whole:.2f}, {few / whole:.2f}",
            "",
        ),
        (
            "`whiten`, D = 2,000, 20,000 data, well-conditioned, against `from_fisher` "
            f"of J^T J ({white['fisher']:.1f} s)",
            f"{white['well'] / white['fisher']:.2f}",
            "1.10",
        ),
        (
            "the same with a condition number of 1e9, which takes a QR and an SVD",
            f"{white['ill'] / white['fisher']:.2f}",
            "3.00",
        ),
        (
            f"`from_matvec`, D = {SIZE:,}, rank {RANK}, against the {ITERATIONS} "
            f"iterations of matfree's Lanczos alone ({search['matfree']:.1f} s)",
            f"{search['vernal'] / search['matfree']:.2f}",
            "1.50",
        ),
        (
            "peak memory of the process that does it (the matrix would be 80 GB)",
            f"{peak_gigabytes():.2f} GB",
            "2 GB",
        ),
    ]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if sys.argv[1:] == ["memory"]:
        jax.block_until_ready(jax.tree.leaves(from_matvec()))
        # Not `getrusage`, whose peak a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024**2)
    else:
        for row in rows():
            print(" | ".join(row), flush=True)

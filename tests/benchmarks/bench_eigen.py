"""What an eigen-projection costs, beside the one eigendecomposition it needs."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import zodiax.optimisation as seed

import vernal as vn

SIZE = 1_000
ROUNDS = 7


def eigen_projection_ratio() -> dict[str, float]:
    """Medians of interleaved runs at D = 1,000 in float64.

    `eigh`, `vernal` and `zodiax` are seconds; `vernal_ratio` and `zodiax_ratio` are
    those of the latter two to the first. The rounds are interleaved, so that what else
    the machine does falls on all three alike. The matrix is of one scale throughout:
    an eigensolver deflates, and so speeds up, where units differ, which would compare
    two different problems.
    """
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(SIZE + 200, SIZE))
    fmat = jnp.asarray(factor.T @ factor)
    contenders: dict[str, Callable[[jax.Array], object]] = {
        "eigh": jax.jit(jnp.linalg.eigh),
        "vernal": vn.eigen_projection,
        "zodiax": seed.eigen_projection,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        jax.block_until_ready(contender(fmat))
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(contender(fmat))
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    return medians | {
        f"{name}_ratio": medians[name] / medians["eigh"]
        for name in ("vernal", "zodiax")
    }


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio, bound."""
    measured = eigen_projection_ratio()
    what = f"`eigen_projection`, D = {SIZE:,}, against one `eigh`"
    return [
        (what, f"{measured['vernal_ratio']:.2f}", "1.15"),
        ("the same, `zodiax`", f"{measured['zodiax_ratio']:.2f}", ""),
    ]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(rows())

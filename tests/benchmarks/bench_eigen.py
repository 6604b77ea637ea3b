"""What whitening costs, beside the one eigendecomposition that it needs."""

import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import zodiax.optimisation as seed

import vernal as vn

from .timing import in_turns


def fisher_matrix(size: int) -> jax.Array:
    """A matrix of one scale throughout.

    An eigensolver deflates, and so speeds up, where units differ, which would compare
    two different problems.
    """
    factor = np.random.default_rng(0).normal(size=(size + 200, size))
    return jnp.asarray(factor.T @ factor)


def ratios(
    size: int, sides: dict[str, Callable[[jax.Array], object]], rounds: int
) -> dict[str, float]:
    """The median time of each side, over that of one `eigh`."""
    matrix = fisher_matrix(size)
    sides = {"eigh": jax.jit(jnp.linalg.eigh), **sides}
    runs = in_turns({k: lambda f=f: f(matrix) for k, f in sides.items()}, rounds)
    medians = {name: statistics.median(times) for name, times in runs.items()}
    return {name: medians[name] / medians["eigh"] for name in sides}


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio, bound."""
    small = ratios(
        1_000,
        {"vernal": vn.eigen_projection, "zodiax": seed.eigen_projection},
        rounds=7,
    )
    params = jnp.zeros(2_000)
    projector = lambda matrix: vn.EigenProjector.from_fisher(matrix, params).matrix
    large = ratios(2_000, {"vernal": projector}, rounds=5)
    return [
        (
            "`eigen_projection`, D = 1,000, against one `eigh`",
            f"{small['vernal']:.2f}",
            "1.15",
        ),
        ("the same, `zodiax`", f"{small['zodiax']:.2f}", ""),
        (
            "`EigenProjector.from_fisher`, D = 2,000, against one `eigh`",
            f"{large['vernal']:.2f}",
            "1.15",
        ),
    ]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for row in rows():
        print(" | ".join(row), flush=True)

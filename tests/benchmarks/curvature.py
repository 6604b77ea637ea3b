"""Curvature and whitening, against the products and decompositions that they need."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matfree.decomp import tridiag_sym

import vernal as vn
from vernal._curvature.matrices import gauss_newton_matrix
from vernal._curvature.modes import Subject

from .measure import Figure, Program, Sides, Work, peak_megabytes

# The iterations are those that `from_matvec` takes here.
SIZE, RANK, ITERATIONS = 100_000, 40, 120


def images() -> tuple[Any, Any]:
    """Residuals of a chain of matrices: 400 parameters, 4,000 data."""
    rng = np.random.default_rng(0)
    inner = jnp.asarray(rng.normal(size=(600, 400)) / 20)
    outer = jnp.asarray(rng.normal(size=(4_000, 600)) / 24)

    def residuals(params: Any) -> jax.Array:
        return outer @ jnp.tanh(inner @ params["map"])

    return residuals, {"map": jnp.asarray(rng.normal(size=400))}


def gauss_newton() -> Sides:
    residuals, params = images()

    @jax.jit
    def by_hand(flat: jax.Array) -> jax.Array:
        jacobian = jax.jacfwd(lambda x: residuals({"map": x}))(flat)
        return jacobian.T @ jacobian

    by_vernal = lambda: vn.gauss_newton(residuals, params)
    return lambda: lambda: by_hand(params["map"]), lambda: by_vernal


def temporary(batch_size: int) -> tuple[float, str]:
    """The memory of the compiled product beside its arguments and its result."""
    residuals, params = images()

    def megabytes(batch_size: int | None) -> float:
        product = lambda p: gauss_newton_matrix(
            residuals, p, batch_size, Subject("`residuals`")
        )
        analysis: Any = jax.jit(product).lower(params).compile().memory_analysis()
        return analysis.temp_size_in_bytes / 1e6

    return megabytes(batch_size), f"{megabytes(None):.1f} MB"


class Linear(vn.Trainer):
    """Residuals of a design that is the batch."""

    def residuals(self, model: Any, batch: Any) -> jax.Array:
        return batch @ model["map"]


def whitening(is_ill: bool, size: int = 2_000, data: int = 20_000) -> Sides:
    """Whitening by J^T J alone, and by the Jacobian."""
    design = jax.random.normal(jax.random.key(0), (data, size))
    if is_ill:  # two columns that are almost the same
        close = design[:, 1] + 1e-9 * design[:, 0]
        batch = design.at[:, 0].set(close)
    else:
        batch = design
    trainer = Linear({"map": jnp.zeros(size)})

    def by_fisher() -> Any:
        fisher = trainer.fisher(design)
        return vn.EigenProjector.from_fisher(fisher, trainer.params).matrix

    return lambda: by_fisher, lambda: lambda: trainer.whiten(batch).projector.matrix


def fisher_matrix(size: int) -> jax.Array:
    """A matrix of one scale throughout.

    An eigensolver deflates, and so speeds up, where units differ, which would compare
    two different problems.
    """
    factor = np.random.default_rng(0).normal(size=(size + 200, size))
    return jnp.asarray(factor.T @ factor)


def beside_eigh(size: int, make: Any) -> Sides:
    matrix, eigh = fisher_matrix(size), jax.jit(jnp.linalg.eigh)
    return lambda: lambda: eigh(matrix), lambda: lambda: make(matrix)


def by_zodiax(matrix: jax.Array) -> jax.Array:
    from zodiax.optimisation import eigen_projection

    return eigen_projection(matrix)


def projector(matrix: jax.Array) -> Any:
    params = jnp.zeros(len(matrix))
    return vn.EigenProjector.from_fisher(matrix, params).matrix


def field() -> tuple[Any, Any]:
    """A map of 100,000 pixels, seen by 60 detectors of falling sensitivity."""
    key = jax.random.key(0)
    sensitivity = jnp.geomspace(1e3, 1.0, 60)[:, None]
    design = sensitivity * jax.random.normal(key, (60, SIZE)) / SIZE**0.5

    def residuals(params: Any) -> jax.Array:
        return jnp.concatenate([design @ params["map"], 0.1 * params["map"]])

    return residuals, {"map": jnp.zeros(SIZE)}


def leading(residuals: Any, params: Any) -> Any:
    matvec, key = vn.gauss_newton_matvec(residuals, params), jax.random.key(1)
    found = vn.EigenProjector.from_matvec(matvec, params, RANK, key=key)
    return jax.tree.leaves(found)


def lanczos() -> Sides:
    """Plain Lanczos: matfree's iterations, and the Ritz vectors of what they find."""
    residuals, params = field()

    def by_hand() -> Program:
        decompose = tridiag_sym(ITERATIONS, reortho="full", custom_vjp=False)
        flat = lambda x: residuals({"map": x})

        def matvec(vector: jax.Array) -> jax.Array:
            _, image = jax.jvp(flat, (params["map"],), (vector,))
            return jax.vjp(flat, params["map"])[1](image)[0]

        @jax.jit
        def run(start: jax.Array) -> Any:
            found: Any = decompose(matvec, start)
            values, vectors = jnp.linalg.eigh(found.J_small)
            return values[-RANK:], found.Q_tall.T @ vectors[:, -RANK:]

        return lambda: run(jnp.ones(SIZE))

    return by_hand, lambda: lambda: leading(residuals, params)


def peak() -> float:
    jax.block_until_ready(leading(*field()))
    return peak_megabytes() / 1024


DOUBLE: Any = {"precisions": ("float64",)}


def works() -> Iterator[Work]:
    """Those of the main part."""
    told = f"`from_matvec`, D = {SIZE:,}, rank {RANK}, against {ITERATIONS} iterations "
    told += "of Lanczos"
    goals = {"warm": 1.1, "first": None}
    yield Work("from-matvec", told, lanczos, goals, rounds=5, **DOUBLE)


def more() -> Iterator[Work | Figure]:
    told = "`gauss_newton`, 400 parameters, 4,000 data, against `jacfwd`"
    yield Work("gauss-newton", told, gauss_newton, {"warm": 1.1}, rounds=15, **DOUBLE)
    for size in 40, 4:
        told = f"its memory with `batch_size={size}`, against the whole"
        yield Figure("gauss-newton", told, partial(temporary, size), "MB")
    told = "`whiten`, D = 2,000, 20,000 data, against `from_fisher` of J^T J"
    for is_ill, goal, also in (
        (False, 1.1, ", well-conditioned"),
        (True, 3.0, ", of a condition number of 1e9"),
    ):
        sides = partial(whitening, is_ill)
        yield Work("whiten", told + also, sides, {"warm": goal}, rounds=3, **DOUBLE)
    for name, make, size, goal in (
        ("`eigen_projection`", vn.eigen_projection, 1_000, 1.15),
        ("`eigen_projection` of zodiax", by_zodiax, 1_000, None),
        ("`EigenProjector.from_fisher`", projector, 2_000, 1.15),
    ):
        told = f"{name}, D = {size:,}, against one `eigh`"
        sides = partial(beside_eigh, size, make)
        yield Work("eigen-projection", told, sides, {"warm": goal}, rounds=5, **DOUBLE)
    told = "peak memory of a process that calls `from_matvec` (the matrix has 80 GB)"
    yield Figure("from-matvec", told, peak, "GB", 2.0)

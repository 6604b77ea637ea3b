"""The likelihood along given values."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._program import program
from .held import Point, Scan, solve_at


class Walk(NamedTuple):
    """Ways along given values, each from the point before.

    - `starts`: where each way starts.
    - `elements`: which elements are held on it.
    - `values`: their values at each step; NaN for one that is not held.
    - `rows`, `steps`: which points are wanted, in their order.
    """

    starts: Float[Array, "R D"]
    elements: Int[Array, "R H"]
    values: Float[Array, "R S H"]
    rows: Int[np.ndarray, " K"]
    steps: Int[np.ndarray, " K"]


@program
def run_walk(scan: Scan, walk: Walk) -> tuple[Point, Any]:
    """Returns the points of a walk, and the models there, stacked."""

    def of_way(start: Array, index: Array, values: Array) -> Point:
        def step(carry: tuple[Array, Array], values: Array) -> Any:
            last, before = carry
            moved, next_ = (last - before)[index], values - last[index]
            length = jnp.sum(moved**2)
            ratio = jnp.sum(moved * next_) / jnp.where(length > 0, length, 1)
            ratio = jnp.where(jnp.isfinite(ratio), ratio, 0)
            secant = last + ratio * (last - before)
            point = solve_at(scan, index, values, jnp.stack([last, secant]))
            is_good = jnp.isfinite(point.nll)
            new = jnp.where(is_good, point.flat, last)
            return (new, jnp.where(is_good, last, before)), point

        return jax.lax.scan(step, (start, start), values)[1]

    points = jax.vmap(of_way)(walk.starts, walk.elements, walk.values)
    points = jax.tree.map(lambda x: x[walk.rows, walk.steps], points)
    return points, eqx.filter_vmap(scan.model)(points.flat)

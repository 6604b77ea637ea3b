"""One adam for each parameter: `vernal.partition` against a loop written by hand."""

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import vernal as vn


def _by_hand(rates: dict[str, float]) -> optax.GradientTransformation:
    transforms = {name: optax.adam(rate) for name, rate in rates.items()}

    def init(params: Any) -> Any:
        return {name: tx.init(params[name]) for name, tx in transforms.items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        out = {
            name: tx.update(updates[name], state[name], params[name])
            for name, tx in transforms.items()
        }
        return {n: u for n, (u, _) in out.items()}, {n: s for n, (_, s) in out.items()}

    return optax.GradientTransformation(init, update)


def _partitioned(
    partition: Callable[..., Any],
) -> Callable[[dict[str, float]], optax.GradientTransformation]:
    return lambda rates: partition(
        {name: optax.adam(rate) for name, rate in rates.items()},
        {name: name for name in rates},
    )


def _seconds(fn: Callable[[], Any], repeats: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(fn())
        return time.perf_counter() - start

    # As `timeit` does: the collector's work grows with all that lives here.
    gc.collect()
    gc.disable()
    try:
        return min(once() for _ in range(repeats))
    finally:
        gc.enable()


def _trace_and_dispatch(
    make: Callable[[dict[str, float]], optax.GradientTransformation], size: int
) -> tuple[float, float]:
    """Returns the seconds to trace one update, and to run it once compiled."""
    params = {f"p{i}": jnp.asarray(float(i)) for i in range(size)}
    tx = make(dict.fromkeys(params, 1e-2))
    state = tx.init(params)
    # A new function each time: JAX remembers the traces of one that it knows.
    traced = _seconds(
        lambda: (
            jax.make_jaxpr(lambda *args: tx.update(*args))(params, state, params)
            and None
        ),
        repeats=3,
    )
    compiled = (
        jax.jit(tx.update)
        .lower(params, state, params)
        .compile({"xla_backend_optimization_level": 0})
    )
    return traced, _seconds(lambda: compiled(params, state, params), repeats=30)


def _param_optimiser(rates: dict[str, float]) -> optax.GradientTransformation:
    rules = {name: optax.adam(rate) for name, rate in rates.items()}
    return vn.ParamOptimiser(rules)  # pyright: ignore[reportReturnType]


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio, bound."""
    table, hand, ours = [], {}, {}
    for size in (100, 1000):
        hand[size] = _trace_and_dispatch(_by_hand, size)
        rivals = {
            "`ParamOptimiser`": _param_optimiser,
            "`vn.partition`": _partitioned(vn.partition),
        }
        if size == 100:
            # It takes a minute at 1,000.
            rivals["`optax.partition`"] = _partitioned(optax.partition)
        for name, make in rivals.items():
            measured = _trace_and_dispatch(make, size)
            ours[name, size] = measured
            bound = "" if "optax" in name else "1.50"
            for what, own, other in zip(
                ("traced", "dispatched"), hand[size], measured, strict=True
            ):
                label = f"{size:,} parameters, {size:,} rules, {name} {what}"
                table.append((label, f"{other / own:.2f}", bound))
    growth = sum(ours["`ParamOptimiser`", 1000]) / sum(ours["`ParamOptimiser`", 100])
    by_hand = sum(hand[1000]) / sum(hand[100])
    what = f"its growth from 100 to 1,000 rules (by hand {by_hand:.1f})"
    table.append((what, f"{growth:.1f}", "10"))
    return table


if __name__ == "__main__":
    for row in rows():
        print(" | ".join(row))

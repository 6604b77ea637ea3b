"""One adam for each parameter: `vernal.partition` against a loop written by hand."""

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

    return min(once() for _ in range(repeats))


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


def partition_ratios(
    *, sizes: tuple[int, ...] = (100, 1000), optax_sizes: tuple[int, ...] = (100,)
) -> dict[str, float]:
    """Measures how much longer a partition takes than a loop written by hand.

    **Arguments:**

    - `sizes`: the numbers of parameters.
    - `optax_sizes`: those at which `optax.partition` is measured too. It takes a
        minute at 1,000.

    **Returns:**

    Ratios of seconds, by what was measured.
    """
    ratios = {}
    for size in sizes:
        hand = _trace_and_dispatch(_by_hand, size)
        rivals = {"vernal": vn.partition}
        if size in optax_sizes:
            rivals["optax"] = optax.partition
        for name, partition in rivals.items():
            measured = _trace_and_dispatch(_partitioned(partition), size)
            for what, own, ours in zip(
                ("trace", "dispatch"), hand, measured, strict=True
            ):
                ratios[f"{name} {what} {size}"] = ours / own
    return ratios


if __name__ == "__main__":
    for name, ratio in partition_ratios().items():
        print(f"{name:<24}{ratio:8.2f}")

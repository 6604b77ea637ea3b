"""What the host pays: `step` in a Python loop, and a fit of a few steps.

By hand it is one `jax.jit` of a step of Optax, `(model, state, batch) -> (model, state,
loss)`, with the same model, called in a Python loop.

    python -m tests.benchmarks.bench_step
"""

import statistics
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import vernal as vn

from .bench_fit import ChiSquared, problem, rules
from .scan import chi_squared
from .timing import in_turns, seconds

ROUNDS = 25
WIDTH, BATCH = 256, 128


class Regression(vn.Trainer):
    def loss(self, model: Any, batch: Any) -> jax.Array:
        return mean_square(model, batch)


def mean_square(model: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean(jnp.square(jax.vmap(model)(x) - y))


def network(dtype: Any) -> tuple[Any, ...]:
    model = eqx.nn.MLP(WIDTH, WIDTH, WIDTH, 2, key=jax.random.key(0))
    numbers = np.random.default_rng(0).normal(size=(2, BATCH, WIDTH))
    adam = optax.adam(1e-3)
    return model, tuple(numbers), mean_square, Regression, adam, adam


def curve(name: str, points: int) -> tuple[Any, ...]:
    model, batch = problem(name, points)
    optimiser, tx = rules(model)
    return model, batch, chi_squared, ChiSquared, optimiser, tx


CASES: dict[str, tuple[Callable[[], tuple[Any, ...]], int]] = {
    "a line, 20 points": (lambda: curve("line", 20), 300),
    "a star, 20 points": (lambda: curve("star", 20), 300),
    "a star, 500 points": (lambda: curve("star", 500), 300),
    f"a network of three layers of {WIDTH}": (lambda: network(float), 20),
}


def sides(make: Callable[[], tuple[Any, ...]], steps: int, dtype: Any) -> Any:
    """Returns both loops, and the trainer with its batch."""
    model, batch, loss, kind, optimiser, tx = make()
    cast = lambda x: x.astype(dtype) if eqx.is_inexact_array_like(x) else x
    model, batch = jax.tree.map(cast, model), jax.tree.map(jnp.asarray, batch)
    batch = jax.tree.map(cast, batch)
    params, static = eqx.partition(model, eqx.is_array)
    trainer = kind(model, optimiser)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        scored = lambda params: loss(eqx.combine(params, static), batch)
        value, grads = jax.value_and_grad(scored)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def by_hand() -> Any:
        now, state, value = params, tx.init(params), None
        for _ in range(steps):
            now, state, value = step(now, state, batch)
        return value

    def by_vernal() -> Any:
        now, info = trainer.step(batch)
        for _ in range(steps - 1):
            now, info = now.step(batch)
        return info.loss

    return {"hand": by_hand, "vernal": by_vernal}, trainer, batch


def warm(case: str, dtype: Any, rounds: int = ROUNDS) -> dict[str, float]:
    make, steps = CASES[case]
    loops, *_ = sides(make, steps, dtype)
    np.testing.assert_allclose(*(fn() for fn in loops.values()), rtol=1e-3)
    runs = in_turns(loops, rounds)
    best = {name: min(times) / steps * 1e6 for name, times in runs.items()}
    ratio = statistics.median(
        v / h for v, h in zip(runs["vernal"], runs["hand"], strict=True)
    )
    return best | {"ratio": ratio}


def ten(case: str, dtype: Any, progress: bool, rounds: int = ROUNDS) -> float:
    """Returns the milliseconds of a warm fit of ten steps."""
    make, steps = CASES[case]
    _, trainer, batch = sides(make, steps, dtype)
    fit = lambda: trainer.fit(batch, 10, progress=progress).trainer
    fit()
    return min(seconds(fit) for _ in range(rounds)) * 1e3


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    table = []
    for case in CASES:
        for dtype in (np.float32, np.float64):
            w, kind = warm(case, dtype), np.dtype(dtype).name
            what = f"`step` in a loop, {case}, {kind}, against `jax.jit` of a step by "
            what += f"hand ({w['hand']:.0f} µs)"
            table.append((what, f"{w['ratio']:.2f}", "1.3"))
    for progress in (False, True):
        took = ten("a star, 500 points", np.float64, progress)
        what = f"a warm fit of 10 steps, `progress={progress}`"
        table.append((what, f"{took:.1f} ms", "2 ms"))
    return table


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for row in rows():
        print(" | ".join(row), flush=True)

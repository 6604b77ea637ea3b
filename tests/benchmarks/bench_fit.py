"""`fit` with its defaults against the same program written by hand.

The program: a Gaussian line on a sloping background, five parameters with an Adam of
its own rate each. By hand it is one `lax.scan` over `optax.partition` which returns the
losses; `fit` watches for NaN, keeps the best and the history, and checks every update.

    python tests/benchmarks/bench_fit.py

prints the ratios; with arguments it is one side of a measurement that wants a process
of its own (`first hand`, `memory vernal`).
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import vernal as vn

STEPS = 20_000
ROUNDS = 9
RATES = {"mean": 1e-3, "std": 2e-3, "power": 3e-3, "slope": 4e-4, "offset": 5e-4}


class Line(eqx.Module):
    mean: jax.Array
    std: jax.Array
    power: jax.Array
    slope: jax.Array
    offset: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        profile = jnp.exp(-0.5 * ((x - self.mean) / self.std) ** 2)
        return self.power * profile + self.slope * x + self.offset


class LineFit(vn.Trainer):
    def residuals(self, model: Line, batch: Any) -> jax.Array:
        x, y, sigma = batch
        return (model(x) - y) / sigma


def line(*values: float) -> Line:
    return Line(*(jnp.asarray(np.float64(value)) for value in values))


def problem(points: int) -> tuple[Line, Any]:
    x = np.linspace(-5.0, 5.0, points)
    noise = 0.1 * np.random.default_rng(0).normal(size=points)
    y = np.asarray(line(0.3, 1.2, 4.0, 0.1, 0.5)(jnp.asarray(x))) + noise
    batch = jax.tree.map(jnp.asarray, (x, y, np.full(points, 0.1)))
    return line(0.0, 1.0, 3.0, 0.0, 0.0), batch


def by_hand(points: int) -> Callable[[int], np.ndarray]:
    model, batch = problem(points)
    labels = Line(*RATES)
    tx = optax.partition(
        {name: optax.adam(rate) for name, rate in RATES.items()}, lambda _: labels
    )

    def loss(model: Line, batch: Any) -> jax.Array:
        x, y, sigma = batch
        return 0.5 * jnp.sum(jnp.square((model(x) - y) / sigma))

    @jax.jit
    def run(model: Line, state: Any, batch: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            model, state = carry
            value, grads = jax.value_and_grad(loss)(model, batch)
            updates, state = tx.update(grads, state, model)
            return (optax.apply_updates(model, updates), state), value

        return jax.lax.scan(body, (model, state), None, length=STEPS)

    state = tx.init(model)

    def fit(steps: int) -> np.ndarray:
        (model_, _), losses = run(model, state, batch)
        jax.block_until_ready(model_)
        return np.asarray(losses)

    return fit


def by_vernal(points: int) -> Callable[[int], np.ndarray]:
    model, batch = problem(points)
    rules = {name: optax.adam(rate) for name, rate in RATES.items()}
    trainer = LineFit(model, vn.ParamOptimiser(rules))
    return lambda steps: trainer.fit(batch, steps).history.loss


SIDES = {"hand": by_hand, "vernal": by_vernal}


def _seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def warm(points: int) -> dict[str, float]:
    """Interleaved runs, everything compiled."""
    fits = {name: make(points) for name, make in SIDES.items()}
    losses = {name: fit(STEPS) for name, fit in fits.items()}
    np.testing.assert_allclose(losses["hand"], losses["vernal"], rtol=1e-3)
    runs: dict[str, list[float]] = {name: [] for name in fits}
    for _ in range(ROUNDS):
        for name, fit in fits.items():
            runs[name].append(_seconds(lambda fit=fit: fit(STEPS)))
    best = {name: min(times) / STEPS * 1e6 for name, times in runs.items()}
    ten = statistics.median(_seconds(lambda: fits["vernal"](10)) for _ in range(ROUNDS))
    return {
        "hand_us": best["hand"],
        "vernal_us": best["vernal"],
        "ratio": best["vernal"] / best["hand"],
        "ten_steps_ms": ten * 1e3,
    }


def _alone(what: str, side: str, points: int) -> float:
    """Measures one side in a process of its own."""
    command = [sys.executable, __file__, what, side, str(points)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def alone(what: str, points: int, rounds: int = 5) -> dict[str, float]:
    """Interleaved measurements of both sides, the lowest of each."""
    runs: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name in SIDES:
            runs[name].append(_alone(what, name, points))
    return {name: min(values) for name, values in runs.items()}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _one_side(what: str, side: str, points: int) -> float:
    # The machinery of JAX itself is warm on both sides.
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x).sum())(jnp.ones(3)))
    if what == "first":
        start = time.perf_counter()
        SIDES[side](points)(STEPS)
        return time.perf_counter() - start
    before = _peak_mb()
    SIDES[side](points)(STEPS)
    return _peak_mb() - before


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    table = []
    for points, bound in ((500, "1.10"), (20, "1.20")):
        w = warm(points)
        what = (
            f"`fit`, 20,000 steps, {points} points, against `lax.scan` by hand "
            f"({w['hand_us']:.1f} µs a step)"
        )
        table.append((what, f"{w['ratio']:.2f}", bound))
        first = alone("first", points)
        ratio = first["vernal"] / first["hand"]
        what = f"the same, first call, compilation included ({first['hand']:.2f} s)"
        table.append((what, f"{ratio:.2f}", "1.50"))
        if points == 500:
            ten = f"{w['ten_steps_ms']:.1f} ms"
            table.append(("a warm fit of 10 steps", ten, "20 ms"))
            memory = alone("memory", points)
            more = f"{memory['vernal'] - memory['hand']:+.1f} MB"
            table.append(("peak memory beside the program by hand", more, "10 MB"))
    return table


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if len(sys.argv) > 1:
        print(json.dumps(_one_side(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        for row in rows():
            print(" | ".join(row))

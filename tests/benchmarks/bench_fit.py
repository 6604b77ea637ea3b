"""`fit` with its defaults against the same program written by hand.

By hand it is one `lax.scan` over `optax.partition`, an Adam of its own rate for each of
five parameters, which returns the losses. `fit` watches for NaN, guards each update,
keeps the best and the history. Two models: the light curve of a pulsating star, and,
where a step is so short that all of this shows, one Gaussian line.

    python -m tests.benchmarks.bench_fit

prints the rows; with arguments it is one side of a measurement that wants a process
of its own (`first hand star 500`).
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import vernal as vn

from .scan import chi_squared
from .timing import in_turns, seconds

STEPS = 20_000
ROUNDS = 9
RATES = (1e-3, 2e-3, 3e-3, 4e-4, 5e-4)


class Line(eqx.Module):
    """A Gaussian line on a sloping background."""

    mean: jax.Array
    std: jax.Array
    power: jax.Array
    slope: jax.Array
    offset: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        profile = jnp.exp(-0.5 * ((x - self.mean) / self.std) ** 2)
        return self.power * profile + self.slope * x + self.offset


class Star(eqx.Module):
    """The light curve of a pulsating star: eight harmonics of one period."""

    period: jax.Array
    phase: jax.Array
    power: jax.Array
    decay: jax.Array
    offset: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        angle = 2 * jnp.pi * x / self.period + self.phase
        harmonics = [jnp.exp(-k * self.decay) * jnp.cos(k * angle) for k in range(1, 9)]
        return self.offset + self.power * sum(harmonics)


# Of each model: the truth, and where the fit starts.
MODELS = {
    "line": (Line, (0.3, 1.2, 4.0, 0.1, 0.5), (0.0, 1.0, 3.0, 0.0, 0.0)),
    "star": (Star, (3.0, 0.4, 1.5, 0.5, 10.0), (2.98, 0.3, 1.0, 0.7, 9.0)),
}


class ChiSquared(vn.Trainer):
    def residuals(self, model: Any, batch: Any) -> jax.Array:
        x, y, sigma = batch
        return (model(x) - y) / sigma


def problem(name: str, points: int) -> tuple[Any, Any]:
    kind, truth, start = MODELS[name]
    make = lambda values: kind(*(jnp.asarray(np.float64(v)) for v in values))
    x = np.linspace(-5.0, 5.0, points)
    noise = 0.1 * np.random.default_rng(0).normal(size=points)
    y = np.asarray(make(truth)(jnp.asarray(x))) + noise
    batch = jax.tree.map(jnp.asarray, (x, y, np.full(points, 0.1)))
    return make(start), batch


def rules(model: Any) -> tuple[vn.ParamOptimiser, optax.GradientTransformation]:
    """One Adam for each parameter: ours, and that of Optax."""
    each = dict(zip(vn.paths(model), map(optax.adam, RATES), strict=True))
    labels = type(model)(*vn.paths(model))
    return vn.ParamOptimiser(each), optax.partition(each, lambda _: labels)


def by_hand(name: str, points: int) -> Callable[[int], np.ndarray]:
    model, batch = problem(name, points)
    _, tx = rules(model)

    @jax.jit
    def run(model: Any, state: Any, batch: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            model, state = carry
            value, grads = jax.value_and_grad(chi_squared)(model, batch)
            updates, state = tx.update(grads, state, model)
            return (optax.apply_updates(model, updates), state), value

        return jax.lax.scan(body, (model, state), None, length=STEPS)

    state = tx.init(model)

    def fit(steps: int) -> np.ndarray:
        (model_, _), losses = run(model, state, batch)
        jax.block_until_ready(model_)
        return np.asarray(losses)

    return fit


def by_vernal(name: str, points: int) -> Callable[[int], np.ndarray]:
    model, batch = problem(name, points)
    optimiser, _ = rules(model)
    trainer = ChiSquared(model, optimiser)
    return lambda steps: trainer.fit(batch, steps).history.loss


SIDES = {"hand": by_hand, "vernal": by_vernal}


def warm(model: str, points: int) -> dict[str, float]:
    """Interleaved runs, everything compiled."""
    fits = {name: make(model, points) for name, make in SIDES.items()}
    losses = {name: fit(STEPS) for name, fit in fits.items()}
    np.testing.assert_allclose(losses["hand"][:500], losses["vernal"][:500], rtol=1e-6)
    sides = {name: lambda fit=fit: fit(STEPS) for name, fit in fits.items()}
    runs = in_turns(sides, ROUNDS)
    best = {name: min(times) / STEPS * 1e6 for name, times in runs.items()}
    ten = statistics.median(seconds(lambda: fits["vernal"](10)) for _ in range(ROUNDS))
    return {
        "hand_us": best["hand"],
        "vernal_us": best["vernal"],
        "ratio": best["vernal"] / best["hand"],
        "ten_steps_ms": ten * 1e3,
    }


def _alone(what: str, side: str, model: str, points: int) -> float:
    """Measures one side in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, what, side, model, str(points)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def alone(what: str, model: str, points: int, rounds: int = 5) -> dict[str, float]:
    """Interleaved measurements of both sides, the lowest of each."""
    runs: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name in SIDES:
            runs[name].append(_alone(what, name, model, points))
    return {name: min(values) for name, values in runs.items()}


def _one_side(what: str, side: str, model: str, points: int) -> float:
    # The machinery of JAX itself is warm on both sides.
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x).sum())(jnp.ones(3)))
    start = time.perf_counter()
    SIDES[side](model, points)(STEPS)
    if what == "first":
        return time.perf_counter() - start
    # Not `getrusage`, whose peak a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    table = []
    for model, points, bound in (
        ("star", 500, "1.10"),
        ("star", 20, "1.20"),
        ("line", 500, ""),
        ("line", 20, ""),
    ):
        w = warm(model, points)
        what = (
            f"`fit`, {STEPS:,} steps of a {model}, {points} points, against `lax.scan` "
            f"by hand ({w['hand_us']:.1f} µs a step)"
        )
        table.append((what, f"{w['ratio']:.2f}", bound))
        first = alone("first", model, points)
        ratio = first["vernal"] / first["hand"]
        what = f"the same, first call, compilation included ({first['hand']:.2f} s)"
        table.append((what, f"{ratio:.2f}", "1.50" if bound else ""))
        if (model, points) == ("star", 500):
            ten = f"{w['ten_steps_ms']:.1f} ms"
            table.append(("a warm fit of 10 steps", ten, "20 ms"))
            memory = alone("memory", model, points)
            more = f"{memory['vernal'] - memory['hand']:+.1f} MB"
            what = f"peak memory beside the program by hand ({memory['hand']:.0f} MB)"
            table.append((what, more, "10 MB"))
    return table


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if len(sys.argv) > 1:
        print(json.dumps(_one_side(*sys.argv[1:4], int(sys.argv[4]))))
    else:
        for row in rows():
            print(" | ".join(row), flush=True)

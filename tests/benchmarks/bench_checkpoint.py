"""What checkpoints cost a long fit, and what it costs to go on from one."""

import datetime
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import vernal as vn

from .bench_fit import RATES, ChiSquared, problem

ROUNDS = 3


class Wide(vn.Trainer):
    """100 MB of parameters, and some work on each of them."""

    def loss(self, model: Any, batch: Any) -> jax.Array:
        return jnp.sum(jnp.square(jnp.tanh(model) - batch))


def small() -> tuple[Any, Any]:
    model, batch = problem("star", 500)
    rules = dict(zip(vn.paths(model), map(optax.adam, RATES), strict=True))
    return ChiSquared(model, vn.ParamOptimiser(rules)), batch


def wide() -> tuple[Any, Any]:
    model = jax.random.normal(jax.random.key(0), (12_500_000,))
    return Wide(model, optax.sgd(0.1)), jnp.asarray(0.3)


def slowdown(make: Any, steps: int, every: float) -> tuple[float, float]:
    """The time with checkpoints over that without, and the latter in seconds."""
    trainer, batch = make()
    trainer.fit(batch, 20)

    def seconds(directory: str | None) -> float:
        checkpoint = None
        if directory is not None:
            interval = datetime.timedelta(seconds=every)
            checkpoint = vn.Checkpoints(directory, every=interval)
        start = time.perf_counter()
        result = trainer.fit(batch, steps, checkpoint=checkpoint)
        jax.block_until_ready(result.trainer.params)
        return time.perf_counter() - start

    runs: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(ROUNDS):
        runs["without"].append(seconds(None))
        with tempfile.TemporaryDirectory() as directory:
            runs["with"].append(seconds(directory))
    medians = {name: statistics.median(times) for name, times in runs.items()}
    return medians["with"] / medians["without"], medians["without"]


def resume_seconds() -> float:
    """What a fit that has nothing left to do takes: opening, reading, closing."""
    trainer, batch = small()
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = vn.Checkpoints(directory, every=1_000)
        trainer.fit(batch, 20_000, checkpoint=checkpoints)
        start = time.perf_counter()
        trainer.fit(batch, 20_000, checkpoint=checkpoints)
        return time.perf_counter() - start


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    often, of_small = slowdown(small, steps=100_000, every=1.0)
    seldom, of_wide = slowdown(wide, steps=500, every=10.0)
    return [
        (
            f"`fit` with a checkpoint every second, against none ({of_small:.0f} s)",
            f"{often:.2f}",
            "1.05",
        ),
        (
            "the same with 100 MB of parameters, every ten seconds, against none "
            f"({of_wide:.0f} s)",
            f"{seldom:.2f}",
            "1.15",
        ),
        ("resuming, beyond compilation", f"{resume_seconds():.2f} s", "2 s"),
    ]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for row in rows():
        print(" | ".join(row), flush=True)

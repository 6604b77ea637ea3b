"""What it costs to look whether the code of a program has changed.

`step` in a loop, against the same program in `jax.jit`, which does not look.

    python -m tests.benchmarks.bench_programs
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

import vernal as vn
from vernal._program import programs as _programs
from vernal._trainer import trainer as _trainer

from .bench_fit import ChiSquared, problem, rules

ROUNDS = 200
STEPS = 20


def microseconds(fn: Callable[[], Any], count: int = STEPS) -> float:
    start = time.perf_counter()
    for _ in range(count):
        fn()
    return (time.perf_counter() - start) / count * 1e6


def step_by_step(trainer: vn.Trainer, batch: Any) -> dict[str, float]:
    """The time of one step, looked for and not, and by how much they differ."""
    looking: Any = _trainer.run_step
    sides = {"looking": looking, "blind": jax.jit(looking.__wrapped__)}
    runs: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for count in (1, *[STEPS] * ROUNDS):
            gc.collect(0)
            for name, run in sides.items():
                _trainer.run_step = run
                took = microseconds(lambda: trainer.step(batch), count)
                runs[name].append(took)
    finally:
        _trainer.run_step = looking
    # What else the machine does only ever adds.
    return {name: statistics.quantiles(times, n=10)[0] for name, times in runs.items()}


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    model, batch = problem("star", 20)
    trainer = ChiSquared(model, rules(model)[0])
    trainer.step(batch)
    record = next(reversed(_programs._records.values()))
    check = min(microseconds(record.now) for _ in range(ROUNDS))
    walk = min(microseconds(record._read, 1) for _ in range(ROUNDS))
    times = step_by_step(trainer, batch)
    ratio = times["looking"] / times["blind"]
    return [
        (
            "looking whether the code of a model of five parameters has changed "
            f"({len(record.found.watches)} places)",
            f"{check / 1e3:.4f} ms",
            "0.3 ms",
        ),
        ("finding out what it reads, in its first call", f"{walk / 1e3:.2f} ms", ""),
        (
            f"`step`, which looks, against the same that does not "
            f"({times['blind']:.0f} µs)",
            f"{ratio:.2f}",
            "1.3",
        ),
    ]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for row in rows():
        print(" | ".join(row), flush=True)

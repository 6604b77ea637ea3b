"""What it costs to watch a fit: records, a validation, a criterion; and their memory.

    python -m tests.benchmarks.bench_history

prints the rows; with an argument it is one side of a measurement that wants a process
of its own.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import vernal as vn

from .bench_fit import RATES, STEPS, ChiSquared, problem
from .timing import in_turns

ROUNDS = 9
LONG = 1_000_000


def star(points: int) -> tuple[Any, Any]:
    model, batch = problem("star", points)
    rules = dict(zip(vn.paths(model), map(optax.adam, RATES), strict=True))
    return ChiSquared(model, vn.ParamOptimiser(rules)), batch


def watched(batch: Any) -> dict[str, dict[str, Any]]:
    """The options of each fit that is compared."""
    return {
        "plain": {},
        "recorded": {"record": ("grad_norm", "period", "phase")},
        "norms": {"record": ("grad_norms", "update_ratios")},
        "validated": {
            "validation": (batch, 100),
            "stop": vn.Patience(10**6) | vn.Converged(0.0, 10**6),
        },
    }


def ratios(points: int) -> tuple[dict[str, float], float]:
    """The time of each fit over that of the plain one, and the latter a step, in µs."""
    trainer, batch = star(points)

    def side(options: dict[str, Any]) -> Callable[[], Any]:
        return lambda: trainer.fit(batch, STEPS, **options).trainer.params

    sides = {name: side(options) for name, options in watched(batch).items()}
    best = {name: min(runs) for name, runs in in_turns(sides, ROUNDS).items()}
    return {name: t / best["plain"] for name, t in best.items()}, best["plain"] / STEPS


def peak_megabytes(every: int) -> float:
    """The peak memory of this process after a long fit that records so often."""
    trainer, batch = star(20)
    record = ("grad_norm", "period", "phase")
    result = trainer.fit(batch, LONG, record=record, every=every)
    assert len(result.history) == LONG // every
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def alone(every: int) -> float:
    command = [sys.executable, "-m", __spec__.name, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    table = []
    for points, bound in (500, "1.15"), (20, ""):
        told, step = ratios(points)
        table += [
            (
                f"recording the gradient's norm and two parameters at every step, "
                f"{points} points ({1e6 * step:.1f} µs a step), against no record",
                f"{told['recorded']:.2f}",
                bound,
            ),
            (
                "the norms of gradients and updates of five rules instead",
                f"{told['norms']:.2f}",
                "",
            ),
            (
                "a validation every 100 steps and two criteria instead",
                f"{told['validated']:.2f}",
                "",
            ),
        ]
    more = min(alone(100) for _ in range(3)) - min(alone(LONG) for _ in range(3))
    what = "peak memory of 1,000,000 steps, every 100 recorded, beside one recorded"
    table.append((what, f"{more:+.1f} MB", "10 MB"))
    return table


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if len(sys.argv) > 1:
        print(json.dumps(peak_megabytes(int(sys.argv[1]))))
    else:
        for row in rows():
            print(" | ".join(row), flush=True)

"""What stays in memory of fits with new closures, classes, schedules and cells.

Each kind in a process of its own, after 20 fits and after 300.

    python -m tests.benchmarks.bench_memory
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx

import vernal as vn

FIRST, LAST = 20, 300
X = np.linspace(0, 1, 16)
DATA = X, 2 * X + 1
CELL = """
class Line(eqx.Module):
    slope: jax.Array
    def __call__(self, x): return self.slope * x
class Fit(vn.Trainer):
    def residuals(self, model, batch): return model(batch[0]) - batch[1]
Fit(Line(jnp.ones(())), optax.adam(0.1)).fit(DATA, 3, progress=False)
"""


class Line(eqx.Module):
    slope: jax.Array

    def __call__(self, x: Any) -> Any:
        return self.slope * x


class LineFit(vn.Trainer):
    def residuals(self, model: Any, batch: Any) -> Any:
        return model(batch[0]) - batch[1]


def line() -> Line:
    return Line(jnp.ones(()))


def own_class(number: float) -> Any:
    class Own(LineFit):
        def residuals(self, model: Any, batch: Any) -> Any:
            return number * super().residuals(model, batch)

    return Own


def by_closure(number: float) -> None:
    loss = lambda model, batch: jnp.mean(jnp.square(model(batch[0]) - number))
    vn.fit(loss, line(), optax.adam(0.1), DATA, 3, progress=False)


def by_class(number: float) -> None:
    own_class(number)(line(), optax.adam(0.1)).fit(DATA, 3, progress=False)


def by_schedule(number: float) -> None:
    rate = lambda step: 0.1 / (1 + number + step)
    fit: Any = LineFit
    fit(line(), optax.adam(rate)).fit(DATA, 3, progress=False)


def by_cell(number: float) -> None:
    exec(CELL, globals())


def by_solve(number: float) -> None:
    own_class(number)(line()).solve(optx.LevenbergMarquardt(1e-6, 1e-6), DATA)


KINDS: dict[str, Callable[[float], None]] = {
    "closure": by_closure,
    "class": by_class,
    "schedule": by_schedule,
    "cell": by_cell,
    "class that is solved": by_solve,
}


def megabytes() -> float:
    """The memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(kind: str) -> float:
    """By how much the memory grows from the first fits to the last."""
    start = 0.0
    for number in range(1, LAST + 1):
        KINDS[kind](float(number))
        if number == FIRST:
            gc.collect()
            start = megabytes()
    gc.collect()
    return megabytes() - start


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    found = []
    for kind in KINDS:
        args = [sys.executable, "-m", f"{__package__}.bench_memory", kind]
        done = subprocess.run(args, capture_output=True, text=True, check=True)
        what = f"memory that {LAST - FIRST} fits more take, each with a new {kind}"
        found.append((what, f"{float(done.stdout):.0f} MB", "100 MB"))
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if len(sys.argv) > 1:
        print(growth(sys.argv[1]))
    else:
        for row in rows():
            print(" | ".join(row), flush=True)

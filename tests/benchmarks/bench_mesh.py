"""What it costs to share the work among devices, and what it gains.

    python -m tests.benchmarks.bench_mesh

prints the rows. The devices are two views of one processor, each of which has a thread
of its own.
"""

import json
import subprocess
import sys

import jax
import numpy as np
import optax

import vernal as vn

from .bench_fit import RATES, STEPS, ChiSquared, problem
from .bench_many import STARTS, STEPS as MANY_STEPS, starts
from .timing import in_turns

ROUNDS = 5


def mesh_of(count: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))


def optimiser(model: object) -> vn.ParamOptimiser:
    rules = dict(zip(vn.paths(model), map(optax.adam, RATES), strict=True))
    return vn.ParamOptimiser(rules)


def one_device() -> dict[str, float]:
    """A fit on a mesh of one device, and one without a mesh."""
    model, batch = problem("star", 500)
    trainer = ChiSquared(model, optimiser(model))
    mesh = mesh_of(1)
    return _lowest(
        none=lambda: trainer.fit(batch, STEPS).history.loss,
        one=lambda: trainer.fit(batch, STEPS, mesh=mesh).history.loss,
    )


def many_on_two() -> dict[str, float]:
    """Many starts on two devices, and on one of the two."""
    models, batch = starts("star", 500)
    trainers = [ChiSquared(model, optimiser(model)) for model in models]
    mesh = mesh_of(2)
    return _lowest(
        one=lambda: vn.fit_many(trainers, batch, MANY_STEPS).history.loss,
        two=lambda: vn.fit_many(trainers, batch, MANY_STEPS, mesh=mesh).history.loss,
    )


def batch_on_two() -> dict[str, float]:
    """A large batch on two devices, and on one of the two."""
    model, batch = problem("star", 100_000)
    trainer = ChiSquared(model, optimiser(model))
    mesh = mesh_of(2)
    return _lowest(
        one=lambda: trainer.fit(batch, 100).history.loss,
        two=lambda: trainer.fit(batch, 100, mesh=mesh).history.loss,
    )


def _lowest(**sides) -> dict[str, float]:
    return {name: min(times) for name, times in in_turns(sides, ROUNDS).items()}


MEASURED = {
    "one_device": one_device,
    "many_on_two": many_on_two,
    "batch_on_two": batch_on_two,
}


def _measured(name: str) -> dict[str, float]:
    """In a process of its own, whose processor is two devices."""
    command = [sys.executable, "-m", __spec__.name, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    alone, many, batch = map(_measured, MEASURED)
    what = f"`fit` of a star, {STEPS:,} steps, on a mesh of one device, against no mesh"
    table = [(what, f"{alone['one'] / alone['none']:.2f}", "1.02")]
    for told, sides, bound in (
        (f"`fit_many`, {STARTS} starts of a star, {MANY_STEPS:,} steps", many, "0.65"),
        ("`fit` of a star, 100,000 points, 100 steps", batch, ""),
    ):
        what = f"{told}, on two virtual devices, against one ({sides['one']:.1f} s)"
        table.append((what, f"{sides['two'] / sides['one']:.2f}", bound))
    return table


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if len(sys.argv) > 1:
        jax.config.update("jax_num_cpu_devices", 2)
        print(json.dumps(MEASURED[sys.argv[1]]()))
    else:
        for row in rows():
            print(" | ".join(row), flush=True)

"""What it costs to share the work among devices, and what it gains.

    python -m tests.benchmarks.bench_mesh

prints the rows. Two devices are two views of one processor. Since the program of a
single device uses all cores as well, one with a single core is measured beside.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np

import vernal as vn

from .bench_fit import STEPS, ChiSquared, problem, rules
from .bench_many import STARTS, STEPS as MANY_STEPS, starts
from .timing import in_turns

ROUNDS = 3


def mesh_of(count: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))


def fit() -> list[float]:
    """Fits of a star on a mesh of one device, and without a mesh."""
    model, batch = problem("star", 500)
    optimiser, _ = rules(model)
    trainer = ChiSquared(model, optimiser)
    mesh = mesh_of(1)
    runs = in_turns(
        {
            "mesh": lambda: trainer.fit(batch, STEPS, mesh=mesh).history.loss,
            "none": lambda: trainer.fit(batch, STEPS).history.loss,
        },
        3 * ROUNDS,
    )
    return [min(times) for times in runs.values()]


def many() -> list[float]:
    """Many starts, spread over all devices."""
    models, batch = starts("star", 500)
    optimiser, _ = rules(models[0])
    trainers = [ChiSquared(model, optimiser) for model in models]
    mesh = mesh_of(jax.device_count()) if jax.device_count() > 1 else None
    run = lambda: vn.fit_many(trainers, batch, MANY_STEPS, mesh=mesh).history.loss
    return [min(in_turns({"all": run}, ROUNDS)["all"])]


def _measured(what: str, cores: int, devices: int) -> list[float]:
    """The seconds that it takes, in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, what, str(cores), str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows() -> list[tuple[str, str, str]]:
    """The table's rows: what, ratio or figure, bound."""
    with_mesh, without = _measured("fit", 2, 1)
    what = f"`fit` of a star, {STEPS:,} steps, on a mesh of one device, against no mesh"
    table = [(what, f"{with_mesh / without:.2f}", "1.02")]
    (two,) = _measured("many", 2, 2)
    for told, cores, bound in ("a core", 1, "0.65"), ("both cores", 2, ""):
        (one,) = _measured("many", cores, 1)
        what = (
            f"`fit_many`, {STARTS} starts of a star, {MANY_STEPS:,} steps, on two "
            f"devices of a core each, against one device with {told} ({one:.1f} s)"
        )
        table.append((what, f"{two / one:.2f}", bound))
    return table


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if len(sys.argv) > 1:
        what, cores, devices = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        # Before there are threads, which keep what they are born with.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        jax.config.update("jax_num_cpu_devices", devices)
        print(json.dumps({"fit": fit, "many": many}[what]()))
    else:
        for row in rows():
            print(" | ".join(row), flush=True)

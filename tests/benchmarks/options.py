"""What the options of a fit cost, against a fit without, and what stays in memory."""

import datetime
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx

import vernal as vn
from vernal._program import programs
from vernal._trainer import trainer as trainer_file

from .fits import STARTS, scattered
from .measure import Figure, Program, Sides, Work, apart, least, peak_megabytes, seconds
from .problems import ChiSquared, Problem, curve

STEPS = 10_000
LONG = 1_000_000


def watching(points: int, **options: Any) -> Sides:
    problem = curve("star", points)
    trainer = problem.trainer()

    def run(**options: Any) -> Program:
        return lambda: trainer.fit(problem.data, STEPS, **options).trainer.params

    if "validation" in options:
        options["validation"] = problem.data, 100
    return lambda: run(), lambda: run(**options)


WATCHED: dict[str, dict[str, Any]] = {
    "`record` of the gradient's norm and two parameters": {
        "record": ("grad_norm", "period", "phase")
    },
    "`record` of the norms of gradients and updates of five rules": {
        "record": ("grad_norms", "update_ratios")
    },
    "a validation every 100 steps and two criteria to stop": {
        "validation": None,
        "stop": vn.Patience(10**6) | vn.Converged(0.0, 10**6),
    },
}


class Wide(vn.Trainer):
    """100 MB of parameters, and some work on each of them."""

    def loss(self, model: Any, batch: Any) -> jax.Array:
        return jnp.sum(jnp.square(jnp.tanh(model) - batch))


def wide() -> Problem:
    model = jax.random.normal(jax.random.key(0), (12_500_000,), jnp.float64)
    rule = optax.sgd(0.1)
    return Problem(Wide, lambda *_: jnp.zeros(()), model, jnp.asarray(0.3), rule, rule)


def checkpointed(make: Callable[[], Problem], steps: int, every: float) -> Sides:
    problem = make()
    trainer, interval = problem.trainer(), datetime.timedelta(seconds=every)
    fit = lambda checkpoint: trainer.fit(problem.data, steps, checkpoint=checkpoint)

    def run() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return fit(vn.Checkpoints(folder, every=interval)).trainer.params

    return lambda: lambda: fit(None).trainer.params, lambda: run


def resuming() -> float:
    """What a fit that has nothing left to do takes: opening, reading, closing."""
    problem = curve("star", 500)
    trainer = problem.trainer()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = vn.Checkpoints(folder, every=1_000)
        fit = lambda: trainer.fit(problem.data, STEPS, checkpoint=checkpoints)
        fit()
        return seconds(lambda: fit().trainer.params)


def peak_of_records(every: int) -> float:
    problem = curve("star", 20)
    record = ("grad_norm", "period", "phase")
    problem.trainer().fit(problem.data, LONG, record=record, every=every)
    return peak_megabytes()


def more_of_records() -> float:
    peaks = [apart("float64", peak_of_records, every) for every in (100, LONG)]
    return peaks[0] - peaks[1]


def mesh_of(count: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))


def meshed() -> Sides:
    problem = curve("star", 500)
    trainer, mesh = problem.trainer(), mesh_of(1)
    fit = lambda mesh: trainer.fit(problem.data, STEPS, mesh=mesh).history.loss
    return lambda: lambda: fit(None), lambda: lambda: fit(mesh)


def seconds_on(cores: int, devices: int) -> float:
    # Before there are threads, which keep what they are born with.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    jax.config.update("jax_num_cpu_devices", devices)
    problem = curve("star", 500)
    trainers = [ChiSquared(m, problem.optimiser) for m in scattered(problem)]
    mesh = mesh_of(devices) if devices > 1 else None
    fit = lambda: vn.fit_many(trainers, problem.data, 300, mesh=mesh).history.loss
    return least(fit, 5)


def shared(cores: int) -> tuple[float, str]:
    """Two devices of a core each, beside one of so many."""
    two, one = (apart("float64", seconds_on, *on) for on in ((2, 2), (cores, 1)))
    return two / one, f"{one:.2g} s"


def looking() -> Sides:
    """`step`, which looks whether its code has changed, and the same that does not."""
    problem, looks = curve("star", 20), trainer_file.run_step
    trainer, blind = problem.trainer(), jax.jit(looks.__wrapped__)

    def steps(program: Any) -> Program:
        def run() -> Any:
            trainer_file.run_step = program
            return [trainer.step(problem.data)[1].loss for _ in range(20)]

        return run

    return lambda: steps(blind), lambda: steps(looks)


def one_look() -> float:
    problem = curve("star", 20)
    problem.trainer().step(problem.data)
    record = next(reversed(programs._records.values()))
    return 1e3 * least(lambda: [record.now() for _ in range(1_000)]) / 1_000


IMPORT = """
import time, jax, equinox, optax, optimistix
start = time.perf_counter()
import vernal
print(time.perf_counter() - start)
"""


def importing() -> float:
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.check_output(command, text=True) for _ in range(5)]
    return min(map(float, runs))


X = np.linspace(0, 1, 16)
DATA = X, 2 * X + 1
CELL = """
class Slope(eqx.Module):
    slope: jax.Array
    def __call__(self, x): return self.slope * x
class Fit(vn.Trainer):
    def residuals(self, model, batch): return model(batch[0]) - batch[1]
Fit(Slope(jnp.ones(())), optax.adam(0.1)).fit(DATA, 3, progress=False)
"""


class Slope(eqx.Module):
    slope: jax.Array

    def __call__(self, x: Any) -> Any:
        return self.slope * x


class SlopeFit(vn.Trainer):
    def residuals(self, model: Any, batch: Any) -> Any:
        return model(batch[0]) - batch[1]


def own_class(number: float) -> Any:
    class Own(SlopeFit):
        def residuals(self, model: Any, batch: Any) -> Any:
            return number * super().residuals(model, batch)

    return Own


def by_closure(number: float) -> None:
    loss = lambda model, batch: jnp.mean(jnp.square(model(batch[0]) - number))
    vn.fit(loss, Slope(jnp.ones(())), optax.adam(0.1), DATA, 3, progress=False)


def by_class(number: float) -> None:
    trainer = own_class(number)(Slope(jnp.ones(())), optax.adam(0.1))
    trainer.fit(DATA, 3, progress=False)


def by_schedule(number: float) -> None:
    rate = lambda step: 0.1 / (1 + number + step)
    trainer: Any = SlopeFit(Slope(jnp.ones(())), optax.adam(rate))
    trainer.fit(DATA, 3, progress=False)


def by_cell(number: float) -> None:
    exec(CELL, globals())


def by_solve(number: float) -> None:
    solver = optx.LevenbergMarquardt(1e-6, 1e-6)
    own_class(number)(Slope(jnp.ones(()))).solve(solver, DATA)


KINDS: dict[str, Callable[[float], None]] = {
    "closure": by_closure,
    "class": by_class,
    "schedule": by_schedule,
    "cell": by_cell,
    "class that is solved": by_solve,
}


def growth(fit: Callable[[float], None], first: int = 20, last: int = 300) -> float:
    """By how much the memory grows from the first fits to the last."""
    statm, page = Path("/proc/self/statm"), os.sysconf("SC_PAGE_SIZE")
    start = 0.0
    for number in range(1, last + 1):
        fit(float(number))
        if number in (first, last):
            gc.collect()
            megabytes = int(statm.read_text().split()[1]) * page / 1e6
            start = start or megabytes
    return megabytes - start


def works() -> Iterator[Work | Figure]:
    double: Any = {"precisions": ("float64",)}
    for points, goal in (500, 1.15), (20, None):
        for told, options in WATCHED.items():
            sides = partial(watching, points, **options)
            told = f"{told}, light curve, {points} points"
            yield Work("watching", told, sides, {"warm": goal}, STEPS, **double)
    for told, make, steps, every, goal in (
        ("a second", lambda: curve("star", 500), 100_000, 1.0, 1.05),
        ("ten seconds, of 100 MB of parameters", wide, 500, 10.0, 1.15),
    ):
        sides = partial(checkpointed, make, steps, every)
        goals = {"warm": goal}
        told = f"a checkpoint every {told}"
        yield Work("checkpoint", told, sides, goals, rounds=3, **double)
    told = "resume from a checkpoint, beyond compilation"
    yield Figure("checkpoint", told, resuming, "s", 2.0)
    told = f"peak memory of {LONG:,} steps, every 100th recorded, beyond one recorded"
    yield Figure("peak-memory", told, more_of_records, "MB", 10.0)
    told = "a mesh of one device, light curve, 500 points"
    yield Work("mesh", told, meshed, {"warm": 1.02}, STEPS, **double)
    for cores, goal in (1, 0.65), (2, None):
        told = (
            f"`fit_many`, {STARTS} starts on two devices of a core each, against one "
        )
        told += f"device of {'a core' if cores == 1 else 'both'}"
        yield Figure("mesh", told, partial(shared, cores), "", goal)
    told = "`step`, which looks whether its code has changed, against one that does not"
    yield Work("looking", told, looking, {"warm": 1.3}, 20, rounds=25, **double)
    told = "looking whether the code of a model of five parameters has changed"
    yield Figure("looking", told, one_look, "ms", 0.3)
    told = "`import vernal`, beyond jax, equinox, optax and optimistix"
    yield Figure("import", told, importing, "s", 0.4)
    for kind, fit in KINDS.items():
        told = f"memory that 280 fits more take, each with a new {kind}"
        yield Figure("growth", told, partial(growth, fit), "MB", 100.0)

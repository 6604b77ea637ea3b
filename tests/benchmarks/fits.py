"""`fit`, `fit_many` and `step` with their defaults, against the same by hand.

By hand a fit is one `lax.scan` that takes the steps and returns the losses. `fit` also
watches for NaN, guards each update, keeps the best and the history.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import vernal as vn
from vernal._fit import one_trainer

from .measure import BOTH, Figure, Program, Sides, Work, least
from .problems import (
    ChiSquared,
    Problem,
    chi_squared,
    curve,
    fitted,
    network,
    residuals,
    scan_by_hand,
    scanned,
    spectrum,
    trivial,
)

FIRST = 1.25
STARTS = 64


def fit(make: Callable[[], Problem], steps: int) -> Sides:
    problem = make()
    return lambda: scanned(problem, steps), lambda: fitted(problem, steps)


LINE_20, STAR_20 = partial(curve, "line", 20), partial(curve, "star", 20)
STAR_500 = partial(curve, "star", 500)
BATCHES_256, BATCHES_1024 = partial(network, 256, 4_096), partial(network, 1024, 4_096)
FEW, MANY, MOST = (partial(trivial, size) for size in (10_000, 1_000_000, 5_000_000))
# Name, what it is, the largest ratio, the problem, steps, rounds.
FITS = (
    ("light-curve-500", "light curve, 500 points", 1.03, STAR_500, 4_000, 9),
    ("light-curve-20", "light curve, 20 points", 1.15, STAR_20, 20_000, 9),
    ("line-20", "one Gaussian line, 20 points", 1.15, LINE_20, 20_000, 9),
    ("mlp-256", "MLP of 256", 1.1, partial(network, 256), 256, 7),
    ("mlp-1024", "MLP of 1,024", 1.1, partial(network, 1024), 128, 3),
    ("mlp-256-minibatches", "MLP of 256, `Minibatches`", 1.1, BATCHES_256, 256, 7),
    ("mlp-1024-minibatches", "MLP of 1,024, `Minibatches`", 1.1, BATCHES_1024, 128, 3),
    ("trivial-1e4", "trivial loss, 10,000 parameters", 1.4, FEW, 10_000, 9),
    ("trivial-1e6", "trivial loss, 1,000,000 parameters", 1.4, MANY, 256, 7),
    ("trivial-5e6", "trivial loss, 5,000,000 parameters", 1.4, MOST, 256, 3),
)


def whitened() -> Sides:
    """Adam in a space that is whitened: by hand with J^T J and `eigh`."""
    problem, steps = spectrum(), 10_000
    flat, unravel = ravel_pytree(problem.model)

    @jax.jit
    def projection(flat: jax.Array, data: Any) -> jax.Array:
        jacobian = jax.jacfwd(lambda x: residuals(unravel(x), data))(flat)
        scale = 1 / jnp.linalg.norm(jacobian, axis=0)
        values, vectors = jnp.linalg.eigh((jacobian * scale).T @ (jacobian * scale))
        return scale[:, None] * vectors / jnp.sqrt(values)

    def by_hand() -> Program:
        data = problem.data, flat, projection(flat, problem.data)

        def loss(latent: jax.Array, batch: Any) -> jax.Array:
            data, origin, projection = batch
            return chi_squared(unravel(origin + projection @ latent), data)

        rule = problem.tx
        return scanned(Problem(vn.Trainer, loss, 0 * flat, data, rule, rule), steps)

    def by_vernal() -> Program:
        bare = ChiSquared(problem.model)
        trainer = bare.whiten(problem.data, optimiser=problem.optimiser)
        return lambda: trainer.fit(problem.data, steps).history.loss

    return by_hand, by_vernal


class TurnsNan(ChiSquared):
    """Gradients that are NaN at two steps of 20,000."""

    def transform_grads(self, grads: Any, model: Any) -> Any:
        is_bad = (self.step_count == 7_000) | (self.step_count == 15_000)
        spoil = lambda x: jnp.where(is_bad, jnp.nan, x)
        return jax.tree.map(spoil, grads)


def nan_steps() -> Sides:
    problem = curve("star", 20, TurnsNan)

    def by_vernal() -> Program:
        trainer = problem.trainer(nan_policy=vn.SkipStep())
        return lambda: trainer.fit(problem.data, 20_000).history.loss

    return lambda: scanned(problem, 20_000), by_vernal


def recorded() -> Sides:
    problem = curve("star", 20)
    record = lambda params, grads: (optax.global_norm(grads), params.period)
    names = ("grad_norm", "period")
    return (
        lambda: scanned(problem, 20_000, record),
        lambda: fitted(problem, 20_000, record=names),
    )


def bounded() -> Sides:
    """A fit by vernal, and the same with bounds that it does not reach."""
    problem = STAR_500()
    bounds = {"**": (-100.0, 100.0)}

    def within() -> Program:
        trainer = problem.trainer(bounds=bounds)
        return lambda: trainer.fit(problem.data, 4_000).history.loss

    return lambda: fitted(problem, 4_000), within


def scattered(problem: Problem) -> list[Any]:
    """Models around the start of a problem."""
    draws = np.random.default_rng(1).normal(size=(STARTS, 5))
    leaves, structure = jax.tree.flatten(problem.model)
    near = lambda row: [x * (1 + 0.01 * d) for x, d in zip(leaves, row, strict=True)]
    return [structure.unflatten(near(row)) for row in jnp.asarray(draws)]


def many(steps: int = 300) -> Sides:
    problem = STAR_500()
    models = scattered(problem)

    def by_hand() -> Program:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
        scan = scan_by_hand(problem, steps)
        run = lambda params, data: scan(params, problem.tx.init(params), data)[1][0]
        mapped = jax.jit(jax.vmap(run, (0, None), 1))
        return lambda: np.asarray(mapped(stacked, problem.data))

    def by_vernal() -> Program:
        trainers = [ChiSquared(model, problem.optimiser) for model in models]
        return lambda: vn.fit_many(trainers, problem.data, steps).history.loss

    return by_hand, by_vernal


# A loop that reads and writes less than so many bytes a step is one piece of code for a
# CPU, and not a call for each operation.
SMALL_LOOPS = (
    "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000"
)
WITH_SMALL_LOOPS = (
    ("line-20", "one Gaussian line, 20 points", LINE_20, 20_000),
    ("light-curve-20", "light curve, 20 points", STAR_20, 20_000),
    ("light-curve-500", "light curve, 500 points", STAR_500, 4_000),
)


def step_by_step(make: Callable[[], Problem], steps: int) -> Sides:
    """`step` in a Python loop, against one `jax.jit` of a step of Optax."""
    problem = make()
    params, static = eqx.partition(problem.model, eqx.is_array)

    def by_hand() -> Program:
        @jax.jit
        def step(params: Any, state: Any, batch: Any) -> Any:
            scored = lambda params: problem.loss(eqx.combine(params, static), batch)
            value, grads = jax.value_and_grad(scored)(params)
            updates, state = problem.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        def loop() -> Any:
            now, state, losses = params, problem.tx.init(params), []
            for _ in range(steps):
                now, state, value = step(now, state, problem.data)
                losses.append(value)
            return np.asarray(losses)

        return loop

    def by_vernal() -> Program:
        trainer = problem.trainer()

        def loop() -> Any:
            now, losses = trainer, []
            for _ in range(steps):
                now, info = now.step(problem.data)
                losses.append(info.loss)
            return np.asarray(losses)

        return loop

    return by_hand, by_vernal


STEPS = (
    ("step-line-20", "one Gaussian line, 20 points", LINE_20, 300),
    ("step-light-curve-20", "light curve, 20 points", STAR_20, 300),
    ("step-light-curve-500", "light curve, 500 points", STAR_500, 300),
    ("step-mlp-256", "MLP of 256", partial(network, 256), 50),
)


def ten_steps(make: Callable[[], Problem]) -> float:
    problem = make()
    trainer = problem.trainer()
    return 1e3 * least(lambda: trainer.fit(problem.data, 10).trainer.params, 50)


def copies(size: int) -> tuple[float, str]:
    """What a compiled fit has in memory, in copies of the parameters, and by hand."""
    problem, programs = trivial(size), []

    def spy(run: Any) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            programs.append(run.lower(*args))
            return run(*args)

        return called

    for name in ("run_chunk", "run_chunk_in_place"):
        setattr(one_trainer, name, spy(getattr(one_trainer, name)))
    problem.trainer().fit(problem.data, 2)
    scan, state = jax.jit(scan_by_hand(problem, 2)), problem.tx.init(problem.model)
    by_hand = scan.lower(problem.model, state, problem.data)

    def held(lowered: Any) -> float:
        found = lowered.compile().memory_analysis()
        whole = found.argument_size_in_bytes + found.output_size_in_bytes
        whole += found.temp_size_in_bytes - found.alias_size_in_bytes
        return whole / problem.model.nbytes

    return held(programs[0]), f"{held(by_hand):.1f} copies"


def works() -> Iterator[Work | Figure]:
    for name, told, goal, make, steps, rounds in FITS:
        goals = {"warm": goal, "first": FIRST}
        sides = partial(fit, make, steps)
        yield Work(name, told, sides, goals, steps, BOTH, rounds, alike=True)
    goals = {"warm": 1.15, "first": FIRST}
    yield Work("whitened-20", "whitened fit of 20 parameters", whitened, goals, 10_000)
    yield Work(
        "nan-steps",
        "light curve, 20 points, two NaN steps in 20,000 (by hand: none)",
        nan_steps,
        goals,
        20_000,
    )
    yield Work(
        "record",
        "light curve, 20 points, `record` of two names",
        recorded,
        goals,
        20_000,
        alike=True,
    )
    told = "light curve, 500 points, with bounds against without them"
    yield Work("bounds", told, bounded, {"warm": 1.05}, 4_000, rounds=9)
    yield Work(
        "fit-many",
        f"`fit_many`, {STARTS} starts of the light curve, 500 points",
        many,
        {"warm": 1.03, "first": FIRST},
        300,
        alike=True,
    )
    for name, told, make, steps in WITH_SMALL_LOOPS:
        yield Work(
            f"{name}-small-loops",
            f"{told}, small loops compiled whole",
            partial(fit, make, steps),
            {"warm": None, "first": None},
            steps,
            flags=SMALL_LOOPS,
        )
    for name, told, make, steps in STEPS:
        told = f"`step` in a Python loop, {told}"
        sides = partial(step_by_step, make, steps)
        yield Work(name, told, sides, {"warm": 1.3}, steps, alike=True)
    for told, make in (
        ("light curve, 500 points", STAR_500),
        ("trivial loss, 10,000 parameters", FEW),
    ):
        told = f"a warm fit of 10 steps, {told}"
        yield Figure("ten-steps", told, partial(ten_steps, make), "ms", 2.0, BOTH)
    for size in 1_000_000, 20_000_000:
        told = f"memory of a fit of {size:,} parameters, in copies of the parameters"
        measure = partial(copies, size)
        yield Figure("memory", told, measure, "copies", 12.0, ("float32",))

"""The loops of other libraries, as their documentation has them, on the same model.

Each is a function `(problem, steps)` that prepares a program, with one Adam. What a
library needs is imported where it is used.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import optax
import optimistix as optx

from .measure import Program, Sides, Work
from .problems import Problem, Star, curve, fitted, scanned

# For a step of a Python loop there are so many in a compiled one.
COMPILED, LOOPED = 5_000, 500
ADAM = optax.adam(1e-3)


def optimistix(problem: Problem, steps: int) -> Program:
    solver = optx.OptaxMinimiser(problem.tx, rtol=0.0, atol=0.0)
    options = {"max_steps": steps, "throw": False}
    run = lambda: optx.minimise(
        problem.loss, solver, problem.model, problem.data, **options
    )
    return lambda: run().value


def equinox(problem: Problem, steps: int) -> Program:
    @eqx.filter_jit
    def make_step(model: Any, state: Any, batch: Any) -> Any:
        value, grads = eqx.filter_value_and_grad(problem.loss)(model, batch)
        arrays = eqx.filter(model, eqx.is_inexact_array)
        updates, state = problem.tx.update(grads, state, arrays)
        return eqx.apply_updates(model, updates), state, value

    def program() -> Any:
        model = problem.model
        state = problem.tx.init(eqx.filter(model, eqx.is_inexact_array))
        for _ in range(steps):
            model, state, value = make_step(model, state, problem.data)
        return model, value

    return program


def flowjax(problem: Problem, steps: int) -> Program:
    from flowjax.train import fit_to_key_based_loss

    def loss(params: Any, static: Any, key: Any) -> jax.Array:
        return problem.loss(eqx.combine(params, static), problem.data)

    key, options = jax.random.key(0), {"optimizer": problem.tx, "show_progress": False}
    return lambda: fit_to_key_based_loss(
        key, problem.model, loss_fn=loss, steps=steps, **options
    )[0]


def flax(problem: Problem, steps: int) -> Program:
    from flax import nnx

    class Module(nnx.Module):
        def __init__(self) -> None:
            for name, value in vars(problem.model).items():
                setattr(self, name, nnx.Param(value))

        def __call__(self, x: jax.Array) -> jax.Array:
            return Star(*(getattr(self, name)[...] for name in vars(problem.model)))(x)

    @nnx.jit
    def train_step(model: Any, optimizer: Any, batch: Any) -> jax.Array:
        value, grads = nnx.value_and_grad(problem.loss)(model, batch)
        optimizer.update(model, grads)
        return value

    def program() -> Any:
        model = Module()
        optimizer = nnx.Optimizer(model, problem.tx, wrt=nnx.Param)
        for _ in range(steps):
            value = train_step(model, optimizer, problem.data)
        return nnx.state(model), value

    return program


def zodiax(problem: Problem, steps: int) -> Program:
    from zodiax.optimisation import map_optimisers

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return problem.loss(Star(**params), batch)

    def program() -> Any:
        params, losses = vars(problem.model), []
        optim, state = map_optimisers(params, dict.fromkeys(params, problem.tx))
        for _ in range(steps):
            value, grads = loss_fn(params, problem.data)
            updates, state = optim.update(grads, state)
            params = eqx.apply_updates(params, updates)
            losses.append(value)
        return params, losses

    return program


PEERS = {
    "optimistix": ("Optimistix, `OptaxMinimiser`", optimistix, COMPILED),
    "equinox": ("Equinox, the loop of its documentation", equinox, LOOPED),
    "flowjax": ("flowjax, `fit_to_key_based_loss`", flowjax, LOOPED),
    "flax": ("flax, `nnx.Optimizer`", flax, LOOPED),
    "zodiax": ("zodiax, the loop of its documentation", zodiax, 50),
    "vernal": ("vernal, `fit`", fitted, COMPILED),
}


def beside(prepare: Any, points: int, steps: int) -> Sides:
    one_adam = {"optimiser": ADAM, "tx": ADAM}
    problem = dataclasses.replace(curve("star", points), **one_adam)
    return lambda: scanned(problem, COMPILED), lambda: prepare(problem, steps)


def works() -> Iterator[Work]:
    for points in 500, 20:
        for name, (told, prepare, steps) in PEERS.items():
            yield Work(
                f"peer-{name}",
                f"light curve, {points} points: {told}",
                partial(beside, prepare, points, steps),
                {"warm": None},
                COMPILED,
                ("float32",),
                rounds=5,
                steps_of_second=steps,
            )

"""The first call of a fit of many leaves, rules or blocks: most of it is compilation.

By hand it is the same `lax.scan`, over `optax.adam` or `optax.partition`, in the same
latent space where there is a projector: a dictionary of latent vectors, and one product
for all blocks.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vernal as vn

from .measure import Program, Sides, Work
from .problems import Problem, scanned

STEPS = 200
# Loss, parameters, batch, optimiser, and the matrices of a projector or `None`.
Case = tuple[Callable[[Any, Any], jax.Array], Any, Any, Any, Any]


def _squares(model: Any, batch: jax.Array) -> jax.Array:
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(model)])
    return 0.5 * jnp.sum(jnp.square(batch * flat - 1))


def _names(count: int) -> list[str]:
    return [f"p{index:04}" for index in range(count)]


def _matrices(count: int, size: int) -> np.ndarray:
    factors = np.random.default_rng(0).normal(size=(count, 2 * size, size))
    return np.swapaxes(factors, 1, 2) @ factors


def blocks(count: int) -> Case:
    model = {name: jnp.ones(2) for name in _names(count)}
    matrices = dict(zip(model, _matrices(count, 2), strict=True))
    batch = jnp.linspace(1.0, 2.0, 2 * count)
    return _squares, model, batch, optax.adam(1e-2), matrices


def dense(count: int) -> Case:
    model, batch = {"x": jnp.ones(count)}, jnp.linspace(1.0, 2.0, count)
    return _squares, model, batch, optax.adam(1e-2), {"x": _matrices(1, count)[0]}


def rules(count: int) -> Case:
    model = {name: jnp.ones(()) for name in _names(count)}
    rates = np.linspace(1e-2, 2e-2, count)
    each = {name: optax.adam(rate) for name, rate in zip(model, rates, strict=True)}
    return _squares, model, jnp.linspace(1.0, 2.0, count), each, None


def ensemble(count: int) -> Case:
    """Small networks of four leaves each."""
    rng = np.random.default_rng(0)
    shapes = ((2, 8), (8,), (8, 1), (1,))
    nets = [
        [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        for _ in range(count // 4)
    ]
    x = jnp.asarray(rng.normal(size=(16, 2)))

    def loss(nets: Any, batch: Any) -> jax.Array:
        def residuals(net: Any) -> jax.Array:
            weights, bias, out, offset = net
            return jnp.tanh(batch[0] @ weights + bias) @ out + offset - batch[1]

        joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)
        return jnp.mean(jnp.square(jax.vmap(residuals)(joined)))

    return (
        loss,
        nets,
        (x, jnp.sin(x.sum(axis=1, keepdims=True))),
        optax.adam(1e-3),
        None,
    )


def _whitened(loss: Any, start: Any, matrices: Any) -> tuple[Any, Any]:
    """Returns the loss of a latent dictionary and what it reads beside the batch."""
    stacked = jnp.stack(list(map(jnp.asarray, matrices.values())))
    values, vectors = jnp.linalg.eigh(stacked)
    factors = vectors / jnp.sqrt(values)[:, None, :]

    def latent_loss(latent: Any, batch: Any) -> jax.Array:
        own, factors = batch
        moved = jnp.einsum("bij,bj->bi", factors, jnp.stack(list(latent.values())))
        pairs = zip(start.items(), moved, strict=True)
        return loss({name: x + shift for (name, x), shift in pairs}, own)

    return latent_loss, factors


def by_hand(case: Case) -> Program:
    loss, model, batch, optimiser, matrices = case
    if isinstance(optimiser, dict):
        optimiser = optax.partition(optimiser, {name: name for name in optimiser})
    if matrices is not None:
        loss, factors = _whitened(loss, model, matrices)
        model, batch = jax.tree.map(jnp.zeros_like, model), (batch, factors)
    problem = Problem(vn.Trainer, loss, model, batch, optimiser, optimiser)
    return scanned(problem, STEPS)


def by_vernal(case: Case) -> Program:
    loss, model, batch, optimiser, matrices = case
    if isinstance(optimiser, dict):
        optimiser = vn.ParamOptimiser(optimiser)

    class Fit(vn.Trainer):
        def loss(self, model: Any, batch: Any) -> jax.Array:
            return loss(model, batch)

    trainer = Fit(model, optimiser)
    if matrices is not None:
        projector = vn.EigenProjector.from_blocks(matrices, trainer.params)
        trainer = trainer.reproject(projector)
    return lambda: trainer.fit(batch, STEPS).trainer.params


def sides(make: Callable[[int], Case], size: int) -> Sides:
    case = make(size)
    return lambda: by_hand(case), lambda: by_vernal(case)


# The case, its size, its name, and the seconds that its first call may take.
CASES = (
    (blocks, 300, "300 blocks of one leaf", 5.0),
    (blocks, 1000, "1,000 blocks of one leaf", 20.0),
    (rules, 300, "300 rules, against `optax.partition`", None),
    (rules, 1000, "1,000 rules, against `optax.partition`", None),
    (ensemble, 2000, "an ensemble of 500 networks, 2,000 leaves", None),
    (dense, 2000, "a projector of 2,000 parameters", None),
)


def works() -> Iterator[Work]:
    for make, size, told, most in CASES:
        yield Work(
            f"{make.__name__}-{size}",
            f"first call, {told}",
            partial(sides, make, size),
            {"first": 1.25},
            precisions=("float64",),
            rounds=1,
            most_seconds=most,
        )

"""The ratios on a device of your own: a GPU, a TPU, or what JAX finds.

    python -m tests.benchmarks.bench_device

prints a table. Everything is in single precision, which such devices are made for.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vernal as vn

from .bench_fit import ChiSquared, problem, rules
from .bench_many import starts
from .scan import chi_squared, scan_by_hand
from .timing import in_turns

ROUNDS = 5


class Chain(vn.Trainer):
    """A network of as many parameters as one likes."""

    def loss(self, model: Any, batch: Any) -> jax.Array:
        return chain_loss(model, batch)


def chain_loss(model: Any, batch: Any) -> jax.Array:
    x, y = batch
    for weight in model:
        x = jnp.tanh(x @ weight)
    return jnp.mean(jnp.square(x - y))


def chain(width: int, depth: int, rows: int) -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0), depth + 1)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.float32)
    model = [draw(key, width, width) / np.sqrt(width) for key in keys[1:]]
    x = draw(keys[0], rows, width)
    return model, (x, jnp.roll(x, 1, axis=1))


def ratio(sides: dict[str, Callable]) -> tuple[float, float]:
    """Of the first to the second, and the seconds of the second."""
    ours, theirs = (min(times) for times in in_turns(sides, ROUNDS).values())
    return ours / theirs, theirs


def by_hand(loss: Any, tx: Any, model: Any, batch: Any, steps: int) -> Callable:
    run = jax.jit(scan_by_hand(loss, tx, steps))
    return lambda: np.asarray(run(model, batch)[1])


def single(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def rows() -> list[tuple[str, str]]:
    """The table's rows: what, and the ratio."""
    table = []
    for points, steps in (500, 5_000), (1_000_000, 200):
        model, batch = single(problem("star", points))
        ours, theirs = rules(model)
        trainer = ChiSquared(model, ours)
        sides = {
            "vernal": lambda t=trainer, b=batch, n=steps: t.fit(b, n).history.loss,
            "hand": by_hand(chi_squared, theirs, model, batch, steps),
        }
        value, took = ratio(sides)
        told = f"`fit`, light curve of {points:,} points ({took / steps * 1e6:.0f} µs)"
        table.append((told, f"{value:.2f}"))
    for width, steps in (128, 2_000), (2_048, 50):
        model, batch = chain(width, 4, 256)
        sides = {
            "vernal": lambda m=model, b=batch, n=steps: (
                Chain(m, optax.adam(1e-3)).fit(b, n).history.loss
            ),
            "hand": by_hand(chain_loss, optax.adam(1e-3), model, batch, steps),
        }
        value, took = ratio(sides)
        count = sum(weight.size for weight in model)
        told = f"`fit`, network of {count:,} parameters ({took / steps * 1e6:.0f} µs)"
        table.append((told, f"{value:.2f}"))
    models, batch = single(starts("star", 500))
    ours, theirs = rules(models[0])
    trainers = [ChiSquared(model, ours) for model in models]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    run = jax.jit(jax.vmap(scan_by_hand(chi_squared, theirs, 1_000), (0, None)))
    value, took = ratio(
        {
            "vernal": lambda: vn.fit_many(trainers, batch, 1_000).history.loss,
            "hand": lambda: np.asarray(run(stacked, batch)[1]),
        }
    )
    told = f"`fit_many`, {len(models)} light curves ({took / 1_000 * 1e6:.0f} µs)"
    return [*table, (told, f"{value:.2f}")]


if __name__ == "__main__":
    device = jax.devices()[0]
    print(f"On {device.device_kind} ({device.platform}), a step by hand in brackets.\n")
    print("| measured | against a scan by hand |\n|---|---|")
    for row in rows():
        print(f"| {' | '.join(row)} |", flush=True)

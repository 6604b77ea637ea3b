"""What is fitted, and the two programs that fit it: by hand, and by vernal."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import vernal as vn

from .measure import Program

RATES = (1e-3, 2e-3, 3e-3, 4e-4, 5e-4)


@dataclass(frozen=True)
class Problem:
    """A loss, where the fit starts, the data, and the optimiser: vernal's, Optax's."""

    kind: type[vn.Trainer]
    loss: Callable[[Any, Any], jax.Array]
    model: Any
    data: Any
    optimiser: Any
    tx: Any

    def trainer(self, **options: Any) -> Any:
        return self.kind(self.model, self.optimiser, **options)


def fitted(problem: Problem, steps: int, **options: Any) -> Program:
    """By vernal: `fit` with its defaults. Returns the losses, as `scanned` does."""
    trainer = problem.trainer()
    return lambda: trainer.fit(problem.data, steps, **options).history.loss


def scanned(
    problem: Problem, steps: int, record: Callable[[Any, Any], Any] | None = None
) -> Program:
    """By hand: one scan, which does nothing that it is not asked for."""
    run = jax.jit(scan_by_hand(problem, steps, record))
    params = eqx.filter(problem.model, eqx.is_array)
    arrays = getattr(problem.data, "arrays", problem.data)

    def program() -> np.ndarray:
        (fitted, *_), (losses, recorded) = run(params, problem.tx.init(params), arrays)
        jax.block_until_ready((fitted, recorded))
        return np.asarray(losses)

    return program


def scan_by_hand(
    problem: Problem, steps: int, record: Callable[[Any, Any], Any] | None = None
) -> Callable[[Any, Any, Any], Any]:
    """Returns a function of the parameters, the optimiser's state and the data."""
    static = eqx.filter(problem.model, eqx.is_array, inverse=True)
    loss = lambda params, batch: problem.loss(eqx.combine(params, static), batch)
    minibatches = problem.data if isinstance(problem.data, vn.Minibatches) else None

    def run(params: Any, state: Any, data: Any) -> Any:
        def body(carry: Any, step: Any) -> Any:
            params, state, order = carry
            batch = data
            if minibatches is not None:
                order, batch = draw(minibatches, order, step, data)
            value, grads = jax.value_and_grad(loss)(params, batch)
            row = value, None if record is None else record(params, grads)
            updates, state = problem.tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, order), row

        order = None if minibatches is None else jnp.arange(minibatches.examples)
        each = None if minibatches is None else jnp.arange(steps)
        return jax.lax.scan(body, (params, state, order), each, length=steps)

    return run


def draw(minibatches: vn.Minibatches, order: Any, step: Any, data: Any) -> Any:
    """The batch of one step, by hand: each epoch has a shuffle of its own."""
    epoch, index = jnp.divmod(step, minibatches.steps_per_epoch)
    shuffle = lambda: jax.random.permutation(
        jax.random.fold_in(minibatches.key, epoch), minibatches.examples
    ).astype(order.dtype)
    order = jax.lax.cond(index == 0, shuffle, lambda: order)
    size = minibatches.size
    chosen = jax.lax.dynamic_slice_in_dim(order, index * size, size)
    return order, jax.tree.map(lambda x: x[chosen], data)


class Line(eqx.Module):
    """A Gaussian line on a sloping background."""

    mean: jax.Array
    std: jax.Array
    power: jax.Array
    slope: jax.Array
    offset: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        profile = jnp.exp(-0.5 * ((x - self.mean) / self.std) ** 2)
        return self.power * profile + self.slope * x + self.offset


class Star(eqx.Module):
    """The light curve of a pulsating star: eight harmonics of one period."""

    period: jax.Array
    phase: jax.Array
    power: jax.Array
    decay: jax.Array
    offset: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        angle = 2 * jnp.pi * x / self.period + self.phase
        harmonics = [jnp.exp(-k * self.decay) * jnp.cos(k * angle) for k in range(1, 9)]
        return self.offset + self.power * sum(harmonics)


class Spectrum(eqx.Module):
    """Ten Gaussian lines, each of its own height and place: 20 parameters."""

    power: jax.Array
    shift: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        centres = jnp.linspace(-4.5, 4.5, 10) + self.shift
        profiles = jnp.exp(-0.5 * ((x[:, None] - centres) / 0.4) ** 2)
        return profiles @ self.power


class ChiSquared(vn.Trainer):
    def residuals(self, model: Any, batch: Any) -> jax.Array:
        return residuals(model, batch)


def residuals(model: Any, batch: Any) -> jax.Array:
    x, y, sigma = batch
    return (model(x) - y) / sigma


def chi_squared(model: Any, batch: Any) -> jax.Array:
    return 0.5 * jnp.sum(jnp.square(residuals(model, batch)))


class Regression(vn.Trainer):
    def loss(self, model: Any, batch: Any) -> jax.Array:
        return mean_square(model, batch)


def mean_square(model: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean(jnp.square(jax.vmap(model)(x) - y))


class Ridge(vn.Trainer):
    def loss(self, model: Any, batch: Any) -> jax.Array:
        return half_square(model, batch)


def half_square(model: Any, batch: Any) -> jax.Array:
    return 0.5 * jnp.sum(jnp.square(model))


# Of each model: the truth, and where the fit starts.
CURVES = {
    "line": (Line, (0.3, 1.2, 4.0, 0.1, 0.5), (0.0, 1.0, 3.0, 0.0, 0.0)),
    "star": (Star, (3.0, 0.4, 1.5, 0.5, 10.0), (2.98, 0.3, 1.0, 0.7, 9.0)),
}


def seen(truth: Any, points: int) -> tuple[jax.Array, ...]:
    """Noisy data of a curve."""
    x = jnp.linspace(-5.0, 5.0, points)
    noise = 0.1 * np.random.default_rng(0).normal(size=points)
    return x, truth(x) + jnp.asarray(noise), jnp.full(points, 0.1)


def curve(name: str, points: int, kind: type[vn.Trainer] = ChiSquared) -> Problem:
    """A curve of five parameters, with an Adam for each."""
    make, truth, start = CURVES[name]
    model = make(*map(jnp.asarray, start))
    each = dict(zip(vn.paths(model), map(optax.adam, RATES), strict=True))
    tx = optax.partition(each, lambda _: make(*each))
    data = seen(make(*map(jnp.asarray, truth)), points)
    return Problem(kind, chi_squared, model, data, vn.ParamOptimiser(each), tx)


def spectrum() -> Problem:
    truth = Spectrum(jnp.linspace(1.0, 3.0, 10), jnp.linspace(-0.1, 0.1, 10))
    start = Spectrum(jnp.full(10, 2.0), jnp.zeros(10))
    rule = optax.adam(0.1)
    return Problem(ChiSquared, chi_squared, start, seen(truth, 500), rule, rule)


def network(width: int, examples: int = 128) -> Problem:
    """Three hidden layers, in batches of 128."""
    model = eqx.nn.MLP(1, 1, width, 3, key=jax.random.key(0))
    x = jnp.linspace(-1.0, 1.0, examples)[:, None]
    data: Any = (x, jnp.sin(5 * x))
    if examples > 128:
        data = vn.Minibatches(data, 128, key=jax.random.key(1))
    rule = optax.adam(1e-3)
    return Problem(Regression, mean_square, model, data, rule, rule)


def trivial(size: int) -> Problem:
    """A loss that is next to no work, of many parameters."""
    rule = optax.adam(1e-3)
    model = jnp.linspace(0.1, 1.0, size)
    return Problem(Ridge, half_square, model, jnp.zeros(3), rule, rule)

"""Fits that several devices share, and meshes of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import vernal as vn
from models import GaussianFit, gaussian, gaussian_batch

BATCH = gaussian_batch(24)
ADAM = optax.adam(0.02)
RULES = {"mean": optax.adam(0.05), ("std", "power"): optax.sgd(1e-4, momentum=0.5)}


def mesh_of(width, *more):
    names = ("data", "model")[: 1 + len(more)]
    devices = np.array(jax.devices()[: int(np.prod([width, *more]))])
    return jax.sharding.Mesh(devices.reshape(width, *more), names)


class Settled(vn.StopCriterion):
    """Ends when no parameter has moved; holds them, and much else."""

    def init(self, params):
        return params, params, jnp.zeros((8, 2_000))

    def apply(self, view, state):
        moved = jax.tree.map(lambda x, y: jnp.any(x != y), view.params, state[0])
        is_over = ~jax.tree.reduce(jnp.logical_or, moved)
        return is_over, (view.params, *state[1:])

    def reason(self, state):
        return vn.StopReason.CRITERION


class Drawn(vn.Trainer):
    """Draws random numbers for each example, and keeps a mean over all of them."""

    def loss(self, model, batch, *, key, state):
        x, y, sigma = batch
        noise = 0.01 * jax.random.normal(key, y.shape)
        told = jnp.mean(jnp.square(model(x) + noise - y) / sigma)
        bad = jnp.where(self.step_count == 5, jnp.nan, 0.0)
        return told + bad, {"highest": jnp.max(y + noise)}, 0.9 * state + jnp.mean(y)


def stream(step=0):
    x, y, sigma = BATCH
    return ((x, y + 0.01 * i, sigma) for i in range(step, 99))


FITS = {
    "minibatches": lambda: (
        GaussianFit(gaussian(), vn.ParamOptimiser(RULES)),
        vn.Minibatches(BATCH, 8, key=jax.random.key(2)),
        {"record": ("grad_norms", "mean"), "every": 3},
    ),
    "stream": lambda: (GaussianFit(gaussian(), ADAM), vn.Stream(stream), {}),
    "whitened": lambda: (
        GaussianFit(gaussian()).whiten(BATCH, optimiser=ADAM),
        BATCH,
        {"record": "grad_norm"},
    ),
    "state": lambda: (
        Drawn(
            gaussian(),
            ADAM,
            key=jax.random.key(1),
            state=jnp.zeros(()),
            nan_policy=vn.SkipStep() | vn.StopAfter(3),
        ),
        BATCH,
        {"record": ("highest", "update_ratios")},
    ),
    "stops": lambda: (
        GaussianFit(gaussian(), optax.sgd(1e-3)),
        BATCH,
        {"validation": (BATCH, 4), "stop": vn.Patience(2) | vn.Converged(1e-3, 3)},
    ),
}


def starts(optimiser=ADAM, count=8, **options):
    means = [jnp.asarray(mean) for mean in np.linspace(-0.5, 1.0, count)]
    models = [eqx.tree_at(lambda m: m.mean, gaussian(), mean) for mean in means]
    return [GaussianFit(model, optimiser, **options) for model in models]

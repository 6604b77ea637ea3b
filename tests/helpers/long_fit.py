"""A fit that is to be killed: `python long_fit.py directory result pause`."""

import datetime
import os
import sys
import time

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

import vernal as vn  # noqa: E402

STEPS = 12_000


class Noisy(vn.Trainer):
    """Needs its key, its minibatches and its state, and is not finite now and then."""

    def loss(self, model, batch, *, key, state):
        x, y = batch
        noise = 0.01 * jax.random.normal(key, x.shape)
        bad = jnp.where(self.step_count % 1_000 == 7, jnp.nan, 1.0)
        told = model["slope"] * x + model["offset"] * bad + noise
        return jnp.mean((told - y) ** 2), 0.99 * state + 0.01 * model["slope"]

    def evaluate(self, model, batch):
        x, y = batch
        return jnp.mean((self.state * x + model["offset"] - y) ** 2)


def trainer():
    model = {"slope": jnp.asarray(0.0), "offset": jnp.asarray(1.0), "none": None}
    rate = optax.cosine_decay_schedule(1e-3, STEPS)
    rules = {"slope": optax.adam(rate), "offset": optax.sgd(rate, momentum=0.9)}
    policy = vn.SkipStep() | vn.StopAfter(3)
    key = jax.random.key(3)
    optimiser, state = vn.ParamOptimiser(rules), jnp.asarray(0.0)
    return Noisy(model, optimiser, nan_policy=policy, key=key, state=state)


def fit(checkpoint=None, pause=0.0, chunk=None):
    x = jnp.linspace(-1.0, 1.0, 101)
    data = vn.Minibatches((x, 2 * x + 0.5), 7, key=jax.random.key(5))

    def slowly(trainer, history):
        # At once or not at all, whenever it is killed.
        os.write(1, f"{int(trainer.step_count)}\n".encode())
        time.sleep(pause)

    options = {"callback": slowly, "chunk": chunk} if pause else {}
    return trainer().fit(
        data,
        STEPS,
        record=("slope", "grad_norm"),
        every=3,
        validation=((x, 2 * x + 0.5), 50),
        stop=vn.Converged(0.0, 10 * STEPS) | vn.Patience(STEPS),
        progress=False,
        checkpoint=checkpoint,
        **options,
    )


def run(directory, output, pause):
    # Those that come after it find its programs there, and take steps sooner.
    jax.config.update("jax_compilation_cache_dir", f"{output}-programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    every = datetime.timedelta(seconds=0.05)
    checkpoints = vn.Checkpoints(directory, every=every, keep=2)
    vn.save(output, fit(checkpoints, float(pause), chunk=5))


if __name__ == "__main__":
    run(*sys.argv[1:])

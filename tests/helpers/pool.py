"""Fits in other processes: the script of a test, whose class is one of `__main__`."""

import concurrent.futures
import multiprocessing
import os

import jax
import jax.numpy as jnp
import optax
from joblib.externals import loky

import vernal as vn
from models import Line, line_batch, same


class Fit(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model(x) - y


def halved(params):
    return jax.tree.map(lambda _: True, params)


def fit(trainer):
    result = trainer.fit(line_batch(), 3, progress=False)
    return os.getpid(), result


def fail(trainer):
    raise vn.NonFiniteError(1, ("loss",), trainer.nan_report(), trainer)


def main():
    model = Line(jnp.asarray(0.5), jnp.asarray(-1.0))
    rules = {
        "slope": optax.adamw(1e-2, mask=halved),
        "offset": vn.window(optax.sgd(optax.cosine_decay_schedule(0.1, 9)), 1),
    }
    trainer = Fit(model, vn.ParamOptimiser(rules))
    # In the midst of a fit, with moments and counts.
    trainer = fit(trainer)[1].trainer
    _, here = fit(trainer)

    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, spawn)
    with pool:
        pid, there = pool.submit(fit, trainer).result()
        assert pid != os.getpid()
        # Loaded here, it is a trainer like the one that was fitted here.
        assert same(there, here), (there, here)
        error = pool.submit(fail, trainer).exception()
        assert isinstance(error, vn.NonFiniteError), error
        assert same(error.result, trainer)

    class Local(Fit):
        def residuals(self, model, batch):
            return 2 * super().residuals(model, batch)

    # By value: a local class, a lambda, what a lambda holds.
    slope = "slope"
    rules = {
        lambda path, leaf: path == slope: optax.adam(lambda count: 0.1 / (count + 1))
    }
    trainer = Local(model, vn.ParamOptimiser(rules, default=optax.sgd(1e-2)))
    # What `joblib.Parallel` works with.
    pid, there = loky.get_reusable_executor(1).submit(fit, trainer).result()
    assert pid != os.getpid()
    # What is taken by value is another function, and so another optimiser.
    there, here = there.trainer, fit(trainer)[1].trainer
    assert same(there._progress, here._progress)
    print("all the same")


if __name__ == "__main__":
    main()

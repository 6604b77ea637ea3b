"""A script that keeps what it compiles: `python compiled_once.py folder`.

It prints how many programs it found in the folder, how many it compiled, and answers.
"""

import collections
import json
import sys

import jax
import jax.numpy as jnp
import optax
import optimistix as optx

import vernal as vn


class Line(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        bad = jnp.where(self.step_count == 5, jnp.nan, 1.0)
        return (model["slope"] * x + model["offset"] * bad - y) / 0.1


def line(slope=1.0, **options):
    model = {"slope": jnp.asarray(slope), "offset": jnp.asarray(0.0)}
    return Line(model, nan_policy=vn.SkipStep(), **options)


def answers():
    """What small and large fits, a solver and its errors, and many fits return."""
    solver = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    optimiser = vn.ParamOptimiser({"slope": optax.adam(0.1), "offset": optax.sgd(1e-5)})
    for size in 10, 2_000:
        x = jnp.linspace(-1.0, 1.0, size)
        data = x, 2 * x + 0.5
        yield line(optimiser=optimiser).fit(data, 20, progress=False).trainer.params
        stepped, info = line(optimiser=optimiser).step(data)
        yield stepped.params, info.loss
    solved = line().whiten(data).solve(solver, data).trainer
    yield solved.params, solved.standard_errors(data), solved.report(data).chi_squared
    many = [line(slope, optimiser=optimiser) for slope in (0.0, 1.0, 3.0)]
    yield vn.fit_many(many, data, 20, progress=False).trainers.params
    yield vn.fit_many(many, data, 20, solver=solver).trainers.params


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    counts = collections.Counter()
    count = lambda name, **_: counts.update([name.split("/")[-1]])
    jax.monitoring.register_event_listener(count)
    found = [float(x).hex() for x in jnp.hstack(jax.tree.leaves(list(answers())))]
    print(json.dumps([counts["cache_hits"], counts["cache_misses"], found]))

"""Honest intervals, where errors are not symmetric.

*BoxBOD.* How fast do bacteria use up the oxygen in water? Box, Hunter and Hunter
(1978) measured it on six days; NIST certifies the two parameters of the curve. With so
few data the likelihood is not normal, and the standard errors mislead. The intervals
by profile likelihood are those of MINOS (iminuit), which is given the same likelihood
and its derivatives. In the picture Δχ² of the rate leaves the parabola of its standard
error, and the regions of both parameters are not ellipses.

*Coverage.* An interval of 68.3 % should contain the truth in 68.3 % of all
experiments. In 500 simulated ones a curve of this kind is measured until it has
begun to level off, and the level is asked for. The value plus and minus its standard
error contains the true level far too often, and lies below it whenever it does not.
The intervals by profile likelihood are right.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import iminuit
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import vernal as vn
import vernal.plot

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).parent
LM = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
LEVEL, EXPERIMENTS = 0.683, 500
TRUTH, DAYS, NOISE = jnp.array([1.0, 0.35]), jnp.linspace(0.3, 4.0, 8), 0.06


class Oxygen(vn.Trainer):
    """The curve levels off: its parameters are the level and the rate."""

    def curve(self, model, days):
        return model["level"] * (1 - jnp.exp(-model["rate"] * days))

    def residuals(self, model, batch):
        days, used, sigma = batch
        return (self.curve(model, days) - used) / sigma


def as_model(values):
    return {"level": values[..., 0], "rate": values[..., 1]}


def boxbod():
    """Fits the data; the scatter around the certified curve is their error bar."""
    given = json.loads((HERE / "data/nist.json").read_text())["BoxBOD"]
    days, used, certified = (jnp.asarray(given[k]) for k in ("x", "y", "certified"))
    trainer = Oxygen(as_model(certified))
    left = trainer.residuals(trainer.model, (days, used, 1.0))
    batch = days, used, jnp.sqrt(jnp.sum(left**2) / (len(days) - 2))
    return trainer.solve(LM, batch).trainer, batch


def minos(trainer, batch):
    """The intervals of iminuit."""

    def chi_squared(values):
        return jnp.sum(trainer.residuals(as_model(values), batch) ** 2)

    fn, gradient = jax.jit(chi_squared), jax.jit(jax.grad(chi_squared))
    # The types of iminuit allow functions of separate numbers alone.
    cost: Any = lambda b: float(fn(b))
    in_numpy: Any = lambda b: np.asarray(gradient(b))
    start: Any = [float(value) for value in trainer.model.values()]
    found = iminuit.Minuit(cost, start, grad=in_numpy)
    found.errordef, found.tol = iminuit.Minuit.LEAST_SQUARES, 1e-4
    found.migrad()
    found.minos(cl=LEVEL)
    pairs = zip(found.values, found.merrors.values(), strict=True)
    return [(value + error.lower, value + error.upper) for value, error in pairs]


def compare(trainer, batch):
    """Prints the intervals of both beside the standard errors."""
    ours = trainer.intervals(LM, batch, level=LEVEL)
    rows = trainer.report(batch).parameters
    for row, theirs in zip(rows, minos(trainer, batch), strict=True):
        low, high = ours[row.name]
        print(f"{row.name}: {row.value:.6g} ± {row.error:.3g}")
        print(f"  vernal   {low:.6g} to {high:.6g}")
        print(f"  MINOS    {theirs[0]:.6g} to {theirs[1]:.6g}")
        apart = np.subtract((low, high), theirs) / row.error
        assert np.all(np.abs(apart) < 1e-3), apart


def coverage():
    """Returns how often errors and intervals contain the truth, and lie below it."""
    truth = Oxygen(as_model(TRUTH))
    noise = np.random.default_rng(0).normal(size=(EXPERIMENTS, len(DAYS)))
    used = truth.curve(truth.model, DAYS) + NOISE * jnp.asarray(noise)
    days, sigma = (jnp.broadcast_to(x, used.shape) for x in (DAYS, NOISE))
    data = days, used, sigma
    many = vn.fit_many([truth] * EXPERIMENTS, data, 256, solver=LM, data_axis=0)
    values, errors = (
        np.asarray(tree["level"]) for tree in (many.trainers.params, many.errors(data))
    )
    ends = np.full((EXPERIMENTS, 2), np.nan)
    models, every = jax.device_get((many.trainers.params, data))
    for index in set(range(EXPERIMENTS)) - set(many.failed):
        model, batch = jax.tree.map(
            lambda x, i=index: jnp.asarray(x[i]), (models, every)
        )
        found = truth.replace(model=model).intervals(LM, batch, "level", LEVEL)
        ends[index] = found["level"]
    level = float(TRUTH[0])
    symmetric = np.stack([values - errors, values + errors], axis=1)
    for name, (low, high) in {"errors": symmetric.T, "intervals": ends.T}.items():
        yield name, np.mean((low <= level) & (level <= high)), np.mean(high < level)


def main(output):
    trainer, batch = boxbod()
    compare(trainer, batch)
    print(f"\nA level of {LEVEL:.1%} asked for, in {EXPERIMENTS} experiments:")
    found = {}
    for name, covers, below in coverage():
        found[name] = covers
        print(f"  {name:10} contain the truth in {covers:.1%}, below it in {below:.1%}")
    assert abs(found["intervals"] - LEVEL) < 0.04  # two standard errors
    assert abs(found["errors"] - LEVEL) > 0.1

    plt.style.use(HERE / "style.mplstyle")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    vernal.plot.profile(trainer.profile(LM, batch, "rate"), ax=left)
    vernal.plot.contour(trainer, LM, batch, "level", "rate", ax=right)
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "intervals.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)

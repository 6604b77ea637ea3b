"""Profile likelihood, against iminuit with the same likelihood and its gradient."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import iminuit
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jax.flatten_util import ravel_pytree

import vernal as vn

from .measure import Program, Sides, Work
from .problems import chi_squared, curve, residuals

SOLVER = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
COUNT, POINTS = 20, 200


def spectrum(model: Any, x: jax.Array) -> jax.Array:
    """Two lines on a background: ten parameters."""
    lines = [
        line["power"] * jnp.exp(-0.5 * ((x - line["mean"]) / line["std"]) ** 2)
        for line in model["lines"]
    ]
    return lines[0] + lines[1] + jnp.polyval(model["sky"], x)


class Spectrum(vn.Trainer):
    def residuals(self, model: Any, batch: Any) -> jax.Array:
        x, y, sigma = batch
        return (spectrum(model, x) - y) / sigma


class Problem:
    """Noisy data, the trainer at the minimum, and 20 values for each parameter."""

    def __init__(self) -> None:
        names, lines = ("power", "mean", "std"), ((3.0, -1.0, 0.5), (2.0, 0.8, 0.7))
        array = jnp.asarray
        model = {
            "lines": [
                dict(zip(names, map(array, line), strict=True)) for line in lines
            ],
            "sky": array([0.05, 0.1, -0.2, 1.0]),
        }
        x = jnp.linspace(-3.0, 3.0, POINTS)
        noise = 0.3 * np.random.default_rng(0).normal(size=POINTS)
        self.batch = x, spectrum(model, x) + noise, array(0.3)
        self.trainer = Spectrum(model).solve(SOLVER, self.batch).trainer
        report = self.trainer.report(self.batch)
        self.values = {
            row.name: np.linspace(
                row.value - 3 * row.error, row.value + 3 * row.error, COUNT
            )
            for row in report.parameters
        }

    def minuit(self) -> iminuit.Minuit:
        """Compiles chi-squared and its gradient, and goes to the minimum."""
        flat, unravel = ravel_pytree(self.trainer.params)

        def chi_squared(flat: jax.Array, batch: Any) -> jax.Array:
            return jnp.sum(self.trainer.residuals(unravel(flat), batch) ** 2)

        fn, gradient = jax.jit(chi_squared), jax.jit(jax.grad(chi_squared))
        cost: Any = lambda flat: float(fn(flat, self.batch))
        in_numpy: Any = lambda flat: np.asarray(gradient(flat, self.batch))
        found = iminuit.Minuit(cost, np.asarray(flat), grad=in_numpy)
        found.errordef = iminuit.Minuit.LEAST_SQUARES
        found.migrad()
        found.hesse()
        return found


def profiles() -> Sides:
    it = Problem()

    def by_minuit() -> Program:
        found, grids = it.minuit(), list(it.values.values())
        along = lambda index: found.mnprofile(index, grid=grids[index])[1]
        return lambda: np.concatenate([along(index) for index in range(len(grids))])

    def by_vernal() -> Program:
        along = lambda: it.trainer.profile(SOLVER, it.batch, values=it.values)
        return lambda: 2 * np.concatenate([found.losses for found in along().values()])

    return by_minuit, by_vernal


def intervals(level: float) -> Sides:
    it = Problem()

    def by_minuit() -> Program:
        found = it.minuit()
        return lambda: found.minos(cl=level).merrors

    return (
        by_minuit,
        lambda: lambda: it.trainer.intervals(SOLVER, it.batch, None, level),
    )


class ByResiduals(vn.Trainer):
    def residuals(self, model: Any, batch: Any) -> jax.Array:
        return residuals(model, batch)


class ByLikelihood(vn.Trainer):
    def nll(self, model: Any, batch: Any) -> jax.Array:
        return chi_squared(model, batch)


def report(kind: type[vn.Trainer]) -> Sides:
    """The report of a line at its minimum, against the curvature that it needs."""
    problem = curve("line", 100)
    fitted = kind(problem.model).solve(optx.BFGS(1e-8, 1e-8), problem.data).trainer
    return (
        lambda: lambda: fitted.whiten(problem.data).projector,
        lambda: lambda: [row.error for row in fitted.report(problem.data).parameters],
    )


def works() -> Iterator[Work]:
    told = (
        f"profiles of 10 parameters, {COUNT} points each, against iminuit's `mnprofile`"
    )
    options: Any = {"precisions": ("float64",), "rounds": 5}
    goals = {"warm": 0.1, "first": 0.1}
    yield Work("profiles", told, profiles, goals, alike=True, **options)
    told = "intervals of 10 parameters, against iminuit's `minos`"
    yield Work("profiles", told, partial(intervals, 0.683), {"warm": None}, **options)
    for name, kind in (("residuals", ByResiduals), ("nll", ByLikelihood)):
        told = f"`report` of a line by its `{name}`, against `whiten`"
        make = partial(report, kind)
        yield Work(f"report-{name}", told, make, {"warm": 1.1}, **options)

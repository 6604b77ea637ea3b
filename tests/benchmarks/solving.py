"""`solve`, and `whiten` before it, against Optimistix called by hand."""

import runpy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax.flatten_util import ravel_pytree

from vernal._fit.arrival import _measure
from vernal._minimum import distance_of
from vernal._step import stripped

from .measure import Program, Sides, Work
from .problems import ChiSquared, chi_squared, curve, residuals

EXAMPLE = Path(__file__).parents[2] / "examples" / "telescope.py"


class Telescope:
    """The telescope of the examples: its trainer, and the same by hand."""

    def __init__(self) -> None:
        example = runpy.run_path(str(EXAMPLE))
        truth, self.batch = example["observe"](seed=0)
        start, names = example["guess"](truth), example["PARAMETERS"]
        self.trainer, self.solver = (
            example["Fit"](start, train=names),
            example["SOLVER"],
        )
        self.flat, self.unravel = ravel_pytree(self.trainer.params)
        where = lambda m: [getattr(m, n) for n in names]
        self.frozen = eqx.tree_at(where, start, [None] * 3)

    def residuals(self, params: Any, args: Any) -> jax.Array:
        frozen, (images, sigma) = args
        return (eqx.combine(params, frozen)() - images) / sigma

    def chi(self, flat: jax.Array) -> jax.Array:
        return self.residuals(self.unravel(flat), (self.frozen, self.batch)).ravel()

    def by_vernal(self, solver: Any) -> Program:
        whiten = lambda: self.trainer.whiten(self.batch)
        return lambda: whiten().solve(solver, self.batch).trainer.params


@eqx.filter_jit
def least_squares(fn: Any, solver: Any, start: Any, args: Any) -> Any:
    return optx.least_squares(fn, solver, start, args, throw=False).value


def alone() -> Sides:
    """Levenberg-Marquardt by Optimistix alone, from the same start."""
    it = Telescope()
    args, fn = (it.frozen, it.batch), it.residuals
    run = lambda: least_squares(fn, it.solver, it.trainer.params, args)
    return lambda: run, lambda: it.by_vernal(it.solver)


def whitened() -> Sides:
    """The same in a space that is whitened by hand, without a check."""
    it = Telescope()

    @eqx.filter_jit
    def projection(flat: jax.Array, args: Any) -> jax.Array:
        jacobian = jax.jacfwd(lambda x: it.residuals(it.unravel(x), args).ravel())(flat)
        scale = 1 / jnp.linalg.norm(jacobian, axis=0)
        values, vectors = jnp.linalg.eigh((jacobian * scale).T @ (jacobian * scale))
        return scale[:, None] * vectors / jnp.sqrt(values)

    def in_latent(latent: jax.Array, args: Any) -> jax.Array:
        origin, projection, args = args
        return it.residuals(it.unravel(origin + projection @ latent), args)

    def by_hand() -> Any:
        args = it.frozen, it.batch
        space = it.flat, projection(it.flat, args), args
        found = least_squares(in_latent, it.solver, 0 * it.flat, space)
        return it.flat + space[1] @ found

    return lambda: by_hand, lambda: it.by_vernal(it.solver)


def with_zodiax() -> Sides:
    """Jacobian, Fisher matrix and projection of zodiax; LBFGS of Optimistix."""
    import zodiax.diffops
    import zodiax.optimisation
    import zodiax.stats

    it, solver = Telescope(), optx.LBFGS(rtol=1e-6, atol=1e-6)

    def loss(latent: jax.Array, args: Any) -> jax.Array:
        origin, projection = args
        return 0.5 * (it.chi(origin + projection @ latent) ** 2).sum()

    def by_zodiax() -> Any:
        jacobian, _ = zodiax.diffops.jacobian(it.chi, cast(Any, it.flat))
        fisher = zodiax.stats.gauss_hessian(jacobian)
        projection = zodiax.optimisation.eigen_projection(fisher)
        args, latent = (it.flat, projection), 0 * it.flat
        solution = optx.minimise(loss, solver, latent, args, throw=False)
        return it.flat + projection @ solution.value

    ours = it.by_vernal(solver)
    errors = ravel_pytree(it.trainer.standard_errors(it.batch))[0]
    apart = jnp.abs(ravel_pytree(ours())[0] - by_zodiax()) / errors
    assert jnp.max(apart) < 0.05, "another minimum"
    return lambda: by_zodiax, lambda: ours


def solve(make: Callable[..., Any], points: int) -> Sides:
    """Both solve in the same whitened space."""
    problem = curve("star", points)
    trainer = ChiSquared(problem.model).whiten(problem.data)
    projector, solver = trainer.projector, make(rtol=1e-8, atol=1e-8)
    assert projector is not None
    is_minimiser = isinstance(solver, optx.AbstractMinimiser)
    function = chi_squared if is_minimiser else residuals
    of = optx.minimise if is_minimiser else optx.least_squares
    in_latent = lambda latent, batch: function(projector.to_params(latent), batch)
    solved = lambda: of(in_latent, solver, trainer.latent, problem.data, throw=False)
    by_hand = lambda: projector.to_params(solved().value)
    by_vernal = lambda: trainer.solve(solver, problem.data)
    taken = solved().stats["num_steps"], len(by_vernal().history)
    assert taken[0] == taken[1], f"{taken} steps"
    return lambda: by_hand, lambda: lambda: by_vernal().trainer.params


def distance(points: int) -> Sides:
    """The distance to the minimum by itself, beside a whole `solve`."""
    problem = curve("star", points)
    trainer = ChiSquared(problem.model).whiten(problem.data)
    bare, zero = stripped(trainer), jnp.zeros(())
    solver = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    whole = lambda: trainer.solve(solver, problem.data).trainer.params
    measure = lambda: _measure(bare, None, problem.data, "residuals", zero)
    return lambda: whole, lambda: lambda: distance_of(measure())


def works() -> Iterator[Work]:
    """Those of the main part."""
    told = "telescope, `whiten` and `solve` by Levenberg–Marquardt, against Optimistix"
    options: Any = {"precisions": ("float64",), "rounds": 3}
    goals = {"warm": 1.2, "first": 1.2}
    yield Work("telescope", f"{told} alone", alone, goals, **options)
    goals = {"warm": None, "first": None}
    told += " in a space whitened by hand"
    yield Work("telescope-whitened", told, whitened, goals, **options)


def more() -> Iterator[Work]:
    options: Any = {"precisions": ("float64",), "rounds": 15}
    for make in optx.LevenbergMarquardt, optx.BFGS:
        for points in 500, 20_000:
            told = f"`solve`, {make.__name__} on the light curve, {points:,} points"
            told += ", against Optimistix"
            sides = partial(solve, make, points)
            yield Work("solve", told, sides, {"warm": 1.1}, **options)
    told = "`edm`, which `solve` ends with, 500 points, against the whole of `solve`"
    yield Work("edm", told, partial(distance, 500), {"warm": 0.3}, **options)
    told = "telescope, `whiten` and `solve` by LBFGS, against zodiax and Optimistix"
    options["rounds"] = 3
    yield Work("zodiax", told, with_zodiax, {"warm": 1.0}, **options)

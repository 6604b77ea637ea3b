"""`scale_errors`: error bars that are not known, from the scatter of the residuals."""

import functools
import math

import iminuit
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize

import vernal as vn
from inside import plane
from models import Gaussian, GaussianFit, line

LM = optx.LevenbergMarquardt(rtol=1e-12, atol=1e-12)
BFGS = optx.BFGS(rtol=1e-10, atol=1e-10)
X = jnp.linspace(-1.0, 2.0, 14)
PEAK = Gaussian(*map(jnp.asarray, (0.4, 0.7, 2.2)))
START = Gaussian(*map(jnp.asarray, (0.5, 0.75, 2.1)))
NOISE = jnp.asarray(0.2 * np.random.default_rng(3).normal(size=X.shape))


class Saturating(vn.Trainer):
    """Of `high` no large value can be told from any other, and of `flat` none."""

    def residuals(self, model, batch):
        x, y, sigma = batch
        return (jnp.arctan(model["high"]) * x + 0 * model["flat"] - y) / sigma


SATURATED = {"flat": jnp.asarray(2.0), "high": jnp.asarray(4.0)}
# Of one structure, so that all of them are one program: at one end, held, at both.
BELOW, HELD, BETWEEN = (
    {"power": (low, None), "std": (None, high)}
    for low, high in ((0.0, 0.76), (0.0, 0.6), (2.0, 0.76))
)
NARROW = Gaussian(*map(jnp.asarray, (0.5, 0.55, 2.1)))

# The class, its model, its bounds, and what is fitted.
FITS = {
    "linear": (GaussianFit, line(), None, line(2.0, 1.0)(X)),
    "one-sided": (GaussianFit, START, BELOW, PEAK(X)),
    "held": (GaussianFit, NARROW, HELD, PEAK(X)),
    "nonlinear": (GaussianFit, START, None, PEAK(X)),
    "bounds": (GaussianFit, START, BETWEEN, PEAK(X)),
    "infinite": (Saturating, SATURATED, None, 1.45 * X),
}


@functools.cache
def solved(name):
    """A trainer at its minimum, the batch for an error bar, and that of the scatter."""
    kind, model, bounds, y = FITS[name]
    batch = lambda sigma: (X, y + NOISE, jnp.asarray(sigma))
    trainer = kind(model, bounds=bounds).solve(LM, batch(0.2)).trainer
    scatter = math.sqrt(trainer.report(batch(1.0)).reduced_chi_squared)
    return trainer, batch, scatter


# The linear one is compared with MINOS, below.
@pytest.mark.parametrize("name", sorted(FITS.keys() - {"linear"}))
def test_all_is_as_of_residuals_in_units_of_the_scatter(name):
    trainer, batch, scatter = solved(name)
    known = trainer.intervals(LM, batch(scatter), level=0.9)
    last = list(known)[-1]
    profile = trainer.profile(LM, batch(scatter), last)
    for unit in (1e-4, 1e4):  # of 1.0 are those below
        found = trainer.intervals(LM, batch(unit), level=0.9, scale_errors=True)
        ours, theirs = (np.array(list(x.values())) for x in (found, known))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        own = trainer.profile(LM, batch(unit), last, scale_errors=True)
        for field in ("values", "delta", "error", "minimum"):
            ours, theirs = (getattr(p, field) for p in (own, profile))
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
        report = trainer.report(batch(unit), scale_errors=True)
        np.testing.assert_allclose(own.error, report[last].error, rtol=1e-6)
        errors = trainer.standard_errors(batch(unit), scale_errors=True)
        theirs = trainer.standard_errors(batch(scatter))
        both = (jax.tree.leaves(tree) for tree in (errors, theirs))
        np.testing.assert_allclose(*both, rtol=1e-6)
        table = trainer.table(batch(unit), scale_errors=True)
        assert table == trainer.table(batch(scatter))
    assert np.isinf(list(known.values())).any() == (name == "infinite")
    limits = {b for pair in (FITS[name][2] or {}).values() for b in pair}
    reached = {end for ends in known.values() for end in ends} & limits
    assert bool(reached) == bool(limits)


@pytest.mark.parametrize("name", ["linear", "nonlinear"])
def test_the_intervals_are_those_of_minos_with_scaled_errors(name):
    trainer, batch, scatter = solved(name)
    flat, unravel = jax.flatten_util.ravel_pytree(trainer.params)
    rows = lambda b: trainer.residuals(unravel(b), batch(scatter))
    both = jax.jit(jax.value_and_grad(lambda b: jnp.sum(rows(b) ** 2)))
    theirs = iminuit.Minuit(lambda b: float(both(b)[0]), np.asarray(flat))
    theirs.errordef, theirs.strategy, theirs.tol = 1, 2, 1e-4
    theirs.migrad()
    theirs.minos(cl=0.683)
    ends = [
        (value + error.lower, value + error.upper)
        for value, error in zip(theirs.values, theirs.merrors.values(), strict=True)
    ]
    found = trainer.intervals(LM, batch(1.0), scale_errors=True)
    np.testing.assert_allclose(list(found.values()), ends, rtol=1e-3)


def test_a_plane_is_that_of_scaled_residuals():
    trainer, batch, scatter = solved("nonlinear")
    names = "mean", "power"
    ours = plane(trainer, LM, batch(1.0), names, 2.0, scale_errors=True)
    theirs = plane(trainer, LM, batch(scatter), names, 2.0)
    for field in ("x", "y", "best", "delta"):
        both = (getattr(found, field) for found in (ours, theirs))
        np.testing.assert_allclose(*both, rtol=1e-6, atol=1e-7)


class Counts(vn.Trainer):
    def residuals(self, level, batch):
        return vn.likelihoods.Poisson(jnp.broadcast_to(level, batch.shape), batch)


class Likelihood(vn.Trainer):
    def nll(self, level, batch):
        return 0.5 * jnp.sum((level - batch) ** 2)


class Level(vn.Trainer):
    def residuals(self, level, batch):
        return level - batch


DATA, NORMAL = jnp.asarray([3.0, 5.0, 4.0]), {"": vn.Normal(4.0, 1.0)}
REFUSED = {
    "priors": (Level, LM, NORMAL, DATA, True, ValueError, "widths of the `priors`"),
    "counts": (Counts, BFGS, None, DATA.astype(int), True, ValueError, "know their"),
    "an nll": (Likelihood, BFGS, None, DATA, True, ValueError, "define `residuals`"),
    "few data": (Level, LM, None, DATA[2:], True, ValueError, "more data than free"),
    "no scatter": (Level, LM, None, 0 * DATA + 4, True, ValueError, "are all zero"),
    "no boolean": (Level, LM, None, DATA, "yes", TypeError, "`True` or `False`"),
}


@pytest.mark.own_words
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("method", ["intervals", "profile", "standard_errors", "table"])
def test_what_has_no_scatter_is_refused(method, name):
    kind, solver, priors, batch, given, error, match = REFUSED[name]
    trainer = kind(jnp.asarray(4.0), priors=priors)
    args = (solver, batch) if method in ("intervals", "profile") else (batch,)
    if name == "no scatter" and len(args) == 1:
        # An error bar may be zero, and an interval may not.
        assert trainer.standard_errors(batch, scale_errors=True) == 0
        return
    with pytest.raises(error, match=match):
        getattr(trainer, method)(*args, scale_errors=given)


def test_errors_are_those_of_scipy():
    """Its `curve_fit` scales the errors of data without error bars."""
    x = np.asarray(X)
    y = np.asarray(line(2.0, 1.0)(X) + NOISE)
    _, covariance = scipy.optimize.curve_fit(lambda x, a, b: a * x + b, x, y)
    batch = tuple(map(jnp.asarray, (x, y, 1.0)))
    result = GaussianFit(line()).solve(LM, batch)
    errors = result.standard_errors(batch, scale_errors=True)
    ours = [errors.slope, errors.offset]
    np.testing.assert_allclose(ours, np.sqrt(np.diag(covariance)), rtol=1e-6)


def test_within_a_program_the_scatter_is_not_known():
    trainer, batch, _ = solved("linear")
    of = lambda y: trainer.standard_errors((X, y, 1.0), scale_errors=True)
    with pytest.raises(TypeError, match="runs on the host"):
        jax.jit(of)(batch(1.0)[1])

"""Priors whose density ends with a jump: draws, and what a fit says beside an end."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optimistix as optx
import pytest
import scipy.stats

import vernal as vn
from inside import prior_ends

BFGS = optx.BFGS(1e-8, 1e-8)
X = np.linspace(0, 1, 30)
NOISE = np.random.default_rng(1).normal(size=30)


class Offset(vn.Trainer):
    def residuals(self, model, batch):
        return (model["a"] + model["b"] * X - batch) / 0.5


class OffsetNll(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Offset.residuals(self, model, batch)))


# A prior, its support as bounds, and as the remedy says it.
ENDS = {
    "uniform": (dist.Uniform(0.0, 1.0), (0, 1), "0 and 1, .*(0, 1)"),
    "half normal": (dist.HalfNormal(0.3), (0, None), "0, .*(0, None)"),
    "half Cauchy": (dist.HalfCauchy(0.3), (0, None), "0, .*(0, None)"),
    "exponential": (dist.Exponential(2.0), (0, None), "0, .*(0, None)"),
    "truncated": (dist.TruncatedNormal(0.2, 0.3, low=0.0), (0, None), "0, .*(0, None)"),
}
KINDS = {"residuals": Offset, "nll": OffsetNll}
# Of two ends and of one, with either kind.
PAIRS = [("uniform", "residuals"), ("half normal", "nll")]


def trainer_of(kind, prior, bounds=None, a=0.5):
    model = {"a": jnp.asarray(a), "b": jnp.array(1.0)}
    own = {} if bounds is None else {"bounds": {"a": bounds}}
    return KINDS[kind](model, priors={"a": prior}, **own)


def told(text):
    return f"The prior of 'a' ends at {text.replace('(', '[(]').replace(')', '[)]')}"


def test_a_support_that_is_small_beside_the_errors_is_not_drawn_from():
    """Whole models are tried for priors; within bounds it draws what is within."""

    class Four(vn.Trainer):
        def residuals(self, model, batch):
            return model["a"] - batch

    start, priors = {"a": jnp.zeros(4)}, {"a": dist.Uniform(-0.01, 0.01)}
    for bounds in None, {"a": (-9, 9)}:
        trainer = Four(start, priors=priors, bounds=bounds)
        with pytest.raises(ValueError, match=r"of 9 models . are where .*`bounds`"):
            trainer.draw(jax.random.key(0), 9, jnp.zeros(4))
    trainer = Four(start, priors=priors, bounds={"a": (-0.01, 0.01)})
    drawn = trainer.draw(jax.random.key(0), 9, jnp.zeros(4))["a"]
    assert jnp.all(jnp.abs(drawn) <= 0.01)
    assert 0.003 < jnp.std(drawn) < 0.009


@pytest.mark.parametrize("case", ENDS)
def test_near_its_end_each_prior_has_its_words(case):
    prior, bounds, text = ENDS[case]
    near = trainer_of("residuals", prior, a=1e-4)
    assert re.search(told(text), prior_ends(near, is_near=True))
    held = trainer_of("residuals", prior, bounds, a=1e-4)
    assert prior_ends(held, is_near=True) == ""


BEYOND, NEAR = -0.4 + 2 * X + 0.1 * NOISE, 0.1 + 2 * X + 0.1 * NOISE


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_a_solve_that_stops_short_at_an_end_says_so(case, kind):
    prior, _, text = ENDS[case]
    short = trainer_of(kind, prior).solve(BFGS, BEYOND)
    assert short.stop_reason is not vn.StopReason.CONVERGED
    assert re.search(told(text), short.explain())
    with pytest.raises(ValueError, match=told(text)):
        short.trainer.intervals(BFGS, BEYOND)


def test_with_bounds_a_solve_ends_there():
    prior, bounds, _ = ENDS["uniform"]
    held = trainer_of("residuals", prior, bounds).solve(BFGS, BEYOND)
    assert held.stop_reason is vn.StopReason.CONVERGED
    assert held.model["a"] == 0
    assert "prior" not in held.explain()


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_an_interval_that_reaches_an_end_says_so(case, kind):
    prior, _, text = ENDS[case]
    trainer = trainer_of(kind, prior).solve(BFGS, NEAR).trainer
    with pytest.warns(UserWarning, match=told(text)):
        low, _ = trainer.intervals(BFGS, NEAR, "a", level=0.99)["a"]
    assert np.isnan(low)


def test_with_bounds_an_interval_ends_there():
    prior, bounds, _ = ENDS["uniform"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = trainer_of("residuals", prior, bounds).solve(BFGS, NEAR).trainer
        low, _ = held.intervals(BFGS, NEAR, "a", level=0.99)["a"]
    assert low == 0


SILENT = {
    "far from its ends": {"a": dist.Uniform(-50.0, 50.0)},
    "none": {"a": dist.StudentT(3.0, 0.0, 1.0)},
    "normal": {"a": vn.Normal(0.0, 1.0)},
}


@pytest.mark.parametrize("case", SILENT)
def test_of_others_nothing_is_said(case):
    trainer = Offset({"a": jnp.array(9.0), "b": jnp.array(1.0)}, priors=SILENT[case])
    assert prior_ends(trainer, is_near=True) == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["uniform", "half normal"])
def test_draws_keep_to_the_support_of_a_prior(case, kind):
    prior, bounds, _ = ENDS[case]
    trainer = trainer_of(kind, prior).solve(BFGS, NEAR).trainer
    a = np.asarray(trainer.draw(jax.random.key(0), 4000, NEAR)["a"])
    center, error = trainer.model["a"], trainer.standard_errors(NEAR)["a"]
    # Without the prior's end a good part would be beyond.
    assert scipy.stats.norm.cdf(-center / error) > 0.02
    assert np.isfinite(prior.log_prob(a)).all()
    low, high = ((np.inf if x is None else x) - center for x in bounds)
    known = scipy.stats.truncnorm(low / error, high / error, center, error)
    assert scipy.stats.kstest(a, known.cdf).pvalue > 0.01

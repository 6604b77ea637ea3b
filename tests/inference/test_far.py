"""Errors far from a minimum, and at the truth of simulated data, which is near one."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
import scipy.stats

import inside
import vernal as vn

FAR = "far from the minimum"
LM = optx.LevenbergMarquardt(1e-8, 1e-8)
RANDOM = np.random.default_rng(3)


class Decay(vn.Trainer):
    def residuals(self, model, batch):
        x, y, std = batch
        found = (model["size"] * jnp.exp(-model["rate"] * x) - y) / std
        return jnp.where(jnp.isfinite(y), found, 0)


class Counts(vn.Trainer):
    def nll(self, model, batch):
        x, counts = batch
        rate = model["size"] * jnp.exp(-model["rate"] * x)
        return jnp.sum(rate - counts * jnp.log(rate))


def model(size=2.0, rate=0.5, dtype=np.float64):
    return {"size": jnp.asarray(size, dtype), "rate": jnp.asarray(rate, dtype)}


def decays(count, std=0.1, lost=0):
    x = np.linspace(0.0, 3.0, count)
    y = 2.0 * np.exp(-0.5 * x) + std * RANDOM.normal(size=count)
    y[:lost] = np.nan
    return x, y, np.full(count, 0.1)


def counts(count):
    x = np.linspace(0.0, 3.0, count)
    return x, RANDOM.poisson(100.0 * np.exp(-0.5 * x)).astype(float)


def with_prior():
    """The truth is where the priors are measured to be, not in their middle."""
    return Decay(model(), priors={"rate": vn.Normal(0.5 + 0.1 * RANDOM.normal(), 0.1)})


# Trainers at the truth, and data; the errors of data are not always what they are said.
AT_THE_TRUTH = {
    "residuals": lambda: (Decay(model()), decays(40)),
    "residuals, few": lambda: (Decay(model()), decays(4)),
    "another scatter": lambda: (Decay(model()), decays(40, std=30.0)),
    "lost data": lambda: (Decay(model()), decays(40, lost=34)),
    "a prior": lambda: (with_prior(), decays(6)),
    "counts": lambda: (Counts(model(100.0)), counts(30)),
    "bounds": lambda: (Decay(model(), bounds={"rate": (0.0, 2.0)}), decays(40)),
}


@pytest.mark.parametrize("name", AT_THE_TRUTH)
def test_errors_are_forecast_at_the_truth(name):
    """Its probability is uniform, so that a warning there is one of a million."""
    found = []
    for _ in range(200):
        trainer, batch = AT_THE_TRUTH[name]()
        found.append(inside.around(trainer, batch, "It").truth_p_value)
        trainer.standard_errors(batch)
    # What is almost at the minimum counts as there.
    near = np.asarray(found) == 1
    assert near.mean() < 0.1
    p_value = scipy.stats.kstest(np.asarray(found), "uniform").pvalue
    assert p_value > 1e-4, p_value


def test_the_probability_is_that_of_the_f_test():
    trainer, batch = Decay(model(2.1)), decays(40)
    here = inside.around(trainer, batch, "It")
    explained = 2 * float(here.distance.edm)
    ratio = (explained / 2) / ((here.deviance - explained) / 38)
    expected = scipy.stats.f.sf(ratio, 2, 38)
    np.testing.assert_allclose(here.truth_p_value, expected, rtol=1e-8)
    trainer, batch = Counts(model(103.0)), counts(30)
    here = inside.around(trainer, batch, "It")
    expected = scipy.stats.chi2.sf(2 * float(here.distance.edm), 2)
    np.testing.assert_allclose(here.truth_p_value, expected, rtol=1e-8)


DATA, COUNTED = decays(40), counts(30)
FAR_AWAY = {
    "residuals": (Decay(model(1.0)), DATA),
    "residuals, float32": (Decay(model(1.0, dtype=np.float32)), DATA),
    "a prior": (Decay(model(), priors={"rate": vn.Normal(5.0, 0.01)}), DATA),
    "counts": (Counts(model(130.0)), COUNTED),
    "bounds": (Decay(model(1.0), bounds={"rate": (0.0, 2.0)}), DATA),
    "lost data": (Decay(model(1.0)), decays(40, lost=20)),
    "a fit cut short": (Decay(model(1.0), optax.sgd(1e-9)).fit(DATA, 2).trainer, DATA),
}
ENTRANCES = {
    "standard_errors": lambda trainer, batch: trainer.standard_errors(batch),
    "propagate": lambda trainer, batch: trainer.propagate(
        lambda model: model["size"], batch
    ),
    "draw": lambda trainer, batch: trainer.draw(jax.random.key(0), 3, batch),
}


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("name", FAR_AWAY)
def test_far_away_there_is_a_warning(name, entrance):
    trainer, batch = FAR_AWAY[name]
    message = f"`{entrance}` is asked for {FAR}.*(size|rate).*trainer.solve"
    with pytest.warns(UserWarning, match=message) as warned:
        ENTRANCES[entrance](trainer, batch)
    # It points to the line above.
    assert warned[0].filename == __file__
    solver = optx.BFGS(1e-8, 1e-8) if isinstance(trainer, Counts) else LM
    end = trainer.whiten(batch).solve(solver, batch, max_steps=1024).trainer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ENTRANCES[entrance](end, batch)


def test_within_a_program_nothing_is_said():
    at = lambda size: Decay(model(size)).standard_errors(DATA)["size"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = jax.vmap(at)(jnp.asarray([1.0, 2.0]))
    with pytest.warns(UserWarning, match=FAR):
        np.testing.assert_allclose(found[0], at(1.0), rtol=1e-10)

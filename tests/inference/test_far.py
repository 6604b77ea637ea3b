"""Errors far from a minimum, and at the truth of simulated data, which is near one."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import optimistix as optx
import pytest
import scipy.optimize
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


TRUE, BOUNDED = Decay(model()), Decay(model(), bounds={"rate": (0.0, 2.0)})
COUNTING = Counts(model(100.0))

# Trainers at the truth, and data; the errors of data are not always what they are said.
AT_THE_TRUTH = {
    "residuals": lambda: (TRUE, decays(40)),
    "residuals, few": lambda: (TRUE, decays(4)),
    "another scatter": lambda: (TRUE, decays(40, std=30.0)),
    "lost data": lambda: (TRUE, decays(40, lost=34)),
    "a prior": lambda: (with_prior(), decays(6)),
    "counts": lambda: (COUNTING, counts(30)),
    "bounds": lambda: (BOUNDED, decays(40)),
}


@pytest.mark.parametrize("name", AT_THE_TRUTH)
def test_errors_are_forecast_at_the_truth(name):
    """Its probability is uniform, so that a warning there is one of a million."""
    drawn = [AT_THE_TRUTH[name]() for _ in range(60)]
    found = [inside.around(*own, "It").truth_p_values[1] for own in drawn]
    # Of these a warning would be most probable.
    for index in np.argsort(found)[:6]:
        trainer, batch = drawn[index]
        trainer.standard_errors(batch)
    # What is almost at the minimum counts as there.
    near = np.asarray(found) == 1
    assert near.mean() < 0.1
    p_value = scipy.stats.kstest(np.asarray(found), "uniform").pvalue
    assert p_value > 1e-4, p_value


class Rates(vn.Trainer):
    def residuals(self, model, counts):
        rate = jnp.broadcast_to(jnp.exp(model["log_rate"]), counts.shape)
        return vn.likelihoods.Poisson(rate, counts)


def rates(rate):
    return Rates({"log_rate": jnp.log(jnp.asarray(rate))})


def exact():
    x = np.linspace(0.0, 3.0, 40)
    return x, 2.0 * np.exp(-0.5 * x), np.full(40, 0.1)


# Where the scatter of the data says little of their errors: a trainer, and data.
QUIET = {
    "sparse counts": (rates(0.01), lambda: RANDOM.poisson(0.01, 500)),
    "no counts": (rates(0.001), lambda: np.zeros(500, int)),
    "data without noise": (Decay(model(2.0002)), exact),
    "a tenth of an error": (Decay(model(2.003)), exact),
}


@pytest.mark.parametrize("name", QUIET)
def test_little_scatter_is_no_reason_to_warn(name):
    trainer, draw = QUIET[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60 if name == "sparse counts" else 1):
            trainer.standard_errors(draw())


def test_the_probability_is_that_of_the_f_test():
    trainer, batch = Decay(model(2.1)), decays(40)
    here = inside.around(trainer, batch, "It")
    explained = 2 * float(here.distance.edm)
    ratio = (explained / 2) / ((here.deviance - explained) / 38)
    expected = scipy.stats.f.sf(ratio, 2, 38)
    np.testing.assert_allclose(here.truth_p_values[1], expected, rtol=1e-8)
    known = scipy.stats.chi2.sf(explained, 2)
    np.testing.assert_allclose(here.truth_p_values[0], known, rtol=1e-8)
    trainer, batch = Counts(model(103.0)), counts(30)
    here = inside.around(trainer, batch, "It")
    expected = scipy.stats.chi2.sf(2 * float(here.distance.edm), 2)
    np.testing.assert_allclose(here.truth_p_values, [expected] * 2, rtol=1e-8)


DATA, COUNTED = decays(40), counts(30)
FAR_AWAY = {
    "residuals": (Decay(model(1.0)), DATA),
    "residuals, float32": (Decay(model(1.0, dtype=np.float32)), DATA),
    "a prior": (Decay(model(), priors={"rate": vn.Normal(5.0, 0.01)}), DATA),
    "counts": (Counts(model(130.0)), COUNTED),
    "bounds": (BOUNDED.replace(model=model(1.0)), DATA),
    "lost data": (Decay(model(1.0)), decays(40, lost=20)),
    "few counts": (rates(1.3e4), np.full(2, 10_000)),
    "a fit cut short": (Decay(model(1.0), optax.sgd(1e-9)).fit(DATA, 2).trainer, DATA),
}
ENTRANCES = {
    "standard_errors": lambda trainer, batch: trainer.standard_errors(batch),
    "propagate": lambda trainer, batch: trainer.propagate(
        lambda model: jax.tree.leaves(model)[0], batch
    ),
    "draw": lambda trainer, batch: trainer.draw(jax.random.key(0), 3, batch),
}


@functools.cache
def at_the_minimum(name):
    trainer, batch = FAR_AWAY[name]
    if name == "few counts":
        return rates(1e4)
    if name in ("residuals, float32", "bounds"):  # which move no minimum
        known, cast = at_the_minimum("residuals"), lambda x, to: x.astype(to.dtype)
        return trainer.replace(model=jax.tree.map(cast, known.model, trainer.model))
    solver = optx.BFGS(1e-8, 1e-8) if name == "counts" else LM
    return trainer.whiten(batch).solve(solver, batch, max_steps=1024).trainer


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ENTRANCES[entrance](at_the_minimum(name), batch)


class Symmetric(vn.Trainer):
    """At zero the data have no slope, and their likelihood is lowest; a prior has."""

    def residuals(self, model, batch):
        return model["size"] ** 2 - batch


@pytest.mark.parametrize("entrance", ["propagate", "draw"])
def test_at_a_saddle_there_is_a_warning(entrance):
    priors = {"size": dist.Cauchy(0.0, 1.0)}
    trainer, batch = Symmetric({"size": jnp.zeros(())}, priors=priors), jnp.ones(9)
    note = trainer.table(batch).splitlines()[-1]
    assert note.startswith("not at a minimum: the loss curves downwards")
    with pytest.warns(UserWarning, match="not at a minimum") as warned:
        ENTRANCES[entrance](trainer, batch)
    assert str(warned[0].message) == f"`{entrance}`: {note}."
    assert warned[0].filename == __file__


class Line(vn.Trainer):
    """Its Jacobian depends on nothing that is mapped."""

    def residuals(self, model, batch):
        x, y, std = batch
        return (model["size"] * x + model["rate"] - y) / std


class Quadratic(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Line.residuals(self, model, batch)))


def at_size(trainer, **options):
    def errors(size):
        return trainer(model(size)).standard_errors(DATA, **options)["size"]

    return errors


def at_data(trainer):
    def errors(shift):
        x, y, std = DATA
        return trainer(model()).standard_errors((x, y + shift, std))["size"]

    return errors


WITHIN = {
    "decay, model": at_size(Decay),
    "decay, data": at_data(Decay),
    "line, model": at_size(Line),
    "line, data": at_data(Line),
    "line, observed": at_size(Line, kind="observed"),
    "quadratic, model": at_size(Quadratic),
    "quadratic, data": at_data(Quadratic),
}


@pytest.mark.parametrize("name", WITHIN)
def test_within_a_program_nothing_is_said(name):
    errors, at = WITHIN[name], jnp.asarray([1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = jax.vmap(errors)(at), [jax.jit(errors)(x) for x in at]
    with pytest.warns(UserWarning, match=FAR):
        expected = [errors(x) for x in at]
    for each in found:
        np.testing.assert_allclose(each, expected, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
@pytest.mark.parametrize("name", WITHIN)
def test_errors_are_not_differentiated(name):
    """They would have a derivative of zero, without a word."""
    errors = WITHIN[name]
    transformed = jax.grad(errors), jax.jit(jax.grad(errors)), jax.grad(jax.jit(errors))
    for fn in (*transformed, lambda x: jax.jvp(errors, (x,), (x,))):
        with pytest.raises(TypeError, match=r"differentiated.*trainer\.fisher"):
            fn(jnp.asarray(1.0))
    constant, two = lambda x: x * errors(jax.lax.stop_gradient(x)), jnp.asarray(2.0)
    np.testing.assert_allclose(jax.grad(constant)(two), errors(two), rtol=1e-10)


COLUMNS = {
    "errors": lambda result, data, **options: result.errors(data, **options),
    "table": lambda result, data, **options: result.table(data, **options),
    "to_dict": lambda result, data, **options: result.to_dict(data, **options),
}
MANY = {
    "residuals": (Decay, {}, {}),
    "a prior and bounds": (
        Decay,
        {"priors": {"rate": vn.Normal(0.5, 0.1)}, "bounds": {"size": (0.0, 9.0)}},
        {},
    ),
    "observed": (Decay, {}, {"kind": "observed"}),
    "sandwich": (Decay, {}, {"kind": "sandwich"}),
    "nll": (Quadratic, {}, {}),
}


def best_of(kind, x, y, pull):
    """The minimum, by SciPy; `pull` is the precision of the prior of the rate."""

    def rows(p):
        line = p[0] * x + p[1] if kind is Quadratic else p[0] * np.exp(-p[1] * x)
        return np.append((line - y) / 0.1, pull * (p[1] - 0.5))

    return model(*scipy.optimize.least_squares(rows, [2.0, 0.5], method="lm").x)


@pytest.mark.parametrize("name", MANY)
def test_a_member_that_is_far_away_is_named(name):
    kind, options, errors = MANY[name]
    x, _, std = DATA
    if kind is Quadratic:
        x, y = x - 1.0, np.stack([2.0 * x - 1.5] * 4)
    else:
        y = np.stack([decays(40)[1] for _ in range(4)])
    # The data of one are no numbers, and it has no errors.
    data, axes = (x, np.concatenate([y, [np.full(40, np.nan)]]), std), (None, 0, None)
    # No two are the same: equal columns would be one, in a program of their own.
    models = [model(3.0 + 0.01 * i, 0.5 + 0.001 * i) for i in range(5)]
    away = [kind(own, optax.sgd(1e-9), **options) for own in models]
    many = vn.fit_many(away, data, 1, data_axis=axes)
    message = rf"member 0 are asked for {FAR}.*\(edm\), along.*may hold of 1, 2, 3\."
    for ask in COLUMNS.values():
        with pytest.warns(UserWarning, match=message) as warned:
            ask(many, data, **errors)
        assert warned[0].filename == __file__
    best = [best_of(kind, x, row, 10.0 if options else 0.0) for row in y]
    there = [kind(own, optax.sgd(1e-9), **options) for own in best]
    some = vn.fit_many(there[:2] + away[2:], data, 1, data_axis=axes)
    with pytest.warns(UserWarning, match=r"member 2.*hold of 3\."):
        some.errors(data, **errors)
    ends = vn.fit_many(there + away[4:], data, 1, data_axis=axes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ask in COLUMNS.values():
            ask(ends, data, **errors)


def test_one_that_is_far_is_found_behind_many_that_only_seem_so():
    """The errors of the data are said to be a thirtieth of what they are."""
    y = np.stack([decays(40, std=3.0)[1] for _ in range(11)])
    data, axes, still = (DATA[0], y, DATA[2]), (None, 0, None), optax.sgd(1e-12)
    at_the_truth, away = Decay(model(), still), Decay(model(90.0), still)
    many = vn.fit_many([at_the_truth] * 10 + [away], data, 1, data_axis=axes)
    with pytest.warns(UserWarning, match=f"member 10 are asked for {FAR}") as warned:
        many.errors(data)
    assert len(warned) == 1
    assert "may hold" not in str(warned[0].message)


def test_a_member_that_cannot_be_looked_at_harms_no_other(monkeypatch):
    """Rounding may leave it errors in one program, and none in another."""

    def refuse(*args):
        raise ValueError("a negative eigenvalue")

    data = DATA[0], np.stack([DATA[1]] * 2), DATA[2]
    away = [Decay(model(3.0), optax.sgd(1e-9))] * 2
    many = vn.fit_many(away, data, 1, data_axis=(None, 0, None))
    monkeypatch.setattr(inside.errors_of_many, "around", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors = many.errors(data)
    assert np.isfinite(errors["rate"]).all()

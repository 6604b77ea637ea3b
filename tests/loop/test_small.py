"""Fits of small models, whose loop is one function: no answer changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import vernal as vn
from inside import cache_size, one_function, one_trainer, run_chunk, small
from marked import marked
from models import close, same

X = np.linspace(-1.0, 1.0, 24)
DATA = jnp.asarray(X), jnp.asarray(np.sin(2 * X) + 0.5)
BAD = (0, 7, 40)


class Fit(vn.Trainer):
    """A sine, whose loss is NaN at some steps."""

    def loss(self, model, batch):
        x, y = batch
        wave = model["a"] * jnp.sin(x * model["k"]) + model["b"].sum()
        is_bad = (self.step_count == model["bad"]).any()
        return jnp.where(is_bad, jnp.nan, 1.0) * jnp.mean(jnp.square(wave - y))


def fit_of(bad=BAD, rule=None, dtype=float, **options):
    number = lambda *of: jnp.asarray(*of, dtype)
    model = {"a": number(0.3), "k": number(1.0), "b": number([0.1, 0.2])}
    rule = optax.adam(0.05) if rule is None else rule
    model["bad"] = np.array([*bad, -1], np.int32)
    return Fit(model, rule, **options)


def run(trainer, steps=120, data=DATA, **options):
    return trainer.fit(data, steps, progress=False, **options)


@pytest.fixture
def used(monkeypatch):
    """Counts the loops that were compiled as one function."""
    used, compile_one = [], small.as_one_function

    def spy(*args):
        found = compile_one(*args)
        used.append(found is not None)
        return found

    monkeypatch.setattr(small, "as_one_function", spy)
    vn.forget()
    return used


@pytest.fixture
def otherwise(monkeypatch):
    """Calls a function where no loop is compiled as one."""

    def call(fn):
        with monkeypatch.context() as patch:
            patch.setenv("VERNAL_ONE_FUNCTION", "0")
            return fn()

    return call


# Each for a wave of its own, so that what one of them does is not seen by the others.
RULES = {
    "clipped": optax.chain(
        optax.clip_by_global_norm(0.1), optax.sgd(0.05, momentum=0.9)
    ),
    "schedule": optax.adamw(optax.cosine_decay_schedule(0.1, 100)),
    "noisy": optax.noisy_sgd(0.01, key=1),
}


class Waves(Fit):
    """A sine for each rule, all of them NaN at some steps."""

    def loss(self, model, batch):
        one_loss = super().loss
        return sum(one_loss(wave, batch) for wave in model.values())


@pytest.mark.loose_dtypes
@pytest.mark.loose_ranks
@pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.float32, marks=pytest.mark.as_compiled), jnp.float64]
)
def test_fits_are_those_of_the_other_way(dtype, used, otherwise):
    data = jax.tree.map(lambda x: x.astype(dtype), DATA)
    wave = fit_of(dtype=dtype).model
    rules, policy = vn.ParamOptimiser(RULES), vn.SkipStep()
    waves = Waves(dict.fromkeys(RULES, wave), rules, nan_policy=policy)
    make = lambda: run(waves, data=data)
    one = make()
    assert used == [True]
    other = otherwise(make)
    assert np.isfinite(one.history.loss).sum() == 120 - len(BAD)
    assert one.trainer.nan_report() == other.trainer.nan_report()
    rtol = 1e-3 if dtype == jnp.float32 else 1e-9
    close(one.trainer.model, other.trainer.model, rtol=rtol)
    np.testing.assert_allclose(one.history.loss, other.history.loss, rtol=rtol)


POLICIES = {
    "skip": vn.SkipStep(),
    "zero": vn.ZeroNans(),
    "count": vn.SkipStep() | vn.StopAfter(2),
    "stop": vn.StopFit(),
}


@pytest.mark.parametrize("policy", marked(pytest.mark.as_compiled, POLICIES, "count"))
def test_a_fit_in_parts_is_one_fit(policy, used):
    """To the bit, wherever it is cut; nothing more is compiled for a bad step."""
    start = fit_of(nan_policy=POLICIES[policy])
    before = cache_size(run_chunk)
    whole = run(start)
    for cut in (1, 6, 7, 8, 39, 40, 41, 100):
        parts = run(run(start, cut).trainer, 120 - cut)
        assert same(whole.trainer, parts.trainer), cut
    assert same(whole.trainer, run(start, chunk=13).trainer)
    run(fit_of(bad=(-1, -1, -1), nan_policy=POLICIES[policy]))
    assert used == [True]
    assert cache_size(run_chunk) == before + 1


def test_a_fit_that_monitors(used, otherwise):
    options = {"validation": (DATA, 5), "record": ("grad_norm", "b"), "every": 3}
    options |= {"stop": vn.Converged(1e-3, 4)}
    make = lambda: run(fit_of(nan_policy=vn.SkipStep()), 400, **options)
    one, other = make(), otherwise(make)
    assert used == [True]
    assert one.stop_reason == other.stop_reason
    assert one.trainer.step_count == other.trainer.step_count
    for name in ("loss", "validation"):
        both = (getattr(each.history, name) for each in (one, other))
        np.testing.assert_allclose(*both, rtol=1e-9)
    np.testing.assert_allclose(one.history["b"], other.history["b"], rtol=1e-9)


@pytest.mark.as_compiled
def test_many_fits(used, otherwise):
    members = [fit_of((i,), nan_policy=vn.SkipStep()) for i in range(5)]
    make = lambda: vn.fit_many(members, DATA, 50, progress=False)
    one, other = make(), otherwise(make)
    assert used == [True]
    assert (np.isfinite(one.history.loss).sum(axis=0) == 49).all()
    close(one.trainers.model, other.trainers.model, rtol=1e-9)
    np.testing.assert_allclose(one.history.loss, other.history.loss, rtol=1e-9)


def seen(trainer):
    return trainer.params, trainer.opt_state, trainer.best, trainer.best_loss


def test_minibatches_and_streams(used):
    rows = jnp.stack(DATA, 1)

    class Rows(Fit):
        def loss(self, model, batch):
            return super().loss(model, batch.T)

    rows_fit = Rows(fit_of().model, PLAIN)
    data = vn.Minibatches(rows, 8, key=jax.random.key(0))
    whole = run(rows_fit, data=data)
    parts = run(run(rows_fit, 50, data=data).trainer, 70, data=data)
    assert same(whole.trainer, parts.trainer)
    stream = lambda: vn.Stream(lambda step: rows)
    streamed, whole = run(rows_fit, 9, data=stream()), run(rows_fit, 9, data=rows)
    assert same(seen(streamed.trainer), seen(whole.trainer))


# Where the rule does not matter: this one compiles fastest.
PLAIN = optax.sgd(0.05)


class Sorting(Fit):
    def loss(self, model, batch):
        x, y = batch
        wave = jnp.sort(model["a"] * jnp.sin(x * model["k"])) + model["b"].sum()
        return jnp.mean(jnp.square(wave - y))


class Large(Fit):
    def loss(self, model, batch):
        return super().loss(model, jax.tree.map(lambda x: jnp.tile(x, 99), batch))


@pytest.mark.parametrize("kind", [Sorting, Large])
def test_all_else_is_left_to_the_other_way(kind, used):
    run(kind(fit_of().model, PLAIN), 3)
    assert not any(used)


def test_it_is_switched_off(monkeypatch, used):
    """In a process that already has the program of a loop as one function, too."""
    start = fit_of(rule=PLAIN)
    run(start, 3)
    assert used == [True]
    before = cache_size(run_chunk)
    with monkeypatch.context() as patch:
        patch.setenv("VERNAL_ONE_FUNCTION", "0")
        run(start, 3)
    assert used == [True]
    assert cache_size(run_chunk) > before
    # A JAX for which this was not tested.
    vn.forget()
    monkeypatch.setattr(one_function, "BEFORE", (0, 1))
    run(start, 3)
    assert used == [True]


@pytest.mark.parametrize("value", ["", "false", "off", "2"])
def test_another_value_of_the_switch_is_refused(value, monkeypatch):
    monkeypatch.setenv("VERNAL_ONE_FUNCTION", value)
    with pytest.raises(ValueError, match=f"`VERNAL_ONE_FUNCTION={value}`. It must"):
        run(fit_of(), 3)


def test_a_large_state_is_not_traced_for_it(used):
    run(Fit(fit_of().model | {"b": jnp.zeros(20_000)}, PLAIN), 3)
    assert used == []


def test_data_that_devices_share(used):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    where = NamedSharding(mesh, PartitionSpec("data"))
    data = jax.device_put(DATA, where)
    start = fit_of(rule=PLAIN)
    result = run(start, 20, data=data)
    assert used == []
    close(result.trainer.model, run(start, 20).trainer.model, rtol=1e-9)


def test_what_xla_refuses_is_left_to_the_other_way(monkeypatch, used):
    """Other processors may have other limits than those known here."""
    monkeypatch.setattr(
        one_function, "ALLOWED", one_function.ALLOWED | {"sort", "scatter-add"}
    )
    refused = Sorting(fit_of().model, PLAIN)
    result = run(refused, 5)
    assert used == [True]
    assert len(result.history) == 5
    again = run(result.trainer, 5)
    assert int(again.trainer.step_count) == 10


@pytest.mark.seams
def test_the_mark_is_on_the_loop(monkeypatch):
    """As XLA looks for it, on one call."""
    texts = []

    def spy(*args):
        texts.append(run_chunk.lower(*args).as_text())
        return run_chunk(*args)

    monkeypatch.setattr(one_trainer, "run_chunk", spy)
    run(fit_of(), 1)
    marked = [line for line in texts[0].splitlines() if "xla_cpu_small_call" in line]
    assert len(marked) == 1
    assert "call @" in marked[0]

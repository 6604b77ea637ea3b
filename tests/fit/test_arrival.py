"""Whether a fit that has converged is at a minimum."""

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn

X = np.linspace(-1, 1, 20)
Y = np.exp(1.3 * X) + 0.05 * np.cos(30 * X)
STOP = vn.Converged(1e-6, 50)


class Decay(vn.Trainer):
    """A loss without a known scale, which is NaN before a step."""

    def loss(self, model, batch):
        fitted = model["a"] * jnp.exp(model["k"] * X)
        loss = jnp.mean((fitted - jnp.asarray(Y)) ** 2)
        return jnp.where(self.step_count < batch, jnp.nan, loss)


def start():
    model = {"a": jnp.asarray(1.0), "k": jnp.asarray(0.0)}
    return Decay(model, optax.adam(0.05), nan_policy=vn.SkipStep())


def fit(trainer, batch=0, stop=STOP):
    return trainer.fit(jnp.asarray(batch), 20_000, stop=stop)


GOES_ON = {
    "at the minimum": lambda: fit(fit(start()).trainer),
    "close by": lambda: fit(start().fit(jnp.asarray(0), 220).trainer),
    "after a bad step": lambda: fit(start(), 1),
}


@pytest.mark.parametrize("case", GOES_ON)
def test_a_fit_that_goes_on_is_at_a_minimum_too(case):
    """It has no fall of its loss, by which to measure what is left, or no first one."""
    assert GOES_ON[case]().stop_reason is vn.StopReason.CONVERGED


def test_a_member_that_skipped_its_first_step_is_too():
    batch = jnp.asarray([0, 1, 200], "int32")
    options = {"stop": vn.Converged(1e-2, 10), "data_axis": 0}
    result = vn.fit_many([start()] * 3, batch, 20_000, **options)
    assert result.stop_reasons == (vn.StopReason.CONVERGED,) * 3


def test_a_fit_that_is_too_slow_is_not():
    slow = start().replace(optimiser=optax.adam(1e-6))
    result = fit(slow, stop=vn.Converged(1e-2, 10))
    assert result.stop_reason is vn.StopReason.STALLED


TIMES = jnp.linspace(0.0, 3.0, 30)
GAINS = jnp.asarray([1 + 1j, 2, -1j])


def waves(gains, rate):
    turns = lax.complex(jnp.cos(rate * TIMES), jnp.sin(rate * TIMES))
    return gains[:, None] * turns[None, :]


class Waves(vn.Trainer):
    """Complex gains, or their real and imaginary parts."""

    def residuals(self, model, batch):
        gains = model.get("gains")
        if gains is None:
            gains = lax.complex(model["re"], model["im"])
        return 10 * (waves(gains, model["rate"]) - batch)


class WavesByLoss(Waves):
    def loss(self, model, batch):
        return jnp.mean(jnp.square(jnp.abs(Waves.residuals(self, model, batch))))

    residuals = None


def real_and_complex(start):
    rate = jnp.asarray(1.2)
    real = {"re": jnp.full(3, start), "im": jnp.full(3, start), "rate": rate}
    return real, {"gains": jnp.full(3, start * (1 + 1j)), "rate": rate}


@pytest.mark.parametrize("kind", [Waves, WavesByLoss])
@pytest.mark.parametrize(
    ("rate", "rtol", "reason"),
    [(1e-9, 1e-3, vn.StopReason.STALLED), (1e-5, 1e-9, vn.StopReason.CONVERGED)],
)
def test_complex_parameters_have_arrived_if_their_parts_have(kind, rate, rtol, reason):
    batch, options = waves(GAINS, 1.3), {"stop": vn.Converged(rtol, 5)}
    # A mean over 90 numbers, for half their sum.
    optimiser = optax.sgd(rate * (45 if kind is WavesByLoss else 1))
    bounds = {"rate": (0.0, 1.25)}

    make = lambda model: kind(model, optimiser, bounds=bounds)
    trainers = [make(model) for model in real_and_complex(0.0)]
    real, own = (trainer.fit(batch, 5_000, **options) for trainer in trainers)
    assert own.stop_reason is real.stop_reason is reason
    if reason is vn.StopReason.STALLED:
        np.testing.assert_allclose(own.edm, real.edm, rtol=1e-6)
        assert "gains.real[1] (+" in own.explain()
    if kind is WavesByLoss:
        return
    other = make(real_and_complex(0.5)[1])
    many = vn.fit_many([trainers[1], other], batch, 5_000, **options)
    assert many.stop_reasons == (reason, reason)
    np.testing.assert_allclose(many.edms[0], own.edm, rtol=1e-6, atol=1e-12)


class BadAt(Decay):
    def loss(self, model, batch):
        loss = super().loss(model, 0)
        return jnp.where(self.step_count == batch, jnp.nan, loss)


@pytest.mark.parametrize("is_many", [False, True])
def test_the_last_loss_that_is_known_need_not_be_finite(is_many):
    trainer = BadAt(start().model, optax.adam(0.05), nan_policy=vn.SkipStep())
    stop, batch = vn.Converged(1e-2, 10), jnp.asarray(10**6)
    end = int(trainer.fit(batch, 20_000, stop=stop).trainer.step_count)
    # The step before the end that was recorded.
    every = 11
    bad, options = jnp.asarray(end // every * every), {"stop": stop, "every": every}
    if is_many:
        result = vn.fit_many([trainer] * 2, bad, 20_000, **options)
        assert set(result.stop_reasons) == {vn.StopReason.CONVERGED}
    else:
        result = trainer.fit(bad, 20_000, **options)
        assert result.stop_reason is vn.StopReason.CONVERGED
    assert np.isnan(result.history.loss[-1]).all()


def test_a_criterion_of_the_user_may_watch_a_validation():
    class Seen(vn.StopCriterion):
        def init(self, params):
            return None

        def apply(self, view, state):
            return view.is_validated, state

        def reason(self, state):
            return vn.StopReason.CONVERGED

        @property
        def needs_validation(self):
            return True

    model = {"a": jnp.asarray(1.0), "k": jnp.asarray(0.0)}
    data = jnp.asarray(X), jnp.asarray(Y)
    batches = vn.Minibatches(data, 5, key=jax.random.key(0))
    trainer = Exponential(model, optax.adam(1e-3))
    result = trainer.fit(batches, 9, stop=Seen(), validation=(data, 3))
    assert result.stop_reason is vn.StopReason.CONVERGED


class Exponential(vn.Trainer):
    def residuals(self, model, batch):
        return (model["a"] * jnp.exp(model["k"] * batch[0]) - batch[1]) / 0.05


@pytest.mark.parametrize("is_many", [False, True])
@pytest.mark.parametrize("rate", [1e-14, 3e-4])
def test_minibatches_of_all_examples_are_one_batch(rate, is_many):
    model = {"a": jnp.asarray(1.0), "k": jnp.asarray(0.0)}
    trainer = Exponential(model, optax.sgd(rate))
    data = jnp.asarray(X), jnp.asarray(Y)
    batches = vn.Minibatches(data, len(X), key=jax.random.key(0))
    found = []
    for batch in (data, batches):
        options = {"stop": vn.Converged(1e-9, 5), "progress": False}
        if is_many:
            result = vn.fit_many([trainer] * 2, batch, 4_000, **options)
            found.append((result.stop_reasons[1], result.edms[1]))
        else:
            result = trainer.fit(batch, 4_000, **options)
            found.append((result.stop_reason, result.edm))
    (reason, edm), (of_batches, edm_of_batches) = found
    assert reason is of_batches
    assert (reason is vn.StopReason.STALLED) == (rate < 1e-6)
    np.testing.assert_allclose(edm, edm_of_batches, rtol=1e-3, atol=1e-6)


def test_of_single_batches_it_is_not_known():
    model = {"a": jnp.asarray(1.0), "k": jnp.asarray(0.0)}
    trainer = Exponential(model, optax.adam(1e-3))
    data, stop = (jnp.asarray(X), jnp.asarray(Y)), vn.Converged(0.5, 5)
    batches = vn.Minibatches(data, 5, key=jax.random.key(0))
    with pytest.warns(UserWarning, match=r"`Converged` has ended it.*not checked"):
        vn.fit_many([trainer] * 2, batches, 2_000, stop=stop)
    with pytest.warns(UserWarning, match=r"`Converged` has ended it.*not checked"):
        trainer.fit(vn.Stream([data] * 2_000), 2_000, stop=stop)

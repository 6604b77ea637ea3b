"""Knowing when to stop: the validation, the best that follows it, the criteria."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings, strategies as st

import vernal as vn
from models import LineFit, TwoFit, line, line_batch, same, script, two

BATCH = line_batch()
HELD_OUT = (np.linspace(-1, 1, 5), np.linspace(-1, 1, 5) * 1.9 + 1.1)
# Held-out data that say otherwise: the best is on the way, not at the end.
AWAY = (np.asarray(BATCH[0]), 0.4 * np.asarray(BATCH[0]) - 0.2)
TRAINER = LineFit(line(), optax.sgd(0.1))
PATIENT = {"validation": (AWAY, 5), "stop": vn.Patience(3), "record": "slope"}


@functools.cache
def by_hand():
    """The score and the model after each step, as a loop of single steps has them."""
    trainer, scores, models = TRAINER, [], []
    for _ in range(20):
        trainer, _ = trainer.step(BATCH)
        scores.append(float(LineFit.loss(trainer, trainer.model, HELD_OUT)))
        models.append(trainer.model)
    return np.array(scores), models


# The validation.


@pytest.mark.filterwarnings("ignore:`validation`. it was not due")
@pytest.mark.parametrize("every", [1, 3, 20, 21])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_scores_are_of_the_model_after_so_many_steps(every, chunk):
    result = TRAINER.fit(BATCH, 20, validation=(HELD_OUT, every), chunk=chunk)
    scores, models = (after[every - 1 :: every] for after in by_hand())
    np.testing.assert_allclose(result.history.validation, scores, rtol=1e-12)
    steps = np.arange(every, 21, every)
    np.testing.assert_array_equal(result.history.validation_steps, steps)
    assert len(result.history.loss) == 20
    # It changes nothing of the fit.
    np.testing.assert_allclose(result.model.slope, by_hand()[1][-1].slope, rtol=1e-12)
    if len(scores):
        best = models[int(np.argmin(scores))]
        np.testing.assert_allclose(result.best.slope, best.slope, rtol=1e-12)
        assert float(result.trainer.best_loss) == result.history.validation.min()


def test_the_best_follows_the_validation_and_not_the_loss():
    result = TRAINER.fit(BATCH, 60, validation=(AWAY, 1))
    scores = result.history.validation
    assert 0 < np.argmin(scores) < 59
    there = LineFit(result.best, optax.sgd(0.1))
    assert float(LineFit.loss(there, result.best, AWAY)) == pytest.approx(scores.min())
    assert np.argmin(result.history.loss) == 59


class Judged(LineFit):
    def evaluate(self, model, batch):
        worst = jnp.max(jnp.abs(model(batch[0]) - batch[1]))
        return worst + 0 * self.step_count.astype(float)


def test_what_is_evaluated_is_the_users_to_say():
    trainer = Judged(line(), optax.sgd(0.1))
    result = trainer.fit(BATCH, 5, validation=(HELD_OUT, 5))
    worst = np.max(np.abs(result.model(HELD_OUT[0]) - HELD_OUT[1]))
    np.testing.assert_allclose(result.history.validation, [worst])


class Keyed(LineFit):
    def loss(self, model, batch, key):
        noise = 1e-3 * jax.random.normal(key)
        return super().loss(model, batch) + noise, {"noise": noise}

    def evaluate(self, model, batch):
        other = eqx.tree_at(lambda m: m.slope, model, model.slope + 1)
        loss = super().evaluate
        return jnp.maximum(loss(model, batch), loss(other, batch))


def test_the_default_scores_the_model_that_it_is_given():
    trainer = Keyed(line(5.0), optax.sgd(0.0), key=jax.random.key(0))
    result = trainer.fit(BATCH, 3, validation=(BATCH, 1))
    assert np.all(result.history.validation > result.history.loss + 0.1)


@pytest.mark.parametrize("data", ["minibatches", "stream"])
def test_validations_of_batches(data):
    source = {
        "minibatches": lambda: vn.Minibatches(BATCH, 4, key=jax.random.key(0)),
        "stream": lambda: vn.Stream(lambda step: (BATCH for _ in range(99))),
    }[data]
    result = TRAINER.fit(source(), 12, validation=(HELD_OUT, 4))
    np.testing.assert_array_equal(result.history.validation_steps, [4, 8, 12])


@pytest.mark.filterwarnings("ignore:`validation`. it was not due")
@pytest.mark.parametrize("cut", [1, 4, 6, 11])
def test_two_fits_with_a_validation_are_one(cut):
    options = {"validation": (HELD_OUT, 3), "record": "slope"}
    whole = TRAINER.fit(BATCH, 12, **options)
    first = TRAINER.fit(BATCH, cut, **options)
    second = first.trainer.fit(BATCH, 12 - cut, **options)
    assert same(second.trainer, whole.trainer)
    joined = first.history + second.history
    assert same(
        jax.tree.map(jnp.asarray, joined), jax.tree.map(jnp.asarray, whole.history)
    )


def test_scores_of_another_kind_do_not_compare():
    """A loss far below every score of the validation does not remain the best."""
    far = (BATCH[0], BATCH[1] + 100)
    low = TRAINER.fit(BATCH, 50).trainer
    validated = low.fit(BATCH, 2, validation=(far, 1)).trainer
    assert float(validated.best_loss) > 1e3
    assert same(validated.best, validated.model)
    for again in (validated.fit(BATCH, 1).trainer, validated.step(BATCH)[0]):
        assert float(again.best_loss) < 1
        assert same(again.best, validated.model)


def test_a_score_that_is_not_finite_is_never_the_best():
    class Odd(LineFit):
        def evaluate(self, model, batch):
            return jnp.where(self.step_count == 2, -jnp.inf, jnp.nan + 0 * batch)

    trainer = Odd(line(), optax.sgd(0.1))
    with pytest.warns(UserWarning, match="no score was finite"):
        result = trainer.fit(BATCH, 4, validation=(jnp.array(0.0), 1))
    assert np.isinf(result.trainer.best_loss)
    assert result.history.validation[1] == -np.inf


def test_a_validation_that_is_never_due_is_told():
    options = {"validation": (BATCH, 100)}
    with pytest.warns(UserWarning, match="`validation`: it was not due within the 4"):
        result = TRAINER.fit(BATCH, 4, **options)
    assert same(result.best, TRAINER.model)
    with pytest.warns(UserWarning, match="not due"):
        vn.fit_many([TRAINER, TRAINER.replace(model=line(2.0))], BATCH, 4, **options)
    # A part of a longer fit, in which it is due, has nothing to tell.
    result.trainer.fit(BATCH, 96, **options)


# The criteria.


def converged_by_hand(losses, rtol, patience, atol):
    """How many steps a fit with these losses takes."""
    reference, waited = np.inf, 0
    for index, loss in enumerate(losses):
        fell = loss < reference - max(rtol * abs(reference), atol)
        if fell or np.isinf(reference):
            reference, waited = loss, 0
        else:
            waited += 1
        if waited >= patience:
            return index + 1
    return len(losses)


class Told(vn.Trainer):
    """Its losses are those of the batch, at a minimum: it starts at 1, and stays."""

    def loss(self, model, batch):
        return batch[self.step_count] + (model - 1) ** 2

    def evaluate(self, model, batch):
        return batch[self.step_count]


def told(losses, room=24):
    padded = np.concatenate([losses, np.full(room - len(losses), losses[-1])])
    return jnp.asarray(padded, float)


TOLD = Told(jnp.array(1.0), optax.sgd(0.1), nan_policy=vn.SkipStep())


# A slow fall adds up, within three steps to more than five, and to less.
@example([100.0 - 2 * i for i in range(20)], (0.0, 3, 5.0))
@example([100.0 - i for i in range(20)], (0.0, 3, 5.0))
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=20),
    st.sampled_from([(0.1, 1, 0.0), (0.0, 3, 5.0), (0.5, 2, 1.0)]),
)
def test_convergence_is_what_it_says(losses, options):
    rtol, patience, atol = options
    stop = vn.Converged(rtol, patience, atol=atol)
    result = TOLD.fit(told(losses), len(losses), stop=stop)
    expected = converged_by_hand(losses, rtol, patience, atol)
    assert int(result.trainer.step_count) == expected
    if expected < len(losses):
        assert result.stop_reason is vn.StopReason.CONVERGED


def test_steps_that_are_not_taken_are_no_convergence():
    losses = [3.0, np.nan, np.nan, np.nan, np.nan, 2.0, 2.0, 2.0, 1.0]
    result = TOLD.fit(told(losses), 9, stop=vn.Converged(1e-3, 2))
    assert int(result.trainer.step_count) == 8
    assert result.stop_reason is vn.StopReason.CONVERGED


@pytest.mark.filterwarnings("ignore:`validation`. no score was finite")
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 9) | st.just(np.nan), min_size=1, max_size=20),
    st.sampled_from([1, 3]),
)
def test_patience_is_what_it_says(scores, n):
    batch = told([0.0, *scores])
    result = TOLD.fit(batch, len(scores), validation=(batch, 1), stop=vn.Patience(n))
    lowest, waited, expected = np.inf, 0, len(scores)
    for index, score in enumerate(scores):
        lowest, waited = (score, 0) if score < lowest else (lowest, waited + 1)
        if waited >= n:
            expected = index + 1
            break
    assert int(result.trainer.step_count) == expected
    ended = result.stop_reason is vn.StopReason.NO_PATIENCE
    assert ended == (waited >= n)


def test_patience_counts_validations_and_not_steps():
    result = TRAINER.fit(BATCH, 500, **PATIENT)
    scores = result.history.validation
    assert len(scores) == np.argmin(scores) + 4
    assert int(result.trainer.step_count) == 5 * len(scores)
    assert result.stop_reason is vn.StopReason.NO_PATIENCE
    assert "patience" in str(result.stop_reason)


def test_a_patience_longer_than_any_fit():
    """More than is counted, without JAX's 64 bits."""
    never = 2**40
    stop = vn.Converged(1e-3, never) | vn.Patience(never)
    with jax.enable_x64(False):
        policy = vn.SkipStep() | vn.StopAfter(never)
        trainer = Level(jnp.array(1.0), optax.sgd(0.1), nan_policy=policy)
        result = trainer.fit(0.0, 3, stop=stop, validation=(0.0, 1))
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN


class Level(vn.Trainer):
    def loss(self, model, batch):
        return 0 * model + batch


class Flat(vn.StopCriterion):
    """One of the user's own, with a state and an array in it."""

    norm: jax.Array

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params), 0

    def apply(self, view, state):
        _, count = state
        small = optax.tree.norm(view.grads) < self.norm
        return small, (view.params, count + 1)


def test_a_criterion_of_ones_own():
    result = TRAINER.fit(BATCH, 5000, stop=Flat(jnp.array(1e-3)), record="grad_norm")
    assert result.history["grad_norm"][-1] < 1e-3 <= result.history["grad_norm"][-2]
    assert result.stop_reason is vn.StopReason.CRITERION
    other = eqx.debug.assert_max_traces(TRAINER.fit, max_traces=None)
    assert len(other(BATCH, 9, stop=Flat(jnp.array(1e9))).history) == 1


@pytest.mark.parametrize(
    ("stop", "reason", "steps"),
    [
        # With a tolerance as wide as this, the minimum is still far away.
        (vn.Converged(0.99, 2) | Flat(jnp.array(1e9)), "CRITERION", 1),
        (vn.Converged(0.99, 2) | Flat(jnp.array(0.0)), "STALLED", 3),
        (vn.Patience(9) | Flat(jnp.array(1e9)) | vn.Converged(0.99, 2), "CRITERION", 1),
        (vn.Patience(9) | Flat(jnp.array(0.0)) | vn.Converged(0.99, 2), "STALLED", 3),
    ],
)
def test_either_of_two(stop, reason, steps):
    result = TRAINER.fit(BATCH, 20, stop=stop, validation=(HELD_OUT, 1))
    assert result.stop_reason is vn.StopReason[reason]
    assert len(result.history) == steps


def test_the_end_of_a_fit_is_not_the_end_of_the_trainer():
    stop = vn.Converged(1e-3, 3)
    first = TRAINER.fit(BATCH, 500, stop=stop)
    assert not first.trainer.stopped
    again = first.trainer.fit(BATCH, 5)
    assert len(again.history) == 5
    assert len(first.trainer.fit(BATCH, 500, stop=stop).history) == 4


def test_a_bad_step_comes_before_a_criterion():
    trainer = TwoFit(two(), optax.sgd(0.1), nan_policy=vn.StopFit())
    stop = vn.Converged(1e9, 1)
    batch = jax.tree.map(lambda x: x[0], script("a"))
    result = trainer.fit(batch, 20, stop=stop)
    assert result.stop_reason is vn.StopReason.NON_FINITE


def test_other_data_thresholds_and_intervals_compile_nothing():
    count = 0

    class Counted(LineFit):
        def loss(self, model, batch):
            nonlocal count
            count += 1
            return super().loss(model, batch)

    trainer = Counted(line(), optax.sgd(0.1))
    options = {"validation": (HELD_OUT, 3), "stop": Flat(jnp.array(1e-3))}
    first = trainer.fit(BATCH, 20, **options)
    traced = count
    other = tuple(2 * x for x in HELD_OUT)
    trainer.fit(BATCH, 31, validation=(other, 7), stop=Flat(jnp.array(1e-1)))
    first.trainer.fit(BATCH, 20, **options)
    assert count == traced


def test_a_converged_fit_is_over_within_a_chunk():
    result = TRAINER.fit(BATCH, 10**6, stop=vn.Converged(1e-6, 5), every=10**6)
    assert int(result.trainer.step_count) < 1000


# Kept with the fit.


def test_checkpoints_remember_how_patient_they_have_been(tmp_path):
    whole = TRAINER.fit(BATCH, 500, **PATIENT)
    taken = int(whole.trainer.step_count)
    run = lambda steps, **new: TRAINER.fit(
        BATCH, steps, **{**PATIENT, **new, "checkpoint": vn.Checkpoints(tmp_path)}
    )
    for steps in (taken - 12, taken - 7, taken - 1):
        run(steps)
    result = run(500)
    assert same(result.trainer, whole.trainer)
    assert result.stop_reason is whole.stop_reason
    for name in ("loss", "slope", "validation", "validation_steps"):
        np.testing.assert_array_equal(result.history[name], whole.history[name])

    again = run(500)
    assert again.stop_reason is whole.stop_reason
    assert len(again.history) == taken
    # Another criterion begins to count anew: the first score is the lowest to it.
    longer = run(500, stop=vn.Patience(5))
    assert int(longer.trainer.step_count) == taken + 30


# What goes wrong.


class Labelled(vn.StopCriterion):
    reason: str

    def init(self, params):
        return None

    def apply(self, view, state):
        return True, state


def test_a_field_that_hides_a_method_is_refused_where_it_is_made():
    with pytest.raises(TypeError, match="`Labelled`: `reason` is a method of every"):
        Labelled("far")


class Forgetful(vn.StopCriterion):
    answer: object = eqx.field(static=True)

    def init(self, params):
        return jnp.array(0)

    def apply(self, view, state):
        return self.answer


@pytest.mark.own_words
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"stop": vn.Patience(2)}, ValueError, r"`stop` is Patience.*validation=\(b"),
        ({"stop": vn.Patience}, TypeError, r"Did you mean `Patience\(\.\.\.\)`"),
        ({"stop": 3}, TypeError, r"`stop` is 3.*vn\.Converged"),
        ({"stop": vn.Converged(0, 1) | vn.Patience(1)}, ValueError, "watches a val"),
        ({"validation": BATCH + BATCH}, TypeError, "pair.*a tuple of 4"),
        ({"validation": [BATCH, 3]}, TypeError, "pair.*list"),
        ({"validation": (BATCH, 0)}, ValueError, r"validation\[1\].*at least 1"),
        ({"validation": (BATCH, 2.5)}, TypeError, r"validation\[1\]"),
        (
            {"validation": (vn.Minibatches(BATCH, 2, key=jax.random.key(0)), 3)},
            TypeError,
            "`validation` must be one batch, not a Minibatches",
        ),
        ({"validation": (["a", object()], 1)}, TypeError, "."),
        ({"stop": Forgetful(True)}, TypeError, "must return `.whether to stop"),
        ({"stop": Forgetful((1.0, 0))}, TypeError, "a boolean scalar"),
        ({"stop": Forgetful((True, None))}, ValueError, "state that `Forgetful"),
    ],
)
def test_what_cannot_be(options, error, match):
    with pytest.raises(error, match=match):
        TRAINER.fit(BATCH, 20, **options)


def test_a_score_must_be_a_scalar():
    class Pair(LineFit):
        def evaluate(self, model, batch):
            return model(batch[0])

    with pytest.raises(
        ValueError, match=r"`Pair\.evaluate` returned an array of shape"
    ):
        Pair(line(), optax.sgd(0.1)).fit(BATCH, 20, validation=(HELD_OUT, 1))


@pytest.mark.own_words
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: vn.Converged(-1e-3, 5), "`rtol` is -0.001"),
        (lambda: vn.Converged(np.nan, 5), "`rtol` is nan"),
        (lambda: vn.Converged("1", 5), "`rtol` is '1'"),
        (lambda: vn.Converged(1e-3, 0), "`patience`"),
        (lambda: vn.Converged(1e-3, 5, atol=-1), "`atol` is -1"),
        (lambda: vn.Patience(0), "`n`"),
    ],
)
def test_criteria_that_cannot_be(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_what_composes():
    with pytest.raises(TypeError, match="cannot compose a StopCriterion with 3"):
        vn.Patience(2) | 3


def test_what_was_seen_of_another_model_says_nothing_of_this_one():
    """A callback that replaces the model begins anew; another rate does not."""
    options = {**PATIENT, "chunk": 5}
    plain = TRAINER.fit(BATCH, 500, **options)
    taken = int(plain.trainer.step_count)

    def changed(**parts):
        def callback(trainer, history):
            if trainer.step_count == taken - 5:
                return trainer.replace(**parts)
            return None

        result = TRAINER.fit(BATCH, 500, callback=callback, **options)
        return int(result.trainer.step_count)

    assert changed(model=line()) == taken - 5 + taken
    assert changed(optimiser=optax.sgd(0.1)) == taken


def test_with_the_hunt_for_nan_turned_on():
    with jax.debug_nans(True):
        result = TRAINER.fit(
            BATCH, 5, validation=(HELD_OUT, 2), stop=vn.Converged(1e-9, 3)
        )
        assert len(result.history.validation) == 2

"""What a fit records."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import vernal as vn
from models import LineFit, Pull, line, line_batch, zoo

BATCH = line_batch()


class Told(LineFit):
    def loss(self, model, batch):
        residuals = model(batch[0]) - batch[1]
        told = {"worst": jnp.max(jnp.abs(residuals)), "n": len(residuals)}
        return jnp.mean(residuals**2), told


TRAINER = Told(line(), optax.sgd(0.1))
FULL = ("grad_norm", "slope", "offset", "worst", "n")


def fit(steps=12, trainer=TRAINER, **options):
    return trainer.fit(BATCH, steps, **{"progress": False, **options})


def test_the_values_are_those_before_the_update():
    history = fit(record=FULL).history
    trainer = TRAINER
    for i in range(12):
        assert history["slope"][i] == pytest.approx(float(trainer.model.slope))
        trainer, info = trainer.step(BATCH)
        assert history.loss[i] == pytest.approx(float(info.loss))
        assert history["grad_norm"][i] == pytest.approx(float(info.grad_norm))
        assert history["worst"][i] == pytest.approx(float(info.metrics["worst"]))
    np.testing.assert_array_equal(history.steps, range(12))
    np.testing.assert_array_equal(history["n"], 16)
    assert set(history.records) == set(FULL)


@pytest.mark.parametrize("every", [1, 2, 5, 12, 13, 100])
@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_every_thins_all_of_it(every, chunk):
    full = fit(record=FULL).history
    thin = fit(record=FULL, every=every, chunk=chunk).history
    np.testing.assert_array_equal(thin.steps, np.arange(0, 12, every))
    np.testing.assert_array_equal(thin.loss, full.loss[::every])
    for name in FULL:
        np.testing.assert_array_equal(thin[name], full[name][::every])


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_thinned_histories_join_as_one(first):
    begun = fit(first, every=3, record="slope")
    rest = fit(12 - first, begun.trainer, every=3, record="slope")
    joined, whole = begun.history + rest.history, fit(every=3, record="slope").history
    np.testing.assert_array_equal(joined.steps, whole.steps)
    np.testing.assert_array_equal(joined["slope"], whole["slope"])


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ((), set()),
        ([], set()),
        ("slope", {"slope"}),
        ("grad_norm", {"grad_norm"}),
        ("worst", {"worst"}),
        (("slope", "slope"), {"slope"}),
        ("*", {"slope", "offset"}),
        ((("slope", "offset"),), {"slope", "offset"}),
        (lambda path, leaf: path == "offset", {"offset"}),
        (("grad_norm", lambda path, leaf: True), {"grad_norm", "slope", "offset"}),
    ],
)
def test_what_can_be_recorded(record, names):
    history = fit(2, record=record).history
    assert set(history.records) == names
    assert all(len(values) == 2 for values in history.records.values())


def test_nodes_and_arrays_of_any_shape_and_dtype():
    trainer = Pull(zoo(), optax.sgd(0.1))
    history = trainer.fit(
        jnp.asarray(0.0), 3, record=("layers", "pair", "wave"), progress=False
    ).history
    assert history["layers.0.weight"].shape == (3, 2, 3)
    assert history["wave"].dtype == complex
    assert history["pair.left"].dtype == np.float32
    np.testing.assert_allclose(history["wave"][1], 0.8 * history["wave"][0])


def test_only_the_trained_part_of_a_selection_is_kept():
    trainer = Told(line(), optax.sgd(0.1), train="slope")
    assert set(fit(2, trainer, record="*").history.records) == {"slope"}
    with pytest.raises(ValueError, match=r"`record`.*frozen"):
        fit(2, trainer, record="offset")


def test_lookup():
    history = fit(3, record="slope").history
    assert history["loss"] is history.loss
    assert history["steps"] is history.steps
    assert isinstance(history.loss, np.ndarray)
    assert len(history) == 3
    with pytest.raises(vn.UnknownPathError, match=r"no 'slop'.*'slope'.*record="):
        history["slop"]
    assert repr(history).startswith("History(3 rows, steps 0 to 2, loss 4.85 to ")
    assert repr(fit(0).history) == "History(empty)"


def test_histories_of_different_records_do_not_join():
    with pytest.raises(ValueError, match=r"same.*\['slope'\].*\[\]"):
        _ = fit(2, record="slope").history + fit(2).history
    with pytest.raises(TypeError):
        _ = fit(2).history + 3


@pytest.mark.parametrize("record", ["layers", "wave", "scalar", "grad_norm"])
def test_an_empty_history_joins_on_either_side(record):
    trainer = Pull(zoo(), optax.sgd(0.1))
    run = lambda n: trainer.fit(jnp.asarray(0.0), n, record=record, progress=False)
    empty, full = run(0).history, run(2).history
    for joined in (empty + full, full + empty):
        assert len(joined) == 2
        for name, values in full.records.items():
            np.testing.assert_array_equal(joined[name], values)
            assert joined[name].dtype == values.dtype
        assert joined.steps.dtype == full.steps.dtype


def test_a_history_is_the_users_own():
    result = fit(4, record="slope")
    result.history.loss[:] = 0
    assert fit(4, record="slope").history.loss[0] > 0


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_any_cuts_and_any_thinning(cuts, every):
    trainer, parts = TRAINER, []
    for steps in cuts:
        result = fit(steps, trainer, every=every)
        trainer = result.trainer
        parts.append(result.history)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + part
    np.testing.assert_array_equal(joined.steps, np.arange(0, sum(cuts), every))

"""What a fit records."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import vernal as vn
from models import LineFit, Pull, TwoFit, line, line_batch, same, script, two, zoo

BATCH = line_batch()


class Told(LineFit):
    def loss(self, model, batch):
        residuals = model(batch[0]) - batch[1]
        told = {"worst": jnp.max(jnp.abs(residuals)), "n": len(residuals)}
        return jnp.mean(residuals**2), told


TRAINER = Told(line(), optax.sgd(0.1))
FULL = ("grad_norm", "slope", "offset", "worst", "n")


def test_the_values_are_those_before_the_update():
    history = TRAINER.fit(BATCH, 12, record=FULL).history
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
    full = TRAINER.fit(BATCH, 12, record=FULL).history
    thin = TRAINER.fit(BATCH, 12, record=FULL, every=every, chunk=chunk).history
    np.testing.assert_array_equal(thin.steps, np.arange(0, 12, every))
    np.testing.assert_array_equal(thin.loss, full.loss[::every])
    for name in FULL:
        np.testing.assert_array_equal(thin[name], full[name][::every])


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_thinned_histories_join_as_one(first):
    begun = TRAINER.fit(BATCH, first, every=3, record="slope")
    rest = begun.trainer.fit(BATCH, 12 - first, every=3, record="slope")
    joined, whole = (
        begun.history + rest.history,
        TRAINER.fit(BATCH, 12, every=3, record="slope").history,
    )
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
    assert set(TRAINER.fit(BATCH, 0, record=record).history.records) == names


def test_nodes_and_arrays_of_any_shape_and_dtype():
    trainer = Pull(zoo(), optax.sgd(0.1))
    history = trainer.fit(
        jnp.asarray(0.0), 3, record=("layers", "pair", "wave")
    ).history
    assert history["layers.0.weight"].shape == (3, 2, 3)
    assert history["wave"].dtype == complex
    assert history["pair.left"].dtype == np.float32
    np.testing.assert_allclose(history["wave"][1], 0.8 * history["wave"][0])


def test_only_the_trained_part_of_a_selection_is_kept():
    trainer = Told(line(), optax.sgd(0.1), train="slope")
    assert set(trainer.fit(BATCH, 2, record="*").history.records) == {"slope"}
    with pytest.raises(ValueError, match=r"`record`.*frozen"):
        trainer.fit(BATCH, 2, record="offset")


def test_lookup():
    history = TRAINER.fit(BATCH, 3, record="slope").history
    assert history["loss"] is history.loss
    assert history["steps"] is history.steps
    assert "loss" in history
    assert "nothing" not in history
    assert 0 not in history
    assert isinstance(history.loss, np.ndarray)
    assert len(history) == 3
    with pytest.raises(vn.UnknownPathError, match=r"no 'slop'.*'slope'.*record="):
        history["slop"]
    assert repr(history).startswith("History(3 rows, steps 0 to 2, loss 4.85 to ")
    assert repr(TRAINER.fit(BATCH, 0).history) == "History(empty)"


def test_histories_of_different_records_do_not_join():
    with pytest.raises(ValueError, match=r"same.*\['slope'\].*\[\]"):
        _ = (
            TRAINER.fit(BATCH, 2, record="slope").history
            + TRAINER.fit(BATCH, 2).history
        )
    with pytest.raises(TypeError):
        _ = TRAINER.fit(BATCH, 2).history + 3
    wide = vn.History(np.arange(2), np.zeros(2), {"slope": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"the shape \(\) in one, and \(3,\)"):
        _ = TRAINER.fit(BATCH, 2, record="slope").history + wide


@pytest.mark.own_words
@pytest.mark.parametrize("name", [0, slice(2), None, ("loss", 0), 1.5])
def test_rows_are_taken_of_a_column(name):
    with pytest.raises(TypeError, match=r"the name of a column.*history\.loss\[0\]"):
        TRAINER.fit(BATCH, 2).history[name]


def test_an_empty_history_joins_on_either_side():
    trainer = Pull(zoo(), optax.sgd(0.1))
    record = ("layers", "wave", "scalar", "grad_norm")
    run = lambda n: trainer.fit(jnp.asarray(0.0), n, record=record)
    empty, full = run(0).history, run(2).history
    assert {*record[1:], "layers.0.weight"} <= {*full.records}
    for joined in (empty + full, full + empty):
        assert len(joined) == 2
        for name, values in full.records.items():
            np.testing.assert_array_equal(joined[name], values)
            assert joined[name].dtype == values.dtype
        assert joined.steps.dtype == full.steps.dtype


def test_a_history_is_the_users_own():
    result = TRAINER.fit(BATCH, 4, record="slope")
    result.history.loss[:] = 0
    assert TRAINER.fit(BATCH, 4, record="slope").history.loss[0] > 0


def test_a_callback_is_given_nothing_to_change():
    """What it sees is a part of the result."""

    def change(trainer, history):
        for column in history.to_dict().values():
            with pytest.raises(ValueError, match="read-only"):
                column.fill(-1)
        history.records.clear()
        trainer.nan_report().clear()

    options = {"record": "slope", "validation": (BATCH, 2), "chunk": 5}
    result, expected = (
        TRAINER.fit(BATCH, 12, **options, callback=change),
        TRAINER.fit(BATCH, 12, **options),
    )
    assert same((result.trainer, result.history), (expected.trainer, expected.history))


def test_arrays_that_are_changed_while_a_fit_goes_on():
    """A fit has copies of its own of what it was given."""
    x, y = (np.array(column) for column in BATCH[:2])
    scored = (np.array(BATCH[0]), np.array(BATCH[1]))

    def change(trainer, history):
        for column in (x, y, *scored):
            column.fill(-1)

    def reused(step):
        for k in range(step, 20):
            x[:], y[:] = BATCH[0], BATCH[1] + k
            yield x, y

    fresh = lambda step: ((BATCH[0], BATCH[1] + k) for k in range(step, 20))
    run = lambda data, **options: TRAINER.fit(data, 12, **options)
    expected = run(BATCH[:2], validation=(BATCH[:2], 3), chunk=2)
    result = run((x, y), validation=(scored, 3), chunk=2, callback=change)
    assert same((result.trainer, result.history), (expected.trainer, expected.history))
    assert same(run(vn.Stream(reused)).trainer, run(vn.Stream(fresh)).trainer)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_any_cuts_and_any_thinning(cuts, every):
    trainer, parts = TRAINER, []
    for steps in cuts:
        result = trainer.fit(BATCH, steps, every=every)
        trainer = result.trainer
        parts.append(result.history)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + part
    np.testing.assert_array_equal(joined.steps, np.arange(0, sum(cuts), every))


# The norms of each rule.


RULES = {
    ("scalar", "pair"): optax.sgd(0.1),
    "layers.*.bias": optax.adam(0.01),
    "wave": None,
}
NAMES = ("scalar, pair", "layers.*.bias", "default")


def norm(leaves):
    return np.sqrt(sum(np.sum(np.abs(np.asarray(leaf)) ** 2) for leaf in leaves))


def test_norms_of_each_rule():
    optimiser = vn.ParamOptimiser(RULES, default=optax.sgd(0.3))
    trainer = Pull(zoo(), optimiser)
    record = ("grad_norms", "update_ratios", "grad_norm", "**")
    batch = jnp.asarray(0.5)
    result = trainer.fit(batch, 4, record=record)
    history = result.history
    names = ["grad_norm", *(f"grad_norm[{name}]" for name in NAMES)]
    names += [f"update_ratio[{name}]" for name in NAMES]
    assert set(history.records) == {*names, *vn.paths(trainer.params)}
    own = {
        "scalar, pair": ("scalar", "pair.left", "pair.right.0"),
        "layers.*.bias": ("layers.0.bias", "layers.1.bias"),
    }
    ruled = {path for paths in own.values() for path in paths}
    own["default"] = tuple(p for p in vn.paths(trainer.params) if p not in ruled)
    total = sum(history[f"grad_norm[{name}]"] ** 2 for name in NAMES)
    np.testing.assert_allclose(total, history["grad_norm"] ** 2, rtol=1e-6)
    for name, paths in own.items():
        for step in range(3):
            now = [history[path][step] for path in paths]
            then = [history[path][step + 1] for path in paths]
            # The gradient of a sum of squares.
            grads = norm([2 * (leaf - 0.5) for leaf in now])
            assert history[f"grad_norm[{name}]"][step] == pytest.approx(grads, rel=1e-6)
            moved = [b - a for a, b in zip(now, then, strict=True)]
            ratio = history[f"update_ratio[{name}]"][step]
            assert ratio == pytest.approx(norm(moved) / norm(now), rel=1e-5)


def test_without_rules_each_parameter_is_one():
    history = TRAINER.fit(BATCH, 3, record=("update_ratios", "slope")).history
    assert set(history.records) == {
        "update_ratio[slope]",
        "update_ratio[offset]",
        "slope",
    }
    moved = np.abs(np.diff(history["slope"]) / history["slope"][:-1])
    np.testing.assert_allclose(history["update_ratio[slope]"][:-1], moved, rtol=1e-12)


def test_a_step_that_is_not_taken_is_no_update():
    policy = vn.SkipStep()
    trainer = TwoFit(two(), optax.sgd(0.1), nan_policy=policy)
    batch = jax.tree.map(lambda x: x[0], script("a"))
    history = trainer.fit(batch, 2, record=("update_ratios", "grad_norms")).history
    np.testing.assert_array_equal(history["update_ratio[a]"], 0)
    assert np.isnan(history["grad_norm[a]"]).all()
    assert np.isfinite(history["grad_norm[b]"]).all()


def test_rules_of_the_same_name():
    rules = {
        lambda p, _: p == "slope": optax.sgd(0.1),
        lambda p, _: p == "offset": optax.adam(0.1),
    }
    trainer = Told(line(), vn.ParamOptimiser(rules))
    history = trainer.fit(BATCH, 2, record="grad_norms").history
    assert set(history.records) == {"grad_norm[<lambda> 1]", "grad_norm[<lambda> 2]"}


# Elsewhere.


@pytest.mark.parametrize("options", [{}, {"validation": (BATCH, 5), "record": FULL}])
def test_a_history_in_a_file(tmp_path, options):
    history = TRAINER.fit(BATCH, 12, **options).history
    history.save(tmp_path / "history")
    back = vn.History.load(tmp_path / "history")
    assert list(back.to_dict()) == list(history.to_dict())
    for name, column in history.to_dict().items():
        np.testing.assert_array_equal(back[name], column)
        assert back[name].dtype == column.dtype
    with np.load(tmp_path / "history") as archive:
        np.testing.assert_array_equal(archive["loss"], history.loss)
    assert len(back + history) == 24


def test_a_history_as_a_dictionary():
    told = TRAINER.fit(BATCH, 12, record="slope").history.to_dict()
    assert list(told) == ["steps", "loss", "slope"]
    scored = TRAINER.fit(
        BATCH, 12, record="slope", validation=(BATCH, 5)
    ).history.to_dict()
    assert list(scored) == ["steps", "loss", "validation", "validation_steps", "slope"]
    assert list(scored["validation_steps"]) == [5, 10]


def test_files_that_are_no_history(tmp_path):
    vn.save(tmp_path / "trainer", TRAINER)
    with pytest.raises(vn.MismatchError, match="another tree than a History"):
        vn.History.load(tmp_path / "trainer")
    (tmp_path / "other").write_text("steps, loss")
    with pytest.raises(vn.ForeignFileError):
        vn.History.load(tmp_path / "other")


@pytest.mark.parametrize("name", ["steps", "loss", "validation"])
def test_what_is_called_as_a_column(name):
    class Odd(LineFit):
        def loss(self, model, batch):
            return super().loss(line(model[name]), batch), {}

    class Told(LineFit):
        def loss(self, model, batch):
            return super().loss(model, batch), {name: jnp.array(3.0)}

    for trainer in (
        Odd({name: jnp.array(1.0)}, optax.sgd(0.1)),
        Told(line(), optax.sgd(0.1)),
    ):
        with pytest.raises(ValueError, match=f"`record`: '{name}' is a column of"):
            trainer.fit(BATCH, 2, record=(name,))


def test_norms_of_small_dtypes():
    trainer = Pull({"a": jnp.full(4, 100.0, jnp.float16)}, optax.sgd(0.0))
    batch = jnp.asarray(0.0, jnp.float16)
    history = trainer.fit(batch, 1, record="grad_norm").history
    np.testing.assert_allclose(history["grad_norm"], 400)


def test_a_node_that_was_recorded_is_not_a_column():
    class Nested(LineFit):
        def loss(self, model, batch):
            return super().loss(line(model["n"]["b"]), batch), {}

    trainer = Nested({"n": {"b": jnp.array(1.0)}}, optax.sgd(0.1))
    history = trainer.fit(BATCH, 2, record=("n",)).history
    with pytest.raises(vn.UnknownPathError, match=r"'n', which is a node.* 'n\.b'"):
        history["n"]

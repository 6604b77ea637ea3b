"""Residuals that are zero whatever the parameters count as data, and it is said."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optimistix as optx
import pytest

import vernal as vn

LM = optx.LevenbergMarquardt(1e-8, 1e-8)
X = np.linspace(0, 1, 30)
Y = 1 + 2 * X + np.sin(40 * X) / 2
THERE = np.arange(30) % 3 == 0


class ByHand(vn.Trainer):
    def residuals(self, model, batch):
        x, y, there = batch
        return jnp.where(there, model["a"] + model["b"] * x - y, 0.0)


class ByWhere(vn.Trainer):
    def residuals(self, model, batch):
        x, y, there = batch
        return vn.likelihoods.Gaussian(model["a"] + model["b"] * x, y, where=there)


class Left(vn.Trainer):
    """Without the data that are missing."""

    def residuals(self, model, batch):
        x, y, _ = batch
        return (model["a"] + model["b"] * x - y)[np.flatnonzero(THERE)]


BATCH = X, Y, THERE


@functools.cache
def solved(kind):
    slope, offset = np.polyfit(X[THERE], Y[THERE], 1)
    return kind({"a": jnp.array(offset), "b": jnp.array(slope)})


@functools.cache
def many(kind):
    data = X, np.stack([Y, Y[::-1], Y]), np.stack([THERE, THERE | True, THERE])
    start = {"a": jnp.array(0.0), "b": jnp.array(0.0)}
    options = {"solver": LM, "data_axis": (None, 0, 0)}
    return vn.fit_many([kind(start)] * 3, data, 50, **options), data


SCALED = {"scale_errors": True}
# What asks for errors of the scale of the residuals, and how it names their member.
CALLS = {
    "report": (lambda kind: solved(kind).report(BATCH, **SCALED), ""),
    "table": (lambda kind: solved(kind).table(BATCH, **SCALED), ""),
    "errors": (lambda kind: solved(kind).standard_errors(BATCH, **SCALED), ""),
    "propagate": (
        lambda kind: solved(kind).propagate(lambda m: m["a"], BATCH, **SCALED),
        "",
    ),
    "draw": (lambda kind: solved(kind).draw(jax.random.key(0), 3, BATCH, **SCALED), ""),
    "profile": (lambda kind: solved(kind).profile(LM, BATCH, "a", **SCALED), ""),
    "intervals": (lambda kind: solved(kind).intervals(LM, BATCH, **SCALED), ""),
    "many": (
        lambda kind: many(kind)[0].errors(many(kind)[1], **SCALED),
        r" of member 0 \(and of 1 more\)",
    ),
    "many, table": (
        lambda kind: many(kind)[0].table(many(kind)[1], **SCALED),
        r" of member 0 \(and of 1 more\)",
    ),
    "many, report": (
        lambda kind: many(kind)[0].report(2, many(kind)[1], **SCALED),
        "",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_mask_by_hand_counts_with_a_word_and_no_other(name):
    call, where = CALLS[name]
    call(ByWhere)
    many(ByHand), solved(ByHand)
    told = f"^20 of 30 residuals{where} are exactly zero.*`data_count=`"
    with pytest.warns(UserWarning, match=told) as said:
        call(ByHand)
    assert len(said) == 1


def test_told_the_number_of_data_a_report_is_right_and_silent():
    for scaled in ({}, SCALED):
        ours = solved(ByHand).report(BATCH, data_count=10, **scaled)
        theirs = solved(ByWhere).report(BATCH, **scaled)
        np.testing.assert_allclose(ours.p_value, theirs.p_value)
        np.testing.assert_allclose(ours["b"].error, theirs["b"].error)


def test_a_report_has_a_note_of_a_mask_by_hand():
    told = r"^20 of 30 residuals are exactly zero.*p-value too large.*`data_count=`$"
    for kind, is_said in ((ByHand, True), (ByWhere, False)):
        result, data = many(kind)
        alone, third = solved(kind).report(BATCH), result.report(2, data)
        # Its errors are of few data, and a line says that too.
        by_sandwich = solved(kind).report(BATCH, kind="sandwich").note
        assert bool(re.search(told, by_sandwich, re.MULTILINE)) is is_said
        for report in (alone, third):
            assert bool(report.note) is is_said
            assert not is_said or re.search(told, report.note)
            assert str(report).endswith(f"\n\n{report.note}") is is_said
            assert report.to_dict()["note"] == report.note
        # All of its data are there, and scatter too little.
        assert "exactly zero" not in result.report(1, data).note
        # Its errors are right, and it has no p-value.
        assert "zero" not in solved(kind).table(BATCH)
    assert solved(ByHand).report(BATCH, data_count=10).note is None


def test_the_note_comes_below_others():
    trainer = ByHand({"a": jnp.array(0.0), "b": jnp.array(0.0)})
    first, second = trainer.report(BATCH).note.splitlines()
    assert first.startswith("not at a minimum")
    assert second.startswith("20 of 30 residuals")


class Exactly(vn.Trainer):
    """The parameter has no effect on the second half of the data."""

    def residuals(self, model, batch):
        data, as_counts = batch
        rate = jnp.where(np.arange(6) < 3, model["level"], 4.0)
        return vn.likelihoods.Poisson(rate, data) if as_counts else rate - data


# The data, whether they are counts, and whether a note is right.
EXACT = {
    "data that do not scatter": ([2.0, 2.0, 2.0, 4.0, 4.0, 4.0], False, False),
    "others scatter": ([1.0, 2.0, 3.0, 4.0, 4.0, 4.0], False, True),
    "counts": ([1.0, 2.0, 3.0, 4.0, 4.0, 4.0], True, False),
}


@pytest.mark.parametrize("case", EXACT)
def test_a_note_of_zeros_is_of_data_that_scatter_about_them(case):
    data, as_counts, is_said = EXACT[case]
    batch = np.array(data), as_counts
    note = Exactly({"level": jnp.array(2.0)}).report(batch).note
    assert note is None if not is_said else note.startswith("3 of 6 residuals")


def test_without_scaling_errors_of_a_mask_by_hand_are_right_and_silent():
    trainer = solved(ByHand)
    trainer.table(BATCH)
    ours, theirs = (solved(k).standard_errors(BATCH) for k in (ByHand, ByWhere))
    np.testing.assert_allclose(*(list(tree.values()) for tree in (ours, theirs)))


class Shift(vn.Trainer):
    def residuals(self, model, batch):
        y, there = batch
        return jnp.where(there, model["level"] - y, 0.0)


# How many residuals there are, how many of them are masked, and whether it is said.
COUNTS = {
    "one": (30, 1, False),
    "two": (30, 2, True),
    "under one in a hundred": (201, 2, False),
    "one in a hundred": (200, 2, True),
    "all but one": (30, 29, True),
}


@pytest.mark.parametrize("case", COUNTS)
def test_few_zeros_are_no_mask(case):
    size, masked, is_said = COUNTS[case]
    there = np.arange(size) >= masked
    batch = np.arange(size) % 7 - 20.0, there
    trainer = Shift({"level": jnp.array(0.0)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.report(batch, **SCALED)
    told = [str(one.message).split(" residuals")[0] for one in said]
    assert told == [f"{masked} of {size}"] * is_said


def test_data_that_are_met_exactly_are_data():
    level = {"level": jnp.array(2.0)}
    batch = np.array([2.0, 2.0, 2.0, 1.0, 3.0, 2.5]), np.ones(6, bool)
    report = Shift(level).report(batch, **SCALED)
    assert report.degrees_of_freedom == 5
    assert report.error_scale == pytest.approx(np.sqrt(2.25 / 5))
    assert "zero" not in str(report)


def test_a_prior_is_no_datum_that_is_missing():
    uniform = {"level": dist.Uniform(0.0, 9.0)}
    trainer = Shift({"level": jnp.array(2.0)}, priors=uniform)
    report = trainer.report((np.arange(1.0, 9.0), np.ones(8, bool)))
    assert report.degrees_of_freedom == 7
    assert "zero" not in str(report)
    masked = trainer.report((np.arange(1.0, 9.0), np.arange(8) < 5))
    assert "\n3 of 8 residuals are exactly zero" in masked.note

"""Sandwich errors: closed forms, simulated data, robust losses, masks."""

import functools
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize

import vernal as vn
from models import Line, line

X = np.linspace(0.0, 10.0, 60)
SOLVER = optx.LevenbergMarquardt(1e-10, 1e-10)
LOSSES = "soft_l1", "huber", "cauchy", "arctan"
SCALE = 0.3


class Plain(vn.Trainer):
    def residuals(self, model, batch):
        return model(X) - batch


class RobustFit(vn.Trainer):
    def residuals(self, model, batch):
        return vn.likelihoods.Robust(model(X) - batch, scale=SCALE)


class Each(vn.Trainer):
    """Lines, some named by their losses: they share the data, and nothing else."""

    def residuals(self, model, batch):
        return [
            vn.likelihoods.Robust(
                own(X) - batch, name if name in LOSSES else "soft_l1", SCALE
            )
            for name, own in model.items()
        ]


@functools.cache
def data(seed=0, shape=()):
    """A line, with one datum in seven far from it."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, SCALE, (*shape, 60))
    is_outlier = rng.random((*shape, 60)) < 1 / 7
    outliers = is_outlier * rng.normal(0, 5, (*shape, 60))
    return 2 * X + 1 + noise + outliers


def flat(tree):
    return np.array([tree.slope, tree.offset])


ROWS = np.stack([X, np.ones(60)], 1)


def sandwich(slope, curvature, rows=ROWS):
    """From the first two derivatives of each datum's loss by the prediction."""
    bread = np.linalg.inv(rows.T @ (curvature[:, None] * rows))
    meat = rows.T @ (slope[:, None] ** 2 * rows)
    return np.sqrt(np.diag(bread @ meat @ bread))


def test_of_least_squares_it_is_whites():
    trainer = Plain(line(*np.polyfit(X, data(), 1)))
    left = flat(trainer.model) @ ROWS.T - data()
    known = sandwich(left, np.ones(60))
    np.testing.assert_allclose(
        flat(trainer.standard_errors(data(), kind="sandwich")), known, rtol=1e-8
    )
    # The scale of the residuals does not matter, as it does for those of Fisher.
    assert trainer.report(data()).error_kind == "expected"
    twice = {"scale_errors": True, "kind": "sandwich"}
    for ask in (
        lambda: trainer.report(data(), **twice),
        lambda: trainer.propagate(lambda model: model.slope, data(), **twice),
        lambda: trainer.draw(jax.random.key(0), 2, data(), **twice),
    ):
        with pytest.raises(ValueError, match="Give one of them"):
            ask()


# The first two derivatives of the loss, by the residual in units of the scale.
DERIVATIVES = {
    "soft_l1": (lambda r: r / np.sqrt(1 + r**2), lambda r: (1 + r**2) ** -1.5),
    "huber": (lambda r: np.clip(r, -1, 1), lambda r: 1.0 * (abs(r) <= 1)),
    "cauchy": (lambda r: r / (1 + r**2), lambda r: (1 - r**2) / (1 + r**2) ** 2),
    "arctan": (lambda r: r / (1 + r**4), lambda r: (1 - 3 * r**4) / (1 + r**4) ** 2),
}


def robust_errors(model, loss="soft_l1", rows=ROWS):
    left = (flat(model) @ ROWS.T - data()) / SCALE
    return SCALE * sandwich(*(of(left) for of in DERIVATIVES[loss]), rows)


def best(loss="soft_l1", rows=ROWS, y=None, priors=0.0):
    """The best by SciPy and steps of Newton; `priors` are precisions, all about 1."""
    y = data() if y is None else y
    left, start = lambda p: rows @ p - y, np.ones(rows.shape[1])
    p = scipy.optimize.least_squares(left, start, loss=loss, f_scale=SCALE).x
    for _ in range(9):
        slope, curvature = (of(left(p) / SCALE) for of in DERIVATIVES[loss])
        gradient = rows.T @ slope / SCALE + priors * (p - 1)
        hessian = rows.T @ (curvature[:, None] * rows) / SCALE**2
        p = p - np.linalg.solve(hessian + np.diag(priors + 0 * p), gradient)
    return p


def test_of_a_robust_loss_it_is_hubers():
    trainer = Each({loss: line(*best(loss)) for loss in LOSSES})
    report = trainer.report(data())
    # By default, and wherever errors are asked for.
    every = (
        trainer.standard_errors(data()),
        trainer.standard_errors(data(), kind="sandwich"),
        trainer.propagate(lambda model: model, data())[1],
    )
    for loss in LOSSES:
        known = robust_errors(trainer.model[loss], loss)
        for errors in every:
            np.testing.assert_allclose(flat(errors[loss]), known, rtol=1e-6)
        told = [report[f"{loss}.{name}"].error for name in ("slope", "offset")]
        np.testing.assert_allclose(told, known)
    assert report.error_kind == "sandwich"
    assert "from the scatter of the data (sandwich)" in str(report)
    assert report.chi_squared is report.p_value is report.reduced_chi_squared is None
    assert report.aic is report.bic is None
    assert report.degrees_of_freedom == 4 * 58


def test_errors_are_the_scatter_of_simulated_fits():
    sets = data(1, (2000,))
    make = lambda s: Each({"cauchy": Line(s, s - 0.8)})
    many = vn.fit_many(
        eqx.filter_vmap(make)(jnp.full(2000, 1.9)),
        sets,
        15,
        solver=optx.LevenbergMarquardt(1e-8, 1e-8),
        data_axis=0,
    )
    assert set(many.stop_reasons) == {vn.StopReason.CONVERGED}
    errors, slopes = (tree["cauchy"].slope for tree in (many.errors(sets), many.params))
    scatter = 1.4826 * np.median(abs(slopes - np.median(slopes)))
    assert 0.93 < np.median(errors) / scatter < 1.05


@functools.cache
def solved():
    return RobustFit(line(*best()))


def test_draws_have_that_scatter():
    trainer = solved()
    models = trainer.draw(jax.random.key(0), 4000, data())
    drawn = np.stack([models.slope, models.offset])
    np.testing.assert_allclose(
        drawn.std(axis=1), flat(trainer.standard_errors(data())), rtol=0.05
    )


def test_directions_without_data_stay_unknown():
    class Sum(vn.Trainer):
        def residuals(self, model, batch):
            a, b, slope = model
            return vn.likelihoods.Robust((a + b) + slope * X - batch, scale=SCALE)

    slope, offset = best()
    trainer = Sum(tuple(jnp.array(x) for x in (offset - 0.5, 0.5, slope)))
    errors = trainer.standard_errors(data())
    known = solved().standard_errors(data())
    np.testing.assert_allclose(errors[:2], np.inf)
    np.testing.assert_allclose(errors[2], known.slope, rtol=1e-5)
    _, error = trainer.propagate(lambda model: model[0] + model[1], data())
    np.testing.assert_allclose(error, known.offset, rtol=1e-5)


@functools.cache
def constrained():
    """Errors of lines with a bound and with a prior, and of slopes with no offset."""
    trainer = Each(
        {
            "bound": line(*best(rows=ROWS[:, :1], y=data() - 0.5), 0.5),
            "prior": line(*best(priors=np.array([0, 1e8]))),
        },
        bounds={"bound.offset": (None, 0.5)},
        priors={"prior.offset": vn.Normal(1.0, 1e-4)},
    )
    known = {n: robust_errors(x, rows=ROWS[:, :1]) for n, x in trainer.model.items()}
    return trainer.standard_errors(data()), known


def test_what_is_held_has_none_and_is_not_free():
    errors, known = constrained()
    assert np.isnan(errors["bound"].offset)
    np.testing.assert_allclose(errors["bound"].slope, known["bound"], rtol=1e-6)


def test_a_prior_counts_as_a_measurement():
    """With one that is far more certain than the data, its width is the error."""
    errors, known = constrained()
    np.testing.assert_allclose(errors["prior"].offset, 1e-4, rtol=1e-3)
    np.testing.assert_allclose(errors["prior"].slope, known["prior"], rtol=1e-2)


@pytest.mark.parametrize("method", ["profile", "intervals"])
def test_a_robust_loss_has_no_likelihood_to_follow(method):
    trainer = solved()
    with pytest.raises(TypeError, match=r"a robust loss is none.*`standard_errors`"):
        getattr(trainer, method)(SOLVER, data(), "slope")
    with pytest.raises(ValueError, match='kind="sandwich"'):
        trainer.report(data(), scale_errors=True)


class Masked(vn.Trainer):
    """A line, of which some data are there; `x`, `y` and they are the batch."""

    def residuals(self, model, batch):
        x, y, there = batch
        return vn.likelihoods.Robust(model(x) - y, scale=SCALE, where=there)


class MaskedPlain(vn.Trainer):
    def residuals(self, model, batch):
        x, y, there = batch
        return vn.likelihoods.Gaussian(model(x), y, where=there)


class Counts(vn.Trainer):
    def residuals(self, model, batch):
        x, y, there = batch
        return vn.likelihoods.Poisson(model(x), y, where=there)


def first(count):
    return np.arange(60) < count


EXACT = X, 2 * X + 1, first(60)
# One datum alone says what the slope is.
LEVER = np.where(np.arange(60) < 59, 0.0, 1.0), data(), first(60)
HELD = {"bounds": {"offset": (None, -50.0)}}
WIDE = {"priors": {"offset": vn.Normal(1.0, 1e4)}}
KNOWN = {"priors": {"offset": vn.Normal(1.0, 0.01)}}
NARROW = {"priors": {"offset": vn.Normal(1.0, 0.1), "slope": vn.Normal(2.0, 0.1)}}

# A class, its options, and a batch.
NO_SCATTER = {
    "as many data": (Masked, {}, (X, data(), first(2))),
    "fewer data": (Masked, {}, (X[::-1], data(), first(1))),
    "of least squares": (MaskedPlain, {}, (X, data(), first(2))),
    "one direction": (Masked, {}, LEVER),
    "held": (Masked, HELD, (X[::-1], data(), first(1))),
    "a wide prior": (Masked, WIDE, (X, data(), first(2))),
    "exact": (Masked, {}, EXACT),
    "exact, with a prior": (Masked, NARROW, EXACT),
    "exact least squares": (MaskedPlain, {}, EXACT),
    "exact counts": (Counts, {}, EXACT),
}
ASKED = {
    "standard_errors": lambda t, batch, **own: t.standard_errors(batch, **own),
    "report": lambda t, batch, **own: t.report(batch, **own),
    "table": lambda t, batch, **own: t.table(batch, **own),
    "propagate": lambda t, batch, **own: t.propagate(lambda m: m.slope, batch, **own),
    "draw": lambda t, batch, **own: t.draw(jax.random.key(0), 2, batch, **own),
}


@functools.cache
def without_scatter(case):
    kind, options, batch = NO_SCATTER[case]
    x, y, _ = batch
    if case.startswith("exact"):
        found = 2.0, 1.0
    elif case in ("fewer data", "held"):
        offset = -50.0 if case == "held" else 1.0
        found = (y[0] - offset) / x[0], offset
    elif case == "one direction":
        (level,) = best(rows=np.ones((59, 1)), y=y[:59])
        found = y[59] - level, level
    else:
        found = np.polyfit(x[:2], y[:2], 1)
    return kind(line(*found), **options), batch


@pytest.mark.parametrize("case", NO_SCATTER)
def test_without_scatter_there_are_no_errors(case):
    trainer, batch = without_scatter(case)
    for asked in ASKED.values():
        with pytest.raises(ValueError, match=r"and there is none.*`kind=\"expected\"`"):
            asked(trainer, batch, kind="sandwich")
    # The remedy works, where each direction has data or a prior.
    expected = trainer.standard_errors(batch, kind="expected")
    assert not np.any(np.asarray(jax.tree.leaves(expected)) == 0)


def test_where_it_is_missing_is_told():
    trainer, batch = without_scatter("one direction")
    with pytest.raises(ValueError, match=r"in 1 of 2 directions, along slope \("):
        trainer.standard_errors(batch)
    trainer, batch = without_scatter("exact")
    with pytest.raises(ValueError, match=r"All residuals are zero\.$"):
        trainer.standard_errors(batch)


def test_a_program_says_it_too():
    trainer, batch = without_scatter("as many data")
    with pytest.raises(eqx.EquinoxRuntimeError, match="and there is none"):
        eqx.filter_jit(lambda batch: trainer.standard_errors(batch))(batch)


# What is scattered enough, with the rows of its priors.
SCATTERED = {
    "one more": ({}, 3, np.zeros((0, 2))),
    "a narrow prior": (NARROW, 1, 10 * np.eye(2)),
    "a prior of the other": (KNOWN, 2, np.array([[0.0, 100.0]])),
    "priors alone": (NARROW, 0, 10 * np.eye(2)),
}


OF_FEW_DATA = pytest.mark.filterwarnings("ignore:.*fewer than 5 data:UserWarning")


@OF_FEW_DATA
@pytest.mark.parametrize("case", SCATTERED)
def test_of_few_data_it_is_whites_while_they_scatter(case):
    options, count, priors = SCATTERED[case]
    batch = X[::-1], data()[::-1], first(count)
    rows, known = ROWS[::-1][:count], priors.T @ priors
    bread = np.linalg.inv(rows.T @ rows + known)
    # All of the priors are about the same line.
    best = bread @ (rows.T @ batch[1][:count] + known @ [2.0, 1.0])
    trainer, left = MaskedPlain(line(*best), **options), rows @ best - batch[1][:count]
    meat = rows.T @ (np.square(left)[:, None] * rows) + priors.T @ priors
    known = np.sqrt(np.diag(bread @ meat @ bread))
    errors = flat(trainer.standard_errors(batch, kind="sandwich"))
    np.testing.assert_allclose(errors, known, rtol=1e-5)


class Beside(vn.Trainer):
    """Two lines: one of all data, and one of three of them."""

    def residuals(self, model, batch):
        robust = lambda off: vn.likelihoods.Robust(off, scale=SCALE)
        few = model["few"](X[:9:3]) - batch[:9:3]
        return robust(model["many"](X) - batch), robust(few)


@functools.cache
def beside():
    few = best(rows=ROWS[:9:3], y=data()[:9:3])
    return Beside({"many": line(*best()), "few": line(*few)})


OF_FEW = r"error of '(few\.)?slope' \(and of 1 more\).*fewer than 5 data.*\"expected\""
WARNED = {
    "standard_errors": lambda t, **own: t.standard_errors(data(), **own),
    "propagate": lambda t, **own: t.propagate(
        lambda m: m["few"].slope + m["many"].slope, data(), **own
    ),
    "draw": lambda t, **own: t.draw(jax.random.key(0), 2, data(), **own),
}


@pytest.mark.parametrize("name", WARNED)
def test_an_error_of_few_data_is_warned_of(name):
    with pytest.warns(UserWarning, match=f"^`{name}`: the {OF_FEW}") as caught:
        WARNED[name](beside())
    assert len(caught) == 1
    WARNED[name](beside(), kind="expected")


def test_an_error_of_few_data_is_noted():
    trainer = beside()
    for told in (trainer.table(data()), trainer.report(data()).note):
        assert re.search(OF_FEW, told)
    # The other line, and what depends on it alone, has data enough.
    trainer.propagate(lambda m: m["many"], data())
    assert "fewer" not in trainer.table(data(), kind="expected")


@pytest.mark.parametrize("count", [15, 60])
def test_nothing_is_said_where_data_are_enough(count):
    batch = X, data(), np.arange(60) % (60 // count) == 0
    there = batch[2]
    trainer = Masked(line(*best(rows=ROWS[there], y=data()[there])))
    assert "fewer" not in trainer.table(batch)
    trainer.standard_errors(batch)


@OF_FEW_DATA
def test_a_member_without_scatter_has_no_errors_and_harms_no_other():
    sets = data(2, (4,))
    there = np.stack([first(count) for count in (60, 2, 3, 1)])
    start = eqx.filter_vmap(lambda s: Masked(Line(s, s)))(jnp.full(4, 1.5))
    solver, axes = optx.LevenbergMarquardt(1e-8, 1e-8), (None, 0, 0)
    both = {"solver": solver, "data_axis": axes}
    batch = X, sets, there
    many = vn.fit_many(start, batch, 200, **both)
    of_three = f"^The errors of member 2: the {OF_FEW}"
    with pytest.warns(UserWarning, match=of_three) as caught:
        errors = flat(many.errors(batch))
    assert len(caught) == 1
    assert np.isfinite(errors).all(axis=0).tolist() == [True, False, True, False]
    assert np.isnan(errors[:, [1, 3]]).all()
    assert many.failed == ()
    for index in (0, 2):
        own = X, sets[index], there[index]
        alone = flat(many.trainer(index).standard_errors(own))
        np.testing.assert_allclose(errors[:, index], alone, rtol=1e-6)
    # Nor has one whose data are not finite.
    broken = np.where((np.arange(4) == 0)[:, None], np.nan, sets)
    others = flat(many.errors((X, broken, there)))
    assert np.isfinite(others).all(axis=0).tolist() == [False, False, True, False]
    np.testing.assert_array_equal(others[:, 2], errors[:, 2])
    rows = many.table(batch).splitlines()
    assert [row.count("± nan") for row in rows[2:]] == [0, 2, 0, 2]
    assert np.isnan(many.to_dict(batch)["error[slope]"]).tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="and there is none"):
        many.report(1, batch)
    # The errors of Fisher are there, and if no member has any, that is an error.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = many.errors(batch, kind="expected")
    assert np.isfinite(flat(expected)[:, 1]).all()
    few = X, sets, np.stack([first(2)] * 4)
    with pytest.raises(ValueError, match=r"and there is none.*`kind=\"expected\"`"):
        vn.fit_many(start, few, 200, **both).errors(few)


def test_exact_data_are_counted():
    """Their scatter is zero; the directions stay."""
    report = Plain(line(2.0, 1.0)).report(2 * X + 1, kind="observed")
    assert report.degrees_of_freedom == 58

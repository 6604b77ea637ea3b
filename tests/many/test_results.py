"""What a result of many tells: errors, tables, columns, and which members failed."""

import functools
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import inside
import vernal as vn
from lapack import calls_at_once
from models import Gaussian, GaussianFit

X, LM = np.linspace(-5.0, 5.0, 40), optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
SIZE, BROKEN = 12, (3, 7)
AXES = (None, 0, None)


class Likelihood(vn.Trainer):
    def nll(self, model, batch):
        x, y, sigma = batch
        return 0.5 * jnp.sum(((model(x) - y) / sigma) ** 2)


def peak(*values):
    return Gaussian(*map(jnp.asarray, values))


def spectra():
    rng = np.random.default_rng(0)
    curve = 4.0 * np.exp(-0.5 * ((X - 0.3) / 1.2) ** 2)
    fluxes = curve + 0.1 * rng.normal(size=(SIZE, 40))
    fluxes[list(BROKEN)] = np.nan
    return X, fluxes, np.full(40, 0.1)


def one(index):
    x, y, sigma = spectra()
    return x, y[index], sigma


SGD = optax.sgd(1e-9)


@functools.cache
def solved(steps=100):
    trainers = [GaussianFit(peak(0.2, 1.1, 3.8), SGD)] * SIZE
    return vn.fit_many(trainers, spectra(), steps, data_axis=AXES, solver=LM)


def descended(rates, steps):
    """Fits of one spectrum, by one program."""
    trainers = [GaussianFit(peak(0.2, 1.1, 3.8), optax.sgd(rate)) for rate in rates]
    return vn.fit_many(trainers, one(0), steps, progress=False)


@functools.cache
def at_truth(kind, batch=None):
    """A fit that takes no step, from where errors are as good as at the minimum."""
    trainers = [kind(peak(0.3, 1.2, 4.0), SGD)] * SIZE
    return vn.fit_many(trainers, spectra(), 0, data_axis=AXES, batch=batch)


MADE = {"solved": solved, "nll, in groups": lambda: at_truth(Likelihood, 4)}


@pytest.mark.parametrize("made", MADE)
def test_the_errors_of_each_are_its_own(made):
    result = MADE[made]()
    errors = result.errors(spectra())
    assert isinstance(errors, Gaussian)
    table = np.stack(jax.tree.leaves(errors), axis=1)
    for index, found in enumerate(table):
        if index in BROKEN:
            assert np.isnan(found).all()
            continue
        own = result.trainer(index).standard_errors(one(index))
        np.testing.assert_allclose(found, jax.tree.leaves(own), rtol=1e-6)


@pytest.mark.parametrize("kind", ["expected", "sandwich"])
def test_lapack_decomposes_one_stack_of_matrices_at_a_time(kind, monkeypatch):
    # XLA may wait for ever where it decomposes two.
    run, programs = inside.errors_of_many.run_errors, []

    def watched(*args):
        programs.append(run.lower(*args).compile().as_text())
        return run(*args)

    monkeypatch.setattr(inside.errors_of_many, "run_errors", watched)
    solved().errors(spectra(), kind=kind)
    (program,) = programs
    assert "lapack_" in program
    assert calls_at_once(program) == []


@pytest.mark.parametrize(("kind", "jac"), [("observed", "bwd"), ("sandwich", None)])
def test_tables_have_errors_of_the_kind_asked_for(kind, jac, monkeypatch):
    result, data, asked = solved(), spectra(), set()
    run = inside.errors_of_many.run_errors

    def watched(members, batch, *how):
        asked.add(how)
        return run(members, batch, *how)

    plain, plain_table = result.errors(data).mean, result.table(data)
    monkeypatch.setattr(inside.errors_of_many, "run_errors", watched)
    how = {"kind": kind, "jac": jac}
    errors = result.errors(data, **how)
    assert not np.allclose(errors.mean, plain, equal_nan=True)
    columns = result.to_dict(data, **how)
    np.testing.assert_array_equal(columns["error[mean]"], errors.mean)
    frame = result.to_dataframe(data, **how)
    np.testing.assert_array_equal(frame["error[mean]"], errors.mean)
    assert result.table(data, **how) != plain_table
    assert asked == {(jac, kind)}
    good = min(set(range(SIZE)) - set(BROKEN))
    report = result.report(good, data, **how)
    assert report.error_kind == kind
    np.testing.assert_allclose(report["mean"].error, errors.mean[good], rtol=1e-6)


class Counted(vn.Trainer):
    """What has a mask, and data enough without it."""

    def residuals(self, model, batch):
        x, y, where = batch
        return vn.likelihoods.Gaussian(model(x), y, jnp.asarray(1.0), where=where)


class TiedPeak(vn.Trainer):
    def residuals(self, model, batch):
        x, y, _ = batch
        return model["peak"](x) - y


def masked():
    x, y, _ = spectra()
    widths = np.array([40, 15, 10, 2, *[40] * (SIZE - 4)])
    return x, np.where(np.isnan(y), y[0], y), abs(np.arange(40) - 21) < widths[:, None]


TWICE = {"ties": {"peak.power": lambda model: 4 * model["peak"].std}}
# How to make a member, its data and their axes, and how to compute.
SCALED = {
    "residuals": (lambda m: GaussianFit(m, SGD), spectra(), AXES, {}),
    "observed, in groups": (
        lambda m: GaussianFit(m, SGD),
        spectra(),
        AXES,
        {"batch": 4, "kind": "observed"},
    ),
    "masked": (lambda m: Counted(m, SGD), masked(), (None, 0, 0), {}),
    "tied": (lambda m: TiedPeak({"peak": m}, SGD, **TWICE), spectra(), AXES, {}),
}


# They begin at the truth, which is as near as a minimum.
@pytest.mark.filterwarnings("ignore:.*far from the minimum")
@pytest.mark.parametrize("case", SCALED)
def test_the_errors_of_each_are_scaled_by_its_own_scatter(case):
    of_model, data, axes, options = SCALED[case]
    kind = {"kind": options["kind"]} if "kind" in options else {}
    trainers = [of_model(peak(0.3, 1.2, 4.0))] * SIZE
    group = {"batch": options.get("batch"), "data_axis": axes}
    result = vn.fit_many(trainers, data, 0, **group)
    columns = result.to_dict(data, scale_errors=True, **kind)
    frame = result.to_dataframe(data, scale_errors=True, **kind)
    names = [name for name in columns if name.startswith("error[")]
    assert len(names) == 3
    own = jax.tree.leaves(result.errors(data, scale_errors=True, **kind))
    np.testing.assert_array_equal(own[0], columns[names[0]])
    rows = result.table(data, scale_errors=True, **kind).splitlines()
    for index in range(SIZE):
        found = [columns[name][index] for name in names]
        np.testing.assert_array_equal(found, frame.loc[index, names])
        # Not finite, or as many data as parameters.
        if index in ((3,) if case == "masked" else BROKEN):
            assert np.isnan(found).all()
            continue
        report = result.report(index, data, scale_errors=True, **kind)
        theirs = [row.error for row in report.parameters]
        np.testing.assert_allclose(found, theirs, rtol=1e-6)
        assert report.error_scale != 1
        assert rows[2 + index].count("±") == 3


def test_scaled_errors_far_from_the_minimum_warn():
    # Error bars so large that the known ones are no reason to warn.
    x, y, sigma = spectra()
    data = x, y[4:6], 1e6 * sigma
    trainers = [GaussianFit(peak(0.2, 1.1, 3.8), SGD)] * 2
    result = vn.fit_many(trainers, data, 0, data_axis=AXES, progress=False)
    result.errors(data)
    with pytest.warns(UserWarning, match="member 0 are asked for far from"):
        result.errors(data, scale_errors=True)


HINTS = {
    "models": r"`result\.trainer\(i\)\.model`. All of them .* `result\.trainers`",
    "model": r"`result\.trainer\(i\)\.model`",
    "standard_errors": r"`result\.trainer\(i\)\.standard_errors`",
    "stop_reason": r"one for each member: `result\.stop_reasons`",
    "edm": r"`result\.edms`",
    "best_loss": r"`result\.best_losses`",
    "member": r"`result\.trainer\(i\)`",
    "nonsense": r"no attribute 'nonsense'\.$",
    "__nonsense__": r"no attribute '__nonsense__'\.$",
}


@pytest.mark.parametrize("name", HINTS)
def test_a_name_that_is_missing_is_shown_where_it_lives(name):
    with pytest.raises(AttributeError, match=HINTS[name]):
        getattr(solved(), name)


def test_errors_compile_once():
    traces = 0

    class Counted(GaussianFit):
        def residuals(self, model, batch):
            nonlocal traces
            traces += 1
            return super().residuals(model, batch)

    result = at_truth(Counted)
    result.errors(spectra())
    once = traces
    result.table(spectra())
    result.to_dict(spectra())
    result.errors(spectra(), scale_errors=True)
    assert traces == once


def test_a_saddle_harms_no_other():
    class Bowl(vn.Trainer):
        def nll(self, model, batch):
            return 0.5 * batch * model**2

    trainers = [Bowl(jnp.asarray(0.0), SGD) for _ in range(3)]
    bowls = jnp.asarray([4.0, -1.0, 0.0])
    result = vn.fit_many(trainers, bowls, 0, data_axis=0)
    np.testing.assert_array_equal(result.errors(bowls), [0.5, np.nan, np.inf])
    assert "(unconstrained)" in result.table(bowls).splitlines()[4]


def test_the_failed_ones():
    result = solved()
    assert result.failed == BROKEN
    assert result.table(spectra()).splitlines()[-1] == (
        "2 of 12 failed: 3, 7 (non finite)"
    )
    assert solved(steps=1).failed == tuple(range(SIZE))


@pytest.mark.parametrize("solver", [None, LM])
def test_a_warning_names_members_of_bad_data(solver):
    """Of these, the one that ended first is looked at."""
    trainers = [GaussianFit(peak(0.2, 1.1, 3.8), SGD)] * SIZE
    match = r"2 of 12 trainers \(3, 7\).*Of member 3: `batch\[1\]` has 40 NaNs"
    with pytest.warns(UserWarning, match=match):
        vn.fit_many(trainers, spectra(), 3, data_axis=AXES, solver=solver)


def test_the_member_that_ended_first_is_looked_at():
    class Late(GaussianFit):
        def residuals(self, model, batch):
            x, y, sigma, end = batch
            late = jnp.where(self.step_count >= end, jnp.nan, 1.0)
            return late * super().residuals(model, (x, y, sigma))

    x, y, sigma = one(0)
    ends, trainers = (
        np.array([9, 2, 1], "i4"),
        [Late(peak(0.2, 1.1, 3.8), optax.sgd(1e-9))],
    )
    batch = x, np.stack([y, y, y * np.nan]), sigma, ends
    with pytest.warns(UserWarning, match=r"2 of 3 trainers \(1, 2\).*Of member 2"):
        vn.fit_many(trainers * 3, batch, 5, data_axis=(None, 0, None, 0))


def test_members_that_only_diverged_are_listed_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert descended((1e-3, 1e30, 1e-3), 9).failed == (1,)


@pytest.mark.parametrize("reason", vn.StopReason)
def test_a_failure_is_no_answer(reason):
    good = (
        *("STEPS_TAKEN", "TAKEN_BEFORE", "DATA_EXHAUSTED", "CALLBACK", "INTERRUPTED"),
        *("TERMINATED", "CRITERION", "NO_PATIENCE", "CONVERGED"),
    )
    assert reason.is_failure == (reason.name not in good)


def test_table():
    result, data = solved(), spectra()
    lines = result.table(data).splitlines()
    assert lines[0].split() == [
        "member",
        "mean",
        "std",
        "power",
        "best",
        "loss",
        "ended",
    ]
    assert len(lines) == 2 + SIZE + 1
    report = result.trainer(1).table(one(1)).splitlines()
    for row in report[2:]:
        name, value, error = row.split()
        assert f"{value} ± {error}" in lines[3], name
    assert lines[3].split()[-1] == "converged"
    assert lines[2 + 3].split()[2:4] == ["±", "nan"]
    plain = result.table().splitlines()
    assert plain[3].split()[:2] == ["1", f"{float(result.params.mean[1]):.6g}"]
    assert "±" not in result.table()


def test_a_long_table_is_cut():
    class Scaled(vn.Trainer):
        def residuals(self, model, batch):
            return model - batch

    result = vn.fit_many([Scaled(jnp.ones(20), SGD)] * 3, jnp.ones(20), 0)
    assert result.failed == ()
    assert "failed" not in result.table()
    head, *_ = result.table(jnp.ones(20)).splitlines()
    assert head.split()[12:] == ["[11]", "8", "more", "best", "loss", "ended"]
    assert len(result.to_dict()) == 20 + 3


def test_columns():
    result, data = solved(), spectra()
    columns, errors = result.to_dict(data), result.errors(data)
    names = ["mean", "error[mean]", "std", "error[std]", "power", "error[power]"]
    good = ["chi_squared", "data_count", "degrees_of_freedom", "p_value"]
    assert list(columns) == [*names, "best_loss", "edm", "stop_reason", *good]
    np.testing.assert_array_equal(columns["std"], result.params.std)
    np.testing.assert_array_equal(columns["error[std]"], errors.std)
    np.testing.assert_array_equal(columns["edm"], result.edms)
    assert columns["stop_reason"][0] == "Converged."
    assert list(result.to_dict()) == [*names[::2], "best_loss", "edm", "stop_reason"]
    frame = result.to_dataframe(data)
    assert frame.index.name == "member"
    np.testing.assert_array_equal(frame["power"], result.params.power)
    assert frame.loc[list(BROKEN), "error[mean]"].isna().all()


class Heights(vn.Trainer):
    """Counts, or what scatters with an error of one or with long tails."""

    def residuals(self, model, batch):
        kind, y, where = batch
        mu = jnp.broadcast_to(model["a"] + 0 * model["idle"], y.shape)
        if kind == "counts":
            return vn.likelihoods.Poisson(mu, y, where=where)
        if kind == "robust":
            return vn.likelihoods.Robust(mu - y, where=where)
        return vn.likelihoods.Gaussian(mu, y, jnp.ones(()), where=where)


# What the data are, and what is known beside them.
GOODNESS = {
    "counts": ("counts", {}),
    "normal": ("normal", {}),
    "robust": ("robust", {}),
    "at a bound": ("normal", {"bounds": {"a": (None, 8.0)}}),
    "priors": ("normal", {"priors": {"a": vn.Normal(2.0, 0.5)}}),
}
WIDTHS = (20, 15, 8, 3)


@functools.cache
def heights(name, widths=WIDTHS):
    kind, options = GOODNESS[name]
    counts = np.random.default_rng(1).poisson(9.0, (4, 20)).astype(float)
    data = kind, counts, np.arange(20) < np.array(widths)[:, None]
    # Means are where most of these have their minima.
    most = 8.0 if name == "at a bound" else np.inf
    means = np.minimum(counts.mean(where=data[2], axis=1), most)
    models = [{"a": jnp.asarray(mean), "idle": jnp.asarray(1.0)} for mean in means]
    trainers = [Heights(model, SGD, **options) for model in models]
    return vn.fit_many(trainers, data, 0, data_axis=(None, 0, 0)), data


@pytest.mark.filterwarnings("ignore:.*(far from the minimum|fewer than 5 data)")
@pytest.mark.parametrize("name", GOODNESS)
def test_how_good_each_is_stands_beside_it(name):
    result, data = heights(name)
    columns = result.to_dict(data)
    names = {"chi_squared", "data_count", "degrees_of_freedom"}
    if name in ("robust", "priors"):
        assert not names & columns.keys()
        return
    # Of counts it is that of a report alone.
    assert ("p_value" in columns) == (name != "counts")
    if name != "counts":
        names.add("p_value")
    reports = [result.report(index, data) for index in range(4)]
    own_errors = [report["a"].error for report in reports]
    np.testing.assert_allclose(columns["error[a]"], own_errors, rtol=1e-6)
    for own in names:
        theirs = [getattr(report, own) for report in reports]
        np.testing.assert_allclose(columns[own], theirs, rtol=1e-12)
    assert not names & result.to_dict().keys()


# Of what there is no scatter, and how errors are asked for.
UNSCALED = {
    "sandwich": (lambda: (solved(), spectra()), {"kind": "sandwich"}),
    "nll": (lambda: (at_truth(Likelihood, 4), spectra()), {}),
    "few": (lambda: heights("normal", (1, 1, 1, 1)), {}),
    **{
        name: (functools.partial(heights, name), {})
        for name in ("counts", "robust", "priors")
    },
}


@pytest.mark.filterwarnings("ignore:.*(far from the minimum|fewer than 5 data)")
@pytest.mark.parametrize("case", UNSCALED)
def test_a_scale_that_is_not_there_is_refused_as_for_one(case):
    made, how = UNSCALED[case]
    result, data = made()
    with pytest.raises(ValueError, match="scale_errors") as one:
        result.report(0, data, scale_errors=True, **how)
    for of_many in (result.table, result.errors):
        with pytest.raises(ValueError, match="scale_errors") as many:
            of_many(data, scale_errors=True, **how)
        assert str(many.value) == str(one.value)


def test_names_that_are_taken():
    class Fit(vn.Trainer):
        def residuals(self, model, batch):
            return model["edm"] * model["b"][0] - batch

    model = {"edm": jnp.asarray(1.0), "b": jnp.ones((1, 2))}
    result = vn.fit_many([Fit(model, SGD)] * 3, jnp.ones(2), 0)
    names = list(result.to_dict())
    assert names == ["b[0,0]", "b[0,1]", "edm", "best_loss", "<edm>", "stop_reason"]


def test_the_report_of_one():
    result = solved()
    ours = result.report(1, spectra())
    theirs = result.trainer(1).report(one(1))
    assert ours.stop_reason is vn.StopReason.CONVERGED
    assert ours.chi_squared == theirs.chi_squared
    fewer = result.report(1, spectra(), data_count=30)
    assert (fewer.data_count, fewer.degrees_of_freedom) == (30, 27)
    assert result.report(-1, spectra())["std"].value == result.params.std[-1]
    with pytest.raises(ValueError, match="40 NaNs"):
        result.report(3, spectra())


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
def test_the_axis_is_kept():
    result = solved()
    x, y, sigma = spectra()
    with pytest.raises(ValueError, match="as long as there are trainers, 12"):
        result.errors((x, y[:3], sigma))
    fitted = descended([1e-4] * 3, 3)
    errors = fitted.errors(one(0))
    assert errors.mean.shape == (3,)
    own = fitted.trainer(2).standard_errors(one(0))
    np.testing.assert_allclose(errors.power[2], own.power, rtol=1e-6)


def test_a_loss_alone_has_no_errors():
    class MeanLoss(vn.Trainer):
        def loss(self, model, batch):
            return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    result = vn.fit_many([MeanLoss(peak(0.2, 1.1, 3.8), SGD)] * 2, one(0), 0)
    with pytest.raises(TypeError, match="`residuals` or `nll`"):
        result.errors(one(0))
    assert len(result.table().splitlines()) == 4


class Tied(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return (model["a"] * x + model["c"] + model["b"] - y) / 0.1


def twice_b(model):
    return 2 * model["b"]


def test_what_is_tied_or_held_is_told_in_a_table():
    x = np.linspace(0, 1, 20)
    ys = np.stack([2 * x + 0.2, 2 * x - 0.3, x * np.nan])
    # The minima, of which the second is at the bound.
    trainers = [
        Tied(
            {"a": jnp.array(a), "b": jnp.array(b), "c": jnp.array(1.0)},
            SGD,
            bounds={"b": (0, None)},
            ties={"c": twice_b},
        )
        for a, b in ((2.0, 0.2 / 3), (ys[1] @ x / (x @ x), 0.0), (1.0, 0.1))
    ]
    result = vn.fit_many(trainers, (x, ys), 0, data_axis=(None, 0))
    head, _, first, held, broken, *_ = result.table((x, ys)).splitlines()
    assert "c (tied to a function)" in head
    assert first.count("±") == 3
    assert "0 (at its bound)" in held
    assert held.count("±") == 1
    assert broken.count("± nan") == 3
    columns = result.to_dict((x, ys))
    rows = result.report(0, (x, ys))
    np.testing.assert_allclose(columns["error[c]"][0], rows["c"].error, rtol=1e-6)
    np.testing.assert_array_equal(columns["c"], 2 * columns["b"])
    # Only what has bounds has such a column.
    assert [name for name in columns if "at_bound" in name] == ["at_bound[b]"]
    np.testing.assert_array_equal(columns["at_bound[b]"], [False, True, False])
    assert not any("at_bound" in name for name in result.to_dict())


def test_each_element_at_its_bound_has_a_column():
    class Levels(vn.Trainer):
        def residuals(self, model, batch):
            return jnp.append(jnp.append(*model["levels"]), model["rest"]) - batch

    ys = np.array([[1.0, -1.0, 1.0, -1.0, 0.0], [-1.0, 1.0, -1.0, 1.0, 0.0]])
    bounds = {"levels.0": (None, 0.0), "levels.1": (0.0, 9.0)}
    # The minima within the bounds.
    minima = [(np.minimum(y[:2], 0), np.maximum(y[2:4], 0)) for y in ys]
    models = [
        {"levels": list(map(jnp.asarray, levels)), "rest": jnp.zeros(())}
        for levels in minima
    ]
    trainers = [Levels(model, SGD, bounds=bounds) for model in models]
    result = vn.fit_many(trainers, ys, 0, data_axis=0)
    frame = result.to_dataframe(ys)
    names = [f"at_bound[levels.{i}[{j}]]" for i in range(2) for j in range(2)]
    held = np.column_stack([ys[:, :2] > 0, ys[:, 2:4] < 0])
    np.testing.assert_array_equal(frame[names].to_numpy(), held)
    assert "at_bound[rest]" not in frame


def test_each_member_explains_its_end():
    data, seen = spectra(), set()
    starts = [peak(0.2, 1.1, 3.8), peak(1.4, 0.6, 2.0)] * (SIZE // 2)
    result = vn.fit_many(
        [GaussianFit(s, SGD) for s in starts], data, 3, data_axis=AXES, solver=LM
    )
    for index in range(SIZE):
        alone = GaussianFit(starts[index], SGD).solve
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = alone(LM, one(index), max_steps=3, rewhiten=False)
        assert result.stop_reasons[index] is end.stop_reason
        seen.add(end.stop_reason)
        own = result.explain(index)
        if end.stop_reason is vn.StopReason.MAX_STEPS:
            assert "These were 3: `steps` of `fit_many`" in own
            assert f"`result.trainer({index}).solve(solver, batch)`" in own
        said = own.replace(f"result.trainer({index})", "result.trainer")
        said = said.replace("`steps` of `fit_many` allows", "`max_steps=` allows")
        number = lambda text: text.partition("about ")[2].partition(" ")[0]
        assert said.replace(number(said), "") == (
            end.explain().replace(number(end.explain()), "")
        )
    assert vn.StopReason.MAX_STEPS in seen
    assert result.explain(-1) == result.explain(SIZE - 1).replace(
        f"trainer({SIZE - 1})", "trainer(-1)"
    )
    with pytest.raises(IndexError, match="there are 12 members"):
        result.explain(SIZE)
    again = pickle.loads(pickle.dumps(result))
    assert again.explain(0) == result.explain(0)


def test_members_of_a_fit_explain_their_ends():
    data, stop = one(0), vn.Converged(rtol=1e-2, patience=2)
    trainers = [GaussianFit(peak(0.2, 1.1, 3.8), optax.adam(r)) for r in (0.1, 0.0)]
    result = vn.fit_many(trainers, data, 60, stop=stop)
    assert "The loss could still fall by about" in result.explain(0)
    assert "along" in result.explain(1)
    assert descended([1e-4] * 3, 3).explain(0) == "All steps were taken."
    assert vn.fit_many(trainers, data, 0).explain(1) == "All steps were taken."


def test_equal_trainers_of_one_batch_are_refused():
    x = np.linspace(0, 1, 20)
    ys = np.stack([x, 2 * x])
    model = {"a": jnp.array(1.0), "b": jnp.array(0.1), "c": jnp.array(1.0)}
    one = Tied(model, optax.adam(0.1))
    for options in ({}, {"solver": optx.LevenbergMarquardt(1e-8, 1e-8)}):
        with pytest.raises(ValueError, match=r"`data\[1\]` has .* no `data_axis`"):
            vn.fit_many([one, one], (x, ys), 5, **options)
    # Others may see a batch of two rows, and two may be equal of any other batch.
    other = Tied({**model, "a": jnp.array(2.0)}, optax.adam(0.1))
    with jax.numpy_rank_promotion("allow"):
        vn.fit_many([one], (x, ys), 0)
        vn.fit_many([one, one], (x, ys[0]), 0)
        vn.fit_many([one, other], (x, ys), 0)
        # Of more than there are coordinates each was more likely meant to have a row.
        four, more = [one, other, other, other], np.concatenate([ys, ys])
        with pytest.warns(UserWarning, match=r"`data\[1\]` has .* give `data_axis=0`"):
            vn.fit_many(four, (x, more), 0)
        # As many data as trainers.
        vn.fit_many(four, (x[:4], more[:, 0]), 0)
        vn.fit_many(four, (more, more), 0)

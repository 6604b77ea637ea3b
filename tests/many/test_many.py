"""`fit_many`: each member is what it would be alone."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
import vernal.plot
from marked import marked
from models import (
    GaussianFit,
    LineFit,
    Pull,
    TwoFit,
    close,
    gaussian,
    gaussian_batch,
    line,
    line_batch,
    same,
    script,
    two,
)

BATCH = line_batch()
ADAM = optax.adam(0.05)
SLOPES = (0.0, 1.0, 2.5, -3.0)
LM = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)


def many(trainers, data=BATCH, steps=20, **options):
    return vn.fit_many(trainers, data, steps, **options)


def starts(optimiser=ADAM, kind=LineFit, **options):
    return [kind(line(slope), optimiser, **options) for slope in SLOPES]


def bounded(low, high):
    return LineFit(line(), ADAM, bounds={"slope": (low, high)})


@functools.cache
def whole():
    """What several tests come to by another way."""
    return many(starts())


def alone(trainers, data_of, **options):
    """The fits of each member for itself."""
    pairs = enumerate(trainers)
    return [trainer.fit(data_of(index), 20, **options) for index, trainer in pairs]


def require_alone(result, fits, rtol=None):
    """Compares each member with a fit of its own."""
    for index, alone in enumerate(fits):
        close(result.trainer(index), alone.trainer, rtol)
        assert result.stop_reasons[index] is alone.stop_reason
        rows = len(alone.history)
        for name in ("loss", *alone.history.records):
            ours = result.history[name][:rows, index]
            close(ours, alone.history[name], rtol)
        assert result.nan_report(index) == alone.trainer.nan_report()


class Noisy(LineFit):
    """Draws from its key, and counts in its state."""

    def loss(self, model, batch, *, key, state):
        loss = super().loss(model, batch)
        noise = 0.1 * jax.random.normal(key)
        return loss * (1 + noise), {"noise": noise}, state + 1


RULES = {"slope": optax.sgd(0.1, momentum=0.5), "offset": vn.window(ADAM, 3, 12)}


def mixed():
    """Leaves of several dtypes, and some that are no arrays of floats."""
    wave, small = jnp.asarray([1 + 2j, -1j]), jnp.asarray(2.0, "f4")
    others = {"none": None, "count": jnp.asarray([3]), "name": "mixed"}
    return {"scalar": jnp.asarray(1.5), "wave": wave, "small": small} | others


VARIED = {
    "starts and rates": lambda: [
        LineFit(line(slope), optax.adam(rate))
        for slope, rate in zip(SLOPES, (1e-3, 1e-2, 0.1, 0.1), strict=True)
    ],
    "rules and scales": lambda: [
        LineFit(line(slope), vn.ParamOptimiser(RULES).with_scale({"slope": scale}))
        for slope, scale in zip(SLOPES, (0.1, 1.0, 2.0, 1.0), strict=True)
    ],
    # And another frozen leaf for each.
    "keys": lambda: [
        Noisy(
            line(0.5, seed),
            ADAM,
            key=jax.random.key(seed),
            state=jnp.array(seed),
            train="slope",
        )
        for seed in range(3)
    ],
    "mixed": lambda: [Pull(mixed(), optax.adam(rate)) for rate in (0.1, 0.01)],
}


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", marked(pytest.mark.seams, VARIED, "keys"))
def test_each_is_as_it_were_alone(name):
    trainers = VARIED[name]()
    data = jnp.array(0.2) if name == "mixed" else BATCH
    record = ("grad_norm", "scalar" if name == "mixed" else "slope")
    result = many(trainers, data, record=record)
    assert len(result) == len(trainers)
    # One of the leaves there is of single precision, and so are sums with it.
    rtol = 1e-5 if name == "mixed" else None
    require_alone(result, alone(trainers, lambda _: data, record=record), rtol)


def test_some_at_a_time():
    options = {"record": "slope", "every": 3, "validation": (BATCH, 4)}
    whole, parts = many(starts(), **options), many(starts(), batch=2, **options)
    close(parts.trainers, whole.trainers)
    for name, column in whole.history.to_dict().items():
        np.testing.assert_allclose(parts.history[name], column, rtol=1e-9)


class Hollow(vn.Trainer):
    """Has parameters and data without elements, beside those of a line."""

    def residuals(self, model, batch):
        x, y = batch["line"]
        own = model["line"](x) - y, model["none"].ravel(), batch["none"].ravel()
        return jnp.concatenate(own)


def test_some_at_a_time_of_what_has_no_elements():
    models = ({"line": line(slope), "none": jnp.zeros((0, 3))} for slope in SLOPES)
    trainers = [Hollow(model) for model in models]
    data = {"line": BATCH, "none": jnp.zeros((len(SLOPES), 2, 0))}
    options = {"data_axis": {"line": None, "none": 0}, "solver": LM}
    whole = many(trainers, data, **options)
    parts = many(trainers, data, batch=2, **options)
    # Where nothing but rounding is left of the loss, a solver may take a step more.
    assert parts.stop_reasons == whole.stop_reasons
    close(parts.trainers.model, whole.trainers.model, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_change_nothing(chunk):
    parts = many(starts(), chunk=chunk)
    assert same(whole().trainers, parts.trainers)
    np.testing.assert_array_equal(whole().history.loss, parts.history.loss)


@pytest.mark.parametrize("cut", [1, 13])
def test_two_fits_are_one(cut):
    first = many(starts(), steps=cut)
    second = many(first.trainers, steps=20 - cut)
    close(second.trainers, whole().trainers)
    joined = first.history + second.history
    np.testing.assert_array_equal(joined.steps, whole().history.steps)
    np.testing.assert_allclose(joined.loss, whole().history.loss, rtol=1e-9)


def test_stacked_trainers():
    """As `eqx.filter_vmap` makes them."""

    def make(slope):
        return LineFit(line(slope), ADAM)

    stacked = eqx.filter_vmap(make)(jnp.asarray(SLOPES))
    close(many(stacked).trainers, whole().trainers)


# Data of their own.


def curves(n=3):
    x, y = BATCH
    return x, jnp.asarray(np.asarray(y) + np.arange(n)[:, None])


@functools.cache
def curves_alone():
    x, y = curves()
    return alone(starts()[:3], lambda index: (x, y[index]))


@pytest.mark.parametrize(
    ("axes", "arrange"),
    [
        ((None, 0), lambda x, y: (x, y)),
        (0, lambda x, y: (jnp.stack([x] * 3), y)),
        ((None, -1), lambda x, y: (x, y.T)),
    ],
)
@pytest.mark.parametrize("batch", [None, 1])
def test_data_sets(axes, arrange, batch):
    data = arrange(*curves())
    result = many(starts()[:3], data, data_axis=axes, batch=batch)
    require_alone(result, curves_alone())


def test_data_sets_with_a_number_for_each():
    x, y, _ = gaussian_batch()
    sigma = jnp.asarray([0.1, 0.2, 0.4])
    trainers = [GaussianFit(gaussian(), ADAM) for _ in range(3)]
    result = many(trainers, (x, y, sigma), data_axis=(None, None, 0))
    require_alone(result, alone(trainers, lambda index: (x, y, sigma[index])))


def test_the_validation_has_a_part_for_each_too():
    x, y = curves()
    trainers = starts()[:3]
    options = {"stop": vn.Patience(2)}
    held_out = (x[::2], y[:, ::2])
    result = many(
        trainers,
        (x, y),
        steps=60,
        data_axis=(None, 0),
        validation=(held_out, 5),
        **options,
    )
    for index, trainer in enumerate(trainers):
        own = ((x[::2], y[index, ::2]), 5)
        alone = trainer.fit((x, y[index]), 60, validation=own, **options)
        close(result.trainer(index), alone.trainer)
        scores = result.history.validation[: len(alone.history.validation), index]
        np.testing.assert_allclose(scores, alone.history.validation, rtol=1e-9)


@pytest.mark.parametrize("kind", ["minibatches", "stream"])
def test_batches(kind):
    def data():
        if kind == "minibatches":
            return vn.Minibatches(BATCH, 3, key=jax.random.key(5))
        return vn.Stream(
            lambda step: ((BATCH[0], BATCH[1] + 0.1 * i) for i in range(step, 99))
        )

    trainers = starts()
    require_alone(many(trainers, data()), alone(trainers, lambda _: data()))


def test_a_stream_with_a_part_for_each():
    x, y = curves()
    stream = lambda of: vn.Stream((x, of(y) + 0.1 * i) for i in range(20))
    trainers = starts()[:3]
    result = many(trainers, stream(lambda y: y), data_axis=(None, 0))
    fits = alone(trainers, lambda index: stream(lambda y: y[index]))
    require_alone(result, fits)


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize(("data_axis", "lost"), [((None, 0), [2]), (None, [0, 1, 2])])
def test_one_that_is_lost_early_in_a_stream(data_axis, lost, chunk):
    """Its batch is gone by the end; what the others have is not."""
    x, y = curves()

    def batches(lost=(), last=20):
        for step in range(last):
            rows = y.at[jnp.asarray(lost, int), 4].set(jnp.nan) if step == 3 else y
            yield x, rows if data_axis else rows[2]

    trainers = [LineFit(line(slope), ADAM) for slope in SLOPES[:3]]
    options = {"data_axis": data_axis, "chunk": chunk}
    with pytest.warns(UserWarning, match="not finite") as caught:
        result = many(trainers, vn.Stream(batches([2])), **options)
    [said] = map(str, (warning.message for warning in caught))
    is_bad = vn.StopReason.NON_FINITE
    assert [i for i, r in enumerate(result.stop_reasons) if r is is_bad] == lost
    assert np.asarray(result.trainers.step_count).tolist() == [
        4 if i in lost else 20 for i in range(3)
    ]
    if data_axis is None:  # the stream ended with all of them
        assert "`batch[1]` has 1 NaN, at [4]." in said
        return
    assert "At step 3 a value was not finite. The batch of that step is no" in said
    assert "are finite" not in said
    whole = many(trainers, vn.Stream(batches()), **options)
    for index in (0, 1):
        assert same(result.trainer(index).params, whole.trainer(index).params)
    asked = [trainer.replace(nan_policy=vn.RaiseOnNan()) for trainer in trainers]
    with pytest.raises(vn.NonFiniteError, match="At step 3 a value") as error:
        many(asked, vn.Stream(batches([2])), **options)
    assert error.value.result.stop_reasons == result.stop_reasons


# Each ends by itself.


class Walk(TwoFit):
    """Sees another row of the data at each step."""

    def loss(self, model, batch):
        return super().loss(model, jax.tree.map(lambda x: x[self.step_count], batch))


POLICIES = [vn.StopFit(), vn.SkipStep() | vn.StopAfter(2)]


@functools.cache
def walk(policy, *scripts):
    trainers = [Walk(two(), optax.adam(0.1), nan_policy=policy) for _ in scripts]
    data = jax.tree.map(lambda *x: jnp.stack(x), *map(script, scripts))
    return many(trainers, data, len(scripts[0]), data_axis=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_that_is_not_finite_harms_no_other(policy):
    scripts = ["......", "..a...", "l.....", "..uu..", "bb...."]
    result = walk(policy, *scripts)
    for index, own in enumerate(scripts):
        trainer = Walk(two(), optax.adam(0.1), nan_policy=policy)
        alone = trainer.fit(script(own), 6)
        close(result.trainer(index), alone.trainer, rtol=1e-6)
        assert result.stop_reasons[index] is alone.stop_reason
        assert result.nan_report(index) == alone.trainer.nan_report()


@pytest.mark.parametrize("policy", [*POLICIES, vn.ZeroNans()])
@pytest.mark.parametrize("bad", ["a.....", "..l...", ".bb...", ".....u", "aaaaaa"])
def test_others_are_the_same_to_the_bit(policy, bad):
    """Whether one is bad or not, though they share the branches of a step."""
    # As many as above, for which there is a program.
    good = walk(policy, *["......"] * 5)
    result = walk(policy, "......", bad, *["......"] * 3)
    for index in 0, 2, 4:
        assert same(result.trainer(index), good.trainer(index))
        ours, theirs = (x.history.loss[:, index] for x in (result, good))
        np.testing.assert_array_equal(ours, theirs)


def test_one_that_has_converged_waits_for_the_others():
    rates = (0.02, 0.1, 0.4)
    trainers = [LineFit(line(), optax.sgd(rate)) for rate in rates]
    stop = vn.Converged(1e-3, 3, atol=1e-6)
    result = many(trainers, steps=2000, stop=stop, record="slope")
    counts = [int(result.trainer(i).step_count) for i in range(3)]
    assert len(set(counts)) == 3
    assert len(result.history) == max(counts)
    for index, trainer in enumerate(trainers):
        alone = trainer.fit(BATCH, 2000, stop=stop)
        assert int(alone.trainer.step_count) == counts[index]
        assert result.stop_reasons[index] is vn.StopReason.CONVERGED
        close(result.trainer(index), alone.trainer)
        for name in "loss", "slope":
            column = result.history[name][:, index]
            assert not np.isnan(column[: counts[index]]).any()
            assert np.isnan(column[counts[index] :]).all()
        assert result.losses[index] == result.history.loss[counts[index] - 1, index]
    parts = many(trainers, steps=2000, stop=stop, record="slope", batch=1)
    np.testing.assert_allclose(parts.history.loss, result.history.loss, rtol=1e-9)


def test_a_policy_that_raises_does_so_at_the_end():
    batches = jax.tree.map(lambda *x: jnp.stack(x), *map(script, ("l", ".")))
    data = jax.tree.map(lambda x: x[:, 0], batches)
    trainers = [TwoFit(two(), ADAM, nan_policy=vn.RaiseOnNan()) for _ in range(2)]
    with pytest.raises(vn.NonFiniteError, match="step 0: loss") as caught:
        many(trainers, data, 5, data_axis=0)
    result = caught.value.result
    assert int(result.trainer(1).step_count) == 5


def test_what_a_result_tells():
    result = whole()
    losses = [float(result.trainer(i).best_loss) for i in range(4)]
    np.testing.assert_array_equal(result.best_losses, losses)
    assert result.best_index == int(np.argmin(losses))
    assert same(result.best, result.trainer(result.best_index).best)
    np.testing.assert_array_equal(result.losses, result.history.loss[-1])
    assert repr(result).startswith("ManyResult(4 members, best_loss=")
    assert result.trainer(-1).step_count == 20
    with pytest.raises(IndexError, match="`index` is 4, and there are 4 members"):
        result.trainer(4)
    assert np.isnan(many(starts(), steps=0).losses).all()


# Around it.


def test_it_compiles_once_and_for_all_values():
    count = 0

    class Counted(LineFit):
        def loss(self, model, batch):
            nonlocal count
            count += 1
            return super().loss(model, batch)

    first = many(starts(kind=Counted))
    traced = count
    many(starts(optax.adam(0.3), kind=Counted), steps=33)
    many([Counted(line(s), ADAM) for s in (7.0, 8.0, 9.0, 10.0)])
    assert count == traced
    many(first.trainers)
    second = count
    many(many(first.trainers).trainers)
    assert count == second


@pytest.mark.parametrize("ends", ["criterion", "solver"])
def test_members_that_ended_at_different_steps_go_on(ends):
    if ends == "criterion":
        first = many(starts(), steps=200, stop=vn.Converged(1e-2, 3))
        given = [first.trainer(index) for index in range(4)]
    else:
        given = [trainer.solve(SOLVERS["BFGS"], BATCH).trainer for trainer in starts()]
    counts = [int(trainer.step_count) for trainer in given]
    assert len({*counts}) > 1
    result = many(given, steps=5, record="slope")
    for index, trainer in enumerate(given):
        alone = trainer.fit(BATCH, 5, record="slope")
        for name in ("params", "opt_state", "best", "best_loss"):
            found, own = (
                getattr(of, name) for of in (result.trainer(index), alone.trainer)
            )
            close(found, own, rtol=1e-10)
        close(result.history["slope"][:, index], alone.history["slope"], rtol=1e-10)
    np.testing.assert_array_equal(result.trainers.step_count, max(counts) + 5)
    np.testing.assert_array_equal(result.history.steps, max(counts) + np.arange(5))


def test_a_member_that_has_stopped_stays_where_it_is():
    bad = eqx.tree_at(
        lambda t: t._progress.params.slope, starts()[0], jnp.array(jnp.nan)
    )
    stopped = bad.fit(BATCH, 9, progress=False).trainer
    assert stopped.stopped
    others = [trainer.fit(BATCH, 4).trainer for trainer in starts()[1:]]
    counts = many([stopped, *others], steps=3).trainers.step_count
    np.testing.assert_array_equal(counts, [stopped.step_count, 7, 7, 7])
    revived = stopped.replace(model=line(1.0), nan_policy=vn.SkipStep())
    result = many([revived, starts()[1].replace(nan_policy=vn.SkipStep())])
    close(result.trainer(0).params, revived.fit(BATCH, 20).trainer.params, rtol=1e-10)


def test_checkpoints(tmp_path):
    options = {"record": "slope", "validation": (BATCH, 4)}
    keep = lambda: {**options, "checkpoint": vn.Checkpoints(tmp_path, every=5)}
    whole = many(starts(), **options)
    many(starts(), steps=9, **keep())
    result = many(starts(), **keep())
    assert same(result.trainers, whole.trainers)
    for name, column in whole.history.to_dict().items():
        np.testing.assert_array_equal(result.history[name], column)


def test_a_callback_sees_all_of_them():
    seen = []

    def callback(trainers, history):
        seen.append((trainers.best_loss.shape, history.loss.shape))
        return len(seen) == 2

    result = many(starts(), chunk=3, callback=callback)
    assert seen == [((4,), (3, 4)), ((4,), (6, 4))]
    assert set(result.stop_reasons) == {vn.StopReason.CALLBACK}


FOR_ONE = {
    **{
        name: lambda t, name=name: getattr(t, name)(BATCH)
        for name in (
            "step",
            "fisher",
            "curvature",
            "whiten",
            "standard_errors",
            "table",
            "report",
            "objective",
        )
    },
    "fit": lambda t: t.fit(BATCH, 2),
    "solve": lambda t: t.solve(LM, BATCH),
    "reproject": lambda t: t.reproject(None),
    "propagate": lambda t: t.propagate(lambda model: model.slope, BATCH),
    "draw": lambda t: t.draw(BATCH, jax.random.key(0), 2),
    "profile": lambda t: t.profile(LM, BATCH, "slope"),
    "intervals": lambda t: t.intervals(LM, BATCH),
    "params_at": lambda t: t.params_at(jnp.zeros(2)),
    "evaluate": lambda t: t.evaluate(t.model, BATCH),
    "nan_report": lambda t: t.nan_report(),
    "learning_rates": lambda t: t.learning_rates(),
    "unroll": lambda t: vn.unroll(t, BATCH, 2),
    "contour": lambda t: vernal.plot.contour(t, LM, BATCH, "slope", "offset"),
}
# What is for one and for many, and what users write.
FOR_BOTH = "replace", "residuals", "nll", "loss", "constrain"


def test_what_is_for_one_is_listed():
    methods = {name for name, _ in inspect.getmembers(vn.Trainer, inspect.isfunction)}
    methods = {name for name in methods if not name.startswith("_")}
    assert methods - {*FOR_BOTH, "transform_grads"} == {*FOR_ONE} - {
        "unroll",
        "contour",
    }


@pytest.mark.own_words
@pytest.mark.parametrize("name", FOR_ONE)
def test_what_is_for_one_refuses_a_stacked_trainer(name):
    match = f"`{name}`: this `LineFit` is stacked, with 4 members"
    with pytest.raises(TypeError, match=match):
        FOR_ONE[name](whole().trainers)


def test_a_callback_that_returns_what_it_was_given_changes_nothing():
    options = {"steps": 100, "chunk": 4, "stop": vn.Converged(1e-2, 9)}
    plain = many(starts(), **options)
    result = many(starts(), callback=lambda trainers, _: trainers, **options)
    assert same(result.trainers, plain.trainers)
    assert vn.StopReason.CONVERGED in plain.stop_reasons


class Weighted(vn.Trainer):
    weights: jax.Array

    def __init__(self, *args, weights, **options):
        super().__init__(*args, **options)
        self.weights = weights

    def residuals(self, model, batch):
        x, y = batch
        found = model["at"][0] + model["at"][1] * x + model["at"][2] * x**2
        return (found - y) * jnp.mean(self.weights)


# As many members as there are numbers in what they share.
AT = tuple(jnp.array([start, 0.0, 0.0]) for start in (1.0, 2.0, 3.0))
SHARED = {
    "bounds": {"at": (-5.0, jnp.array([3.5, 2.0, 2.0]))},
    "priors": {"at": vn.Normal(jnp.arange(3.0), jnp.array([0.3, 0.2, 0.1]))},
    "projector": vn.EigenProjector.from_fisher(4 * jnp.eye(3), {"at": AT[0]}),
}


def test_in_a_callback_each_member_has_what_all_share():
    options = {"weights": jnp.array([1.0, 2.0, 6.0]), **SHARED}
    made = [Weighted({"at": at}, optax.sgd(0.01), **options) for at in AT]
    scores = []

    smaller = lambda t: t.replace(model={"at": 0.9 * t.model["at"]})

    def callback(trainers, history):
        if len(history.loss) > 3:
            return None
        score = lambda one: one.evaluate(one.model, BATCH)
        scores.append(eqx.filter_vmap(score)(trainers))
        return smaller(trainers)

    result = many(made, steps=6, chunk=3, callback=callback)
    for index, trainer in enumerate(made):
        half = trainer.fit(BATCH, 3).trainer
        close(scores[0][index], half.evaluate(half.model, BATCH), rtol=1e-12)
        whole = smaller(half).fit(BATCH, 3).trainer
        close(result.trainer(index).params, whole.params, rtol=1e-10)
    assert result.trainers.weights.shape == (3, 3)


def test_what_all_share_stays_one_in_a_callback():
    weights = jnp.array([1.0, 2.0, 6.0])
    made = [Weighted({"at": at}, optax.sgd(0.01), weights=weights) for at in AT]
    change = lambda factor: (
        lambda trainers, _: eqx.tree_at(
            lambda t: t.weights, trainers, trainers.weights * factor
        )
    )
    result = many(made, steps=6, chunk=6, callback=change(2))
    close(result.trainers.weights, jnp.stack([2 * weights] * 3))
    with pytest.raises(ValueError, match="'weights' is another for each member"):
        many(made, steps=6, chunk=3, callback=change(jnp.arange(3.0)[:, None]))


def test_with_projectors():
    batch = gaussian_batch()
    models = [gaussian(), eqx.tree_at(lambda m: m.mean, gaussian(), jnp.array(0.6))]
    trainers = [GaussianFit(model, ADAM).whiten(batch) for model in models]
    result = many(trainers, batch)
    for index, trainer in enumerate(trainers):
        close(result.trainer(index), trainer.fit(batch, 20).trainer, rtol=1e-7)
    solved = many(trainers, batch, 50, solver=LM)
    close(solved.trainer(1).params, trainers[1].solve(LM, batch).trainer.params, 1e-6)


# With a solver.


SOLVERS = {"LM": LM, "BFGS": optx.BFGS(rtol=1e-8, atol=1e-8)}


def spectra():
    x, y, sigma = gaussian_batch()
    y = np.asarray(y)
    return x, np.stack([y, 1.1 * y, y + 0.02, np.full_like(y, np.nan)]), sigma


# Those of BFGS some at a time; `test_some_at_a_time_of_what_has_no_elements` is of LM.
@pytest.mark.parametrize(
    ("name", "batch"),
    [("LM", None), pytest.param("BFGS", 2, marks=pytest.mark.seams)],
)
def test_a_solver_for_each(name, batch):
    trainers = [GaussianFit(gaussian()) for _ in range(4)]
    options = {"data_axis": (None, 0, None), "solver": SOLVERS[name], "batch": batch}
    result = many(trainers, spectra(), 50, **options)
    x, many_y, sigma = spectra()
    for index, y in enumerate(many_y):
        alone = trainers[0].solve(SOLVERS[name], (x, y, sigma), max_steps=50)
        own = result.trainer(index)
        assert result.stop_reasons[index] is alone.stop_reason
        close(own.params, alone.trainer.params, rtol=1e-6)
        close(own.best, alone.best, rtol=1e-6)
        # At the end of a perfect fit the last step is a matter of rounding.
        assert abs(own.step_count - alone.trainer.step_count) <= 1
        assert own.nan_report() == alone.trainer.nan_report()
        rows = min(5, len(alone.history))
        losses = result.history.loss[:rows, index]
        np.testing.assert_allclose(losses, alone.history.loss[:rows], rtol=1e-6)
    assert result.stop_reasons[3] is vn.StopReason.NON_FINITE
    assert result.stop_reasons[:3] == (vn.StopReason.CONVERGED,) * 3


# What goes wrong.


@pytest.mark.own_words
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: many([]), ValueError, "`trainers` is empty"),
        (
            lambda: many(starts()[0]),
            TypeError,
            r"is one trainer.*filter_vmap.*`make\(key\)`",
        ),
        (lambda: many({"a": 1}), TypeError, "`trainers` is of type `dict`"),
        (lambda: many([starts()[0], 3]), TypeError, r"`trainers\[1\]` is 3"),
        (
            lambda: many([starts()[0], *starts(optax.adam(0.1, b1=0.8))]),
            ValueError,
            r"(?s)`trainers\[1\]` differs from `trainers\[0\].*b1.*0\.8",
        ),
        (
            lambda: many([starts()[0], LineFit(line(), ADAM, train="slope")]),
            ValueError,
            r"(?s)`trainers\[1\]` differs.*offset",
        ),
        (
            lambda: many([bounded(-9, 9), bounded(-9, None)]),
            ValueError,
            r"(?s)differs.*same sides.*1e30\.\nbounds\.high\.slope",
        ),
        (lambda: many([bounded(-9, 9), starts()[0]]), ValueError, "same sides"),
        (lambda: many(starts(), batch=3), ValueError, "does not divide.*1, 2, 4"),
        (lambda: many(starts(), batch=0), ValueError, "`batch` is 0"),
        (
            lambda: many(starts(), curves(), data_axis=(None, 0)),
            ValueError,
            r"`data\[1\]` has the shape \(3, 16\), whose axis 0.*trainers, 4",
        ),
        (
            lambda: many(starts(), curves(), data_axis=(None, 5)),
            ValueError,
            "whose axis 5",
        ),
        (
            lambda: many(starts(), BATCH, data_axis=(None, 0, 0)),
            ValueError,
            "a tree of axes like `data`",
        ),
        (
            lambda: many(
                starts(), vn.Minibatches(BATCH, 3, key=jax.random.key(0)), data_axis=0
            ),
            TypeError,
            "`data` is Minibatches, which all trainers share",
        ),
        (lambda: many(starts(), solver=LM, every=2), TypeError, "`every` is for a fit"),
        (lambda: vn.fit_many(starts(), BATCH, 9, solver=3), TypeError, "`solver` is"),
        (lambda: vn.fit_many(starts(), BATCH, 0, solver=LM), ValueError, "`steps`"),
        (
            lambda: many([LineFit(line()), LineFit(line())]),
            ValueError,
            "has no optimiser",
        ),
        (lambda: many(starts(), record="x"), vn.UnknownPathError, "`record`: 'x'"),
    ],
)
def test_what_cannot_be(make, error, match):
    with pytest.raises(error, match=match):
        make()


X, Y = BATCH
LISTS = {
    "tuples": ([(X, Y)] * 4, {}),
    "tuples, solved": ([(X, Y)] * 4, {"solver": LM}),
    "arrays": ([Y] * 4, {}),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_data_sets_is_to_be_stacked(name):
    data, options = LISTS[name]
    trainers = starts(None if options else ADAM)
    with pytest.raises((TypeError, ValueError)) as caught:
        many(trainers, data, **options)
    assert "`data` is a list of 4" in caught.value.__notes__[-1]
    assert "`data_axis=(None, 0)`" in caught.value.__notes__[-1]
    for other in (data[:3], tuple(data), {"all": data}):
        with pytest.raises((TypeError, ValueError, AttributeError)) as caught:
            many(trainers, other, **options)
        assert "`data` is a list" not in str(getattr(caught.value, "__notes__", ""))


def test_an_error_of_a_callback_says_nothing_of_the_data():
    def broken(trainer, history):
        raise ValueError("mine")

    class Sum(vn.Trainer):
        def loss(self, model, batch):
            return (model - jnp.sum(jnp.stack(batch))) ** 2

    trainers = [Sum(jnp.asarray(x), optax.sgd(0.1)) for x in (1.0, 2.0)]
    with pytest.raises(ValueError, match="mine") as caught:
        many(trainers, [X, Y], callback=broken)
    assert "`data` is a list" not in str(getattr(caught.value, "__notes__", ""))


ROWS = {
    "alike": (
        [Y] * 4,
        r"trainers, 4\. `data\[1\]` is a list\. Stack it .*`np\.stack\(",
    ),
    "ragged": (
        [Y, Y[:5], Y, Y],
        r"`data\[1\]` is a list\. Pad .*`np\.stack\(data\[1\]",
    ),
    "numbers": ([1.0, 2.0, 3.0, 4.0], r"shape \(\), .*`np\.stack\(data\[1\]\)`"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_list_of_rows_is_to_be_stacked(name):
    rows, match = ROWS[name]
    with pytest.raises(ValueError, match=match):
        many(starts(), (X, rows), data_axis=(None, 0))


def test_axes_that_disagree():
    stacked = eqx.filter_vmap(lambda slope: LineFit(line(slope), ADAM))(jnp.arange(3.0))
    longer = eqx.tree_at(lambda t: t._progress.params.slope, stacked, jnp.arange(4.0))
    with pytest.raises(ValueError, match=r"3 members.*'params\.slope'.*4"):
        many(longer)

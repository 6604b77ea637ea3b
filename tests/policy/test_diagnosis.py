"""Values that are not finite are traced to the data, the parameters or the model."""

import contextlib
import re
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from inside import bad_data, diagnosed
from models import GaussianFit, LineFit, Pair, gaussian, line
from notebook import MODEL, Notebook


def curve(dtype=np.float64, **bad):
    """Data of a Gaussian, with some values that are bad."""
    x = np.linspace(-2.0, 2.0, 200, dtype=dtype)
    data = {"x": x, "y": np.exp(-(x**2) / 2), "sigma": np.ones_like(x)}
    for name, values in bad.items():
        for index, value in values.items():
            data[name][index] = value
    return tuple(data.values())


def fitted(policy=vn.StopFit(), model=None):  # noqa: B008
    return GaussianFit(model or gaussian(), optax.sgd(1e-3), nan_policy=policy)


NAN, INF = np.nan, np.inf
GRID = np.array([[1.0, NAN, 1.0], [INF, 1.0, -INF]])

DATA = {
    "one": ((np.ones(3), np.array([1.0, 1.0, NAN])), "`batch[1]` has 1 NaN, at [2]."),
    "infinities": (
        {"flux": np.array([[1.0, 1.0], [-INF, INF]])},
        "`batch['flux']` has 2 infinities, the first at [1, 0].",
    ),
    "both": (
        [GRID],
        "`batch[0]` has 1 NaN, at [0, 1], and 2 infinities, the first at [1, 0].",
    ),
    "an array": (jnp.array([NAN, NAN]), "`batch` has 2 NaNs, the first at [0]."),
    "float": ({"a": {"b": NAN}}, "`batch['a']['b']` is NaN."),
    "0-d": (Pair(1.0, jnp.asarray(INF)), "`batch.right` is infinite."),
    "complex": (np.array([1j, 1 + NAN * 1j]), "`batch` has 1 NaN, at [1]."),
    "bfloat16": (jnp.array([1, INF], jnp.bfloat16), "`batch` has 1 infinity, at [1]."),
    "float32": (np.array([NAN], np.float32), "`batch` has 1 NaN, at [0]."),
    "no floats": ((np.arange(3), "text", True, None, np.zeros((0, 2)), 7), ""),
    "a key": (jax.random.key(0), ""),
    "many": (
        [NAN] * 6,
        "`batch[0]` is NaN. `batch[1]` is NaN. `batch[2]` is NaN. `batch[3]` is NaN. "
        "2 more leaves are not finite.",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data_are_named(name):
    batch, sentence = DATA[name]
    assert " ".join(bad_data(batch)) == sentence


def with_field(name, value):
    return eqx.tree_at(lambda m: getattr(m, name), gaussian(), jnp.asarray(value))


class Rooted(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sqrt(model["a"]["b"]) + jnp.sum(model["c"] * 1.0)


class Huge(vn.Trainer):
    def residuals(self, model, batch):
        return 1e200 * (model.slope + batch)


class Both(GaussianFit):
    def loss(self, model, batch):
        return jnp.log(model.power)


class Joint(vn.Trainer):
    """Several likelihoods, by name."""

    def residuals(self, model, batch):
        rates = jnp.full(4, model["rate"])
        return {
            "light": {"first": model["a"] - batch, "second": jnp.sqrt(model["a"] - 5)},
            "counts": vn.likelihoods.Poisson(rates, jnp.arange(4)),
            "grid": (model["a"] / batch).reshape(2, 2),
        }


def joint(batch, a=6.0, rate=1.0):
    model = {"a": jnp.full(4, a), "rate": jnp.asarray(rate)}
    return Joint(model), jnp.asarray(batch)


def rooted(value):
    return Rooted({"a": {"b": jnp.asarray(value)}, "c": jnp.ones(2), "d": None})


FINITE = "The data and the parameters are finite: "
ORIGINS = {
    "data": (
        lambda: (fitted(), curve(y={17: NAN})),
        "`batch[1]` has 1 NaN, at [17]. `residuals` is NaN first at [17] of 200.",
    ),
    "a parameter": (
        lambda: (fitted(model=with_field("std", NAN)), curve()),
        "The parameter 'std' is NaN. `residuals` is NaN first at [0] of 200.",
    ),
    "an element": (
        lambda: (
            Rooted({"a": {"b": jnp.ones(())}, "c": jnp.array([1.0, INF])}),
            None,
        ),
        "The parameter 'c' has 1 infinity, at [1]. `loss` is infinite.",
    ),
    "frozen": (
        lambda: (
            GaussianFit(with_field("std", NAN), optax.sgd(1.0), train="mean"),
            curve(),
        ),
        "The frozen value 'std' is NaN. `residuals` is NaN first at [0] of 200.",
    ),
    "residuals": (
        lambda: (fitted(), curve(sigma={5: 0.0})),
        FINITE + "`residuals` is infinite first at [5] of 200. `batch[2]` is 0 there",
    ),
    "loss": (
        lambda: (Both(with_field("power", -1.0)), curve()),
        FINITE + "`loss` is NaN.",
    ),
    "sum": (
        lambda: (Huge(line()), np.ones(3)),
        FINITE + "half the sum of squared `residuals` is infinite.",
    ),
    "gradient": (
        lambda: (rooted(0.0), None),
        FINITE + "the loss is finite, but not its gradient in 'a.b'.",
    ),
    "one of several": (
        lambda: joint(np.ones(4), a=4.0),
        FINITE + "`residuals['light']['second']` is NaN first at [0] of 4.",
    ),
    "one of several with a zero": (
        lambda: joint([1.0, 1.0, 0.0, 1.0]),
        FINITE + "`residuals['grid']` is infinite first at [1, 0] of shape (2, 2). "
        "`batch` is 0 there.",
    ),
    "rates of several": (
        lambda: joint(np.ones(4), rate=-1.0),
        FINITE + "`residuals['counts']` is infinite first at [0] of 4. 4 of 4 rates "
        "are negative, the first at [0].",
    ),
    "two of several": (
        lambda: joint([1.0, NAN, 1.0, 1.0], a=6.0),
        "`batch` has 1 NaN, at [1]. `residuals['grid']` is NaN first at [0, 1] of "
        "shape (2, 2). `residuals['light']['first']` is NaN first at [1] of 4.",
    ),
    "nothing": (
        lambda: (rooted(1.0), None),
        "The data, the parameters, the loss and its gradient are finite.",
    ),
}


@pytest.mark.filterwarnings("ignore::vernal.ObjectiveWarning")
@pytest.mark.parametrize("name", ORIGINS)
def test_the_origin_is_named(name):
    make, sentence = ORIGINS[name]
    told = str(diagnosed(*make()))
    assert told.startswith(sentence)
    assert ("jnp.where" in told) == (name == "gradient")
    assert "the range of float32" not in told


class Losing(vn.Trainer):
    """Has another loss of a zero, a one and data."""

    fn: Any = eqx.field(static=True)

    def __init__(self, fn, dtype="f8"):
        self.fn = fn
        super().__init__({"zero": jnp.zeros((), dtype), "one": jnp.ones((), dtype)})

    def loss(self, model, batch):
        return jnp.sum(self.fn(model["zero"], model["one"], batch))


# Functions without a derivative somewhere, and how they are named.
STEEP = {
    "acos": (lambda o, i, x: jnp.arccos(jnp.clip(i, -1, 1)) * x, "`jnp.arccos` at 1"),
    "asin": (lambda o, i, x: x * jnp.arcsin(-i), "`jnp.arcsin` at -1"),
    "atan2": (
        lambda o, i, x: i * jnp.arctan2(o, o * x),
        "`jnp.arctan2` (or `jnp.angle`) at 0",
    ),
    "norm": (lambda o, i, x: i * jnp.linalg.norm(o * x), "`jnp.sqrt` (or a norm) at 0"),
    "power": (lambda o, i, x: i + (o * x) ** 0.5, "a power, `**`, at 0"),
    "behind a where": (
        lambda o, i, x: i + jnp.where(o > 0, jnp.log(o * x), 0.0),
        "`jnp.log` at 0",
    ),
    "a pole behind a where": (
        lambda o, i, x: jnp.where(x > 2, i / (x - 2 * i), o),
        "a division at 0",
    ),
    "after a root of data": (
        lambda o, i, x: i * jnp.sqrt(x - x[0]) + jnp.arccos(i),
        "`jnp.arccos` at 1",
    ),
    "after what is held": (
        lambda o, i, x: jnp.sqrt(jax.lax.stop_gradient(o)) + jnp.arccosh(i),
        "`jnp.arccosh` at 1",
    ),
}


@pytest.mark.parametrize("name", STEEP)
def test_a_function_without_a_derivative_is_named(name):
    fn, where = STEEP[name]
    told = str(diagnosed(Losing(fn), jnp.array([2.0, 3.0])))
    assert "not its gradient in" in told
    assert f". The derivative of {where} is not finite. Keep its argument" in told


def test_what_is_not_found_is_listed():
    loop = lambda o, i, x: jax.lax.map(lambda x: jnp.sqrt(o * x), x)
    told = str(diagnosed(Losing(loop), jnp.array([2.0, 3.0])))
    assert "not its gradient in 'zero'. Look for `jnp.sqrt`" in told
    assert "the range of float32" not in told


def test_squares_beyond_the_range_are_for_float32():
    steep = lambda o, i, x: i + 1e30 * jnp.sin(1e30 * o)
    told = str(diagnosed(Losing(steep, "f4"), jnp.zeros(())))
    assert "not its gradient in 'zero'" in told
    assert "the range of float32" in told


class Counted(vn.Trainer):
    """Has error bars that are the roots of counts."""

    def residuals(self, model, batch):
        counts = batch["n"].astype(float)
        return (model["rate"] - counts) / jnp.sqrt(counts)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_zeros_where_residuals_are_not_finite_are_named(shape):
    counts = jnp.array([2, 0, 3, 0, 1, 4]).reshape(shape)
    others = {"x": jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]), "one": jnp.zeros(())}
    model = {"rate": jnp.array(2.0)}
    told = str(diagnosed(Counted(model), {"n": counts, **others}))
    assert "`batch['n']` is 0 there" in told
    assert "vn.likelihoods.Poisson" in told
    assert "'x'" not in told
    # Nor are zeros what is wrong here.
    told = str(diagnosed(Counted({"rate": jnp.array(NAN)}), {"n": counts, **others}))
    assert "is 0 there" not in told


class Barred(vn.Trainer):
    """Whose mean is right at once, so that an error bar of zero gives 0 / 0."""

    def residuals(self, model, batch):
        std = batch["std"] if "std" in batch else jnp.sqrt(batch["variance"])
        where = batch.get("where")
        mean = model * jnp.ones((2, 3))
        return vn.likelihoods.Gaussian(mean, batch["y"], 2 * std, where=where)


THERE = jnp.array([[True, True, True], [False, True, True]])
BARS = {
    "negative": ({"std": [[1, 1, 1], [1, -1, 1]]}, "1 of 6", "negative", "[1, 1]"),
    "zero": ({"std": [[1, 0, 1], [1, 1, 1]]}, "1 of 6", "zero", "[0, 1]"),
    "all zero": ({"std": np.zeros((2, 3))}, "6 of 6", "zero", "[0, 0]"),
    "one zero": ({"std": 0.0}, "6 of 6", "zero", "[0, 0]"),
    "of a column": ({"std": [[1], [-1]]}, "3 of 6", "negative", "[1, 0]"),
    "a root": ({"variance": [[1, 1, 1], [0, 1, 1]]}, "1 of 6", "zero", "[1, 0]"),
    "masked": (
        {"std": [[1, 1, 1], [-1, 0, 1]], "where": THERE}, "1 of 6", "zero", "[1, 1]"
    ),
}  # fmt: skip


@pytest.mark.loose_ranks
@pytest.mark.parametrize("case", BARS)
def test_error_bars_that_are_not_positive_are_named(case):
    bars, count, what, place = BARS[case]
    bars = {k: jnp.asarray(v, bool if k == "where" else float) for k, v in bars.items()}
    name = next(iter(bars))
    batch = {"y": jnp.ones((2, 3)), "x": jnp.arange(6.0), **bars}
    told = str(diagnosed(Barred(jnp.ones(())), batch))
    assert f"`residuals` is NaN first at {place} of shape (2, 3). {count} error" in told
    assert f"error bars (`std`) are {what}, the first at {place}." in told
    assert f"`batch['{name}']` is not positive there. Leave such data out" in told
    assert told.count("there.") == 1
    assert "mask them" in told


def test_a_scale_that_is_not_positive_is_named():
    class Robustly(vn.Trainer):
        def residuals(self, model, batch):
            return vn.likelihoods.Robust(model - batch, "huber", batch)

    told = str(diagnosed(Robustly(jnp.ones(())), jnp.array([1.0, -1.0])))
    assert "1 of 2 `scale` are not positive, the first at [1]." in told


def test_a_loss_that_cannot_be_evaluated_hides_nothing():
    class Broken(LineFit):
        def loss(self, model, batch):
            raise RuntimeError

    told = diagnosed(Broken(line()), (np.ones(2), np.array([1.0, NAN])))
    assert str(told) == "`batch[1]` has 1 NaN, at [1]."


# What a fit says.

WORD = "`batch[1]` has 1 NaN, at [17]."
BAD = curve(y={17: NAN})


def test_a_fit_that_ends_at_its_first_step_warns_of_the_data():
    with pytest.warns(UserWarning, match=re.escape(WORD)) as caught:
        result = fitted().fit(BAD, 10)
    (warning,) = caught
    assert warning.filename == __file__
    assert result.stop_reason is vn.StopReason.NON_FINITE


def test_a_good_fit_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fitted().fit(curve(), 3)
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN


@pytest.mark.parametrize("walk", ["fit", "step", "fit_many"])
@pytest.mark.parametrize("origin", ["data", "model"])
def test_an_error_says_where_from_and_advises_to_skip_what_may_pass(walk, origin):
    trainer = fitted(vn.RaiseOnNan())
    batch = BAD if origin == "data" else curve(sigma={5: 0.0})
    take = {
        "fit": lambda: trainer.fit(batch, 3),
        "step": lambda: trainer.step(batch),
        "fit_many": lambda: vn.fit_many([trainer, trainer], batch, 3),
    }
    with pytest.raises(vn.NonFiniteError) as caught:
        take[walk]()
    told = str(caught.value)
    assert ("SkipStep" in told) == (origin == "model")
    assert (WORD in told) == (origin == "data")
    assert "`residuals` is" in caught.value.explanation


def test_a_later_batch_of_a_stream_is_named_with_its_step():
    batches = [curve()] * 3 + [BAD] + [curve()] * 4
    with pytest.warns(UserWarning, match=r"At step 3: `batch\[1\]` has 1 NaN"):
        result = fitted().fit(vn.Stream(batches), 6)
    assert int(result.trainer.step_count) == 4


def test_later_minibatches_are_looked_at_too():
    data = vn.Minibatches(BAD, 10, key=jax.random.key(3))
    trainer = fitted().fit(curve(), 3).trainer
    with pytest.warns(UserWarning, match=r"at \[17\] of all the examples"):
        trainer.fit(data, 40)


class Astray(LineFit):
    def loss(self, model, batch):
        return -jnp.exp(model.slope)


def test_a_fit_that_went_astray_is_not_blamed_on_the_data():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = Astray(line(1.0), optax.sgd(1e3)).fit(curve(), 50)
    assert result.stop_reason is vn.StopReason.NON_FINITE


# No step was accepted.

PATIENT = vn.SkipStep() | vn.StopAfter(4)
SKIPPED = {
    "too long": (BAD, 9, vn.StopReason.NON_FINITE),
    "a stream": (
        vn.Stream(lambda step: iter([BAD] * 9)),
        3,
        vn.StopReason.ALL_SKIPPED,
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_steps_that_were_all_skipped_are_not_taken(name):
    data, steps, reason = SKIPPED[name]
    assert fitted(PATIENT).fit(data, steps).stop_reason is reason


def test_of_what_was_before_a_fit_it_knows_and_is_not_misled():
    with pytest.warns(UserWarning, match="No step was accepted") as caught:
        result = fitted(PATIENT).fit(BAD, 3)
    assert WORD in str(caught[0].message)
    assert result.stop_reason is vn.StopReason.ALL_SKIPPED
    after = result.trainer.fit(curve(), 2)
    assert after.stop_reason is vn.StopReason.STEPS_TAKEN
    again = after.trainer.fit(BAD, 2)
    assert again.stop_reason is vn.StopReason.ALL_SKIPPED


def test_of_many_each_has_its_own_reason_and_a_warning_names_them():
    x, y, sigma = curve()
    both = [fitted(vn.SkipStep())] * 2
    axes = None, 0, None
    with pytest.warns(
        UserWarning, match=r"1 of 2 trainers \(1\).*member 1: `batch\[1\]` has 1 NaN"
    ):
        result = vn.fit_many(both, (x, np.stack([y, BAD[1]]), sigma), 5, data_axis=axes)
    own = vn.StopReason.STEPS_TAKEN, vn.StopReason.ALL_SKIPPED
    assert result.stop_reasons == own
    with pytest.warns(
        UserWarning, match=r"all 2 trainers.*member 0: `batch\[1\]` has 1 NaN"
    ):
        vn.fit_many(both, (x, np.stack([BAD[1]] * 2), sigma), 5, data_axis=axes)


def test_on_a_mesh_the_data_are_named():
    mesh = jax.make_mesh((2,), ("data",))
    with pytest.warns(
        UserWarning, match=r"`batch\[1\]` has 1 NaN, at \[17\]"
    ) as caught:
        fitted().fit(BAD, 3, mesh=mesh)
    assert "`residuals` is NaN first at [17] of 200." in str(caught[0].message)


def test_in_a_program_nothing_can_be_said():
    told = []

    @jax.jit
    def run(batch):
        told.append(str(diagnosed(fitted(), batch)))
        return batch

    run(curve())
    assert "jax.jit" in told[0]


@pytest.mark.loose_dtypes
def test_a_solve_of_bad_data_warns_of_where_they_are():
    solver = optx.LevenbergMarquardt(1e-6, 1e-6)
    batch = curve(np.float32, y={17: NAN})
    with pytest.warns(UserWarning, match=r"`solve`.*`batch\[1\]` has 1 NaN, at \[17\]"):
        result = GaussianFit(gaussian()).solve(solver, batch)
    assert result.stop_reason is vn.StopReason.NON_FINITE
    raising = GaussianFit(gaussian(), nan_policy=vn.RaiseOnNan())
    with pytest.raises(vn.NonFiniteError, match=r"`batch\[1\]`.*where="):
        raising.solve(solver, batch)


def test_a_diagnosis_follows_the_code():
    book = Notebook(
        """
        S = jnp.nan
        def body(carry, x):
            return carry * S, None
        """,
        MODEL.format("jax.lax.scan(body, 1.0, jnp.zeros(1))[0]"),
    )
    trainer = book["trainer"]()
    assert "`residuals` is NaN" in str(diagnosed(trainer, np.arange(3.0)))
    book.run("S = 1.0")
    assert "its gradient are finite" in str(diagnosed(trainer, np.arange(3.0)))


class Zeroed(vn.Trainer):
    """One NaN in `x` spoils the gradient of `slope` alone: `where` does not help."""

    def residuals(self, model, batch):
        x, y = batch
        left = model["slope"] * x + model["offset"] - y
        return jnp.where(jnp.isfinite(x), left, 0.0)


def test_what_no_step_has_moved_is_named():
    x, y = np.linspace(0.0, 10.0, 50), np.linspace(1.0, 21.0, 50)
    bad = np.where(np.arange(50) == 5, np.nan, x)
    start = {"slope": jnp.array(1.0), "offset": jnp.array(0.0)}
    zeroed = lambda: Zeroed(start, optax.adam(0.1), nan_policy=vn.ZeroNans())
    said = r"not finite at 40 of the 40 steps{}, .*: {}\. .*batch\[0\].* \[5\]"
    with pytest.warns(UserWarning, match="`fit`.*" + said.format("", "slope")):
        result = zeroed().fit((bad, y), 40)
    assert result.model["slope"] == 1
    both = np.stack([x, bad]), np.stack([y, y])
    which = said.format(" of member 1", "slope")
    with pytest.warns(UserWarning, match="`fit_many`.*" + which):
        vn.fit_many([zeroed(), zeroed()], both, 40, data_axis=0)
    # The loss may be what is never finite, and a bad step alone is nothing to say.
    spoilt = np.where(np.arange(50) == 5, np.nan, y)
    with pytest.warns(UserWarning, match="went on: loss, offset, slope"):
        result = zeroed().fit((x, spoilt), 3)
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN


def test_a_member_that_stops_early_is_named_too():
    x, y = np.linspace(0.0, 10.0, 50), np.linspace(1.0, 21.0, 50)
    bad = np.where(np.arange(50) == 5, np.nan, x)
    start = {"slope": jnp.array(2.0), "offset": jnp.array(0.0)}
    make = lambda rate: Zeroed(start, optax.sgd(rate), nan_policy=vn.ZeroNans())
    data = np.stack([x, bad]), np.stack([y, y])
    stop = vn.Converged(rtol=1e-3, patience=2)
    with pytest.warns(UserWarning, match=r"`fit_many`.*of member 1, .*: slope"):
        many = vn.fit_many([make(1e-5), make(1e-2)], data, 500, data_axis=0, stop=stop)
    counts = many.trainers.step_count
    assert counts[1] < counts[0]


class Spoilt(vn.Trainer):
    """The loss is NaN at some steps."""

    at: Any = eqx.field(static=True)

    def __init__(self, at, policy, start=3.0):
        super().__init__({"a": jnp.array(start)}, optax.sgd(0.1), nan_policy=policy)
        self.at = at

    def loss(self, model, batch):
        spoilt = jnp.where(self.at(self.step_count), NAN, 1.0)
        return spoilt * jnp.square(model["a"] - batch)


STUCK = {
    "since the third step": (
        lambda at: at >= 2,
        50,
        "48 of the 50 steps, the last ones,",
    ),
    "at the end": (lambda at: at >= 30, 50, "20 of the 50 steps, the last ones,"),
    "at most steps": (lambda at: at % 3 > 0, 50, "33 of the 50 steps,"),
    "at the last step": (lambda at: at == 49, 50, None),
    "at every other step": (lambda at: at % 2 == 1, 50, None),
    "at one of two": (lambda at: at == 1, 2, None),
}


@pytest.mark.parametrize("policy", [vn.SkipStep(), vn.ZeroNans() | vn.StopAfter(60)])
@pytest.mark.parametrize("name", STUCK)
def test_a_fit_that_is_stuck_says_so(name, policy):
    at, steps, said = STUCK[name]
    expected = (
        pytest.warns(UserWarning, match=f"`fit`: not finite at {said} though.*: loss")
        if said
        else contextlib.nullcontext()
    )
    with expected:
        result = Spoilt(at, policy).fit(1.0, steps)
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN
    if said:
        trainers = [Spoilt(at, policy, start) for start in (3.0, 4.0)]
        with pytest.warns(UserWarning, match="steps of member 0, .*RaiseOnNan"):
            vn.fit_many(trainers, 1.0, steps)


@pytest.mark.filterwarnings("error")
def test_a_bad_step_among_good_ones_is_not_warned_of():
    class Once(Zeroed):
        def transform_grads(self, grads, model):
            is_bad = self.step_count == 2
            return jax.tree.map(lambda g: jnp.where(is_bad, jnp.nan, g), grads)

    start = {"slope": jnp.array(1.0), "offset": jnp.array(0.0)}
    trainer = Once(start, optax.adam(0.1), nan_policy=vn.ZeroNans())
    trainer.fit((np.linspace(0.0, 10.0, 50), np.linspace(1.0, 21.0, 50)), 5)

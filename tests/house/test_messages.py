"""Messages on the way: what is wrong, where, and what to do about it."""

import os
import signal
import subprocess
import sys
import time
import traceback
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from models import LineFit, line

X = np.linspace(0.0, 1.0, 5)
BATCH = X, 2 * X
MODEL = {"w": jnp.ones(2), "n": {"b": jnp.zeros(())}, "none": None}


def fitted(optimiser=None):
    return LineFit(line(), optimiser or optax.sgd(0.1))


# Slips of the pen.


class Weighted(LineFit):
    weight: float = 1.0


class Weighed(LineFit):
    weight: float

    def __init__(self, model, weight):
        super().__init__(model, weight=weight)


BFGS = optx.BFGS(1e-6, 1e-6)
SLIPS = {
    "fit": (lambda t: t.fit(BATCH, n_steps=3), "`Trainer.fit` .*mean 'steps'"),
    "fit's option": (lambda t: t.fit(BATCH, 3, recrd=1), "mean 'record'"),
    "solve": (lambda t: t.solve(BFGS, BATCH, max_step=3), "mean 'max_steps'"),
    "fit_many": (lambda t: vn.fit_many([t], BATCH, 3, recrd=1), "mean 'record'"),
    "fisher": (lambda t: t.fisher(BATCH, block="slope"), "mean 'blocks'"),
    "whiten": (lambda t: t.whiten(BATCH, optimizer=None), "mean 'optimiser'"),
    "replace": (lambda t: t.replace(optimizer=None), "mean 'optimiser'"),
    "a trainer": (
        lambda t: LineFit(line(), optimizer=optax.sgd(0.1)),
        "`LineFit` has no argument `optimizer`. Did you mean 'optimiser'",
    ),
    "a field": (
        lambda t: Weighted(line(), weight=2.0),
        "`Weighted` has no argument `weight`, which is a field of `Weighted`. Set it "
        r"in an `__init__` of that class, by `self\.weight = weight` before",
    ),
    "a field, to the class above": (
        lambda t: Weighed(line(), 2.0),
        "`Trainer` has no argument `weight`, which is a field of `Weighed`",
    ),
    "fit, swapped": (lambda t: t.fit(3, BATCH), r"`data` is 3\. Give the data first"),
    "fit_many, swapped": (lambda t: vn.fit_many([t], 3, BATCH), "Give the data first"),
    "solve, swapped": (lambda t: t.solve(BATCH, BFGS), "Give the solver first"),
    "a class of solvers": (
        lambda t: t.solve(optx.BFGS, BATCH),
        r"is the class `BFGS`\. Give an instance: `BFGS\(rtol",
    ),
    "many, a class of solvers": (
        lambda t: vn.fit_many([t], BATCH, 3, solver=optx.BFGS),
        "is the class `BFGS`",
    ),
    "a solver without a start": (
        lambda t: t.solve(optx.GoldenSearch(1e-8, 1e-8), BATCH),
        r"is `GoldenSearch`.*has no start.*optx\.BFGS.*`bounds=`",
    ),
    "many, a solver without a start, wrapped": (
        lambda t: vn.fit_many(
            [t], BATCH, 3, solver=optx.BestSoFarMinimiser(optx.GoldenSearch(1, 1))
        ),
        "is `GoldenSearch`",
    ),
    "not called": (
        lambda t: LineFit(line(), optax.adam),
        r"is the function `adam`.* Call it: `adam\(1e-3\)`",
    ),
    "a rule not called": (
        lambda t: vn.ParamOptimiser({"slope": optax.adam}),
        r"Call it: `adam\(1e-3\)`",
    ),
    "no rate": (lambda t: LineFit(line(), optax.adam(None)), "rate `None`.*loss would"),
    "no rate in a rule": (
        lambda t: vn.ParamOptimiser({"slope": optax.adamw(None)}),
        r"`rules\['slope'\]` has the learning rate `None`",
    ),
    "no rate later": (lambda t: t.replace(optimiser=optax.sgd(None)), "rate `None`"),
    "no optimiser": (
        lambda t: LineFit(line()).fit(BATCH, 3),
        r"Give it one: `LineFit\(model, optax",
    ),
}


# With `--annotations`, jaxtyping compares the arguments of a class first.
# Where annotations are checked, jaxtyping refuses these first.
BY_CLASS = ("a trainer", "a field", "a field, to the class above")
NAMES = [
    pytest.param(name, marks=pytest.mark.as_compiled) if name in BY_CLASS else name
    for name in SLIPS
]


@pytest.mark.own_words
@pytest.mark.parametrize("name", NAMES)
def test_a_slip_of_the_pen_is_named_with_its_remedy(name):
    slip, message = SLIPS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        slip(fitted())


def test_a_rate_may_follow_a_transformation_without_one():
    for tx in (
        optax.chain(optax.adam(None), optax.scale(-0.1)),
        optax.chain(optax.sgd(0.1), optax.identity()),
        optax.adafactor(),
        optax.identity(),
        optax.scale_by_adam(),
    ):
        fitted(tx)


def test_a_promotion_of_types_in_an_optimiser_is_told_as_one():
    halved = optax.stateless(lambda updates, _: jax.tree.map(halve, updates))
    with pytest.raises(ValueError, match="promotion path") as caught:
        fitted(halved).step(BATCH)
    assert isinstance(caught.value, jax.dtypes.TypePromotionError)


def halve(update):
    return update * jnp.asarray(0.5, jnp.float16)


def test_unlike_trainers_are_told_by_their_first_differences():
    def wide(count):
        return LineFit({f"k{i}": jnp.ones(count) for i in range(12)}, optax.sgd(0.1))

    with pytest.raises(ValueError, match="differs from") as caught:
        vn.fit_many([wide(2), wide(3)], BATCH, 1)
    lines = str(caught.value).split("\n")
    assert len(lines) == 10
    assert lines[-1].startswith("and ")


def exponential():
    class Exp(vn.Bijection):
        def forward(self, x):
            return jnp.exp(x)

        def inverse(self, y):
            return jnp.log(y)

    return Exp()


MADE_ANEW = {
    "ties": ({"offset": lambda m: 2 * m.slope}, {"offset": lambda m: 3 * m.slope}),
    "bounds": ({"slope": exponential()}, {"slope": exponential()}),
}


@pytest.mark.parametrize("name", MADE_ANEW)
def test_what_is_made_anew_for_each_trainer_is_told_to_be_made_once(name):
    make = lambda own: LineFit(line(1.0), optax.sgd(0.1), **{name: own})
    told = r"(?s)once, outside of the loop.*\n\w+\.\S+: is another"
    with pytest.raises(ValueError, match=told):
        vn.fit_many(list(map(make, MADE_ANEW[name])), BATCH, 1)


def test_help_lists_the_public_names():
    assert "Trainer" in vn.__all__
    assert all(getattr(vn, name) is not None for name in vn.__all__)
    assert not {"annotations", "_version", "plot"} & {*vn.__all__}


# Tracebacks.


def helper(model, x):
    return model(x)


class Ragged(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return helper(model, x) - y[:-1]


ENTRANCES = {
    "fit": lambda t: t.fit(BATCH, 3),
    "step": lambda t: t.step(BATCH),
    "solve": lambda t: t.solve(optx.LevenbergMarquardt(1e-8, 1e-8), BATCH),
    "fisher": lambda t: t.fisher(BATCH),
    "errors": lambda t: t.standard_errors(BATCH),
    "whiten": lambda t: t.whiten(BATCH),
    "fit_many": lambda t: vn.fit_many([t, t], BATCH, 3),
    "unroll": lambda t: vn.unroll(t, BATCH, 3),
}


@pytest.mark.seams
@pytest.mark.as_compiled  # Checks of annotations have frames of their own.
@pytest.mark.parametrize("name", ENTRANCES)
def test_a_traceback_shows_the_users_frames_and_few_others(name):
    with pytest.raises(TypeError, match="incompatible shapes") as caught:
        ENTRANCES[name](Ragged(line(), optax.sgd(0.1)))
    frames = traceback.extract_tb(caught.value.__traceback__)
    own = [frame.name for frame in frames if frame.filename == __file__]
    assert own[-1] == "residuals"
    assert len(frames) <= len(own) + 2
    assert len(traceback.format_exception(caught.value)) < 15


def test_all_frames_can_be_seen():
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with pytest.raises(TypeError) as caught:
            Ragged(line(), optax.sgd(0.1)).step(BATCH)
    finally:
        jax.config.update("jax_traceback_filtering", before)
    assert len(traceback.extract_tb(caught.value.__traceback__)) > 10


def test_an_error_of_the_librarys_own_keeps_its_frames():
    with pytest.raises(ValueError, match="no optimiser") as caught:
        LineFit(line()).step(BATCH)
    assert "vernal" in traceback.extract_tb(caught.value.__traceback__)[-1].filename


def test_the_note_of_a_result_is_for_steps_that_were_taken():
    note = "The fit up to here is `.result` of this error."

    def callback(trainer, history):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fitted().fit(BATCH, 3, callback=callback)
    assert note in caught.value.__notes__
    with pytest.raises(TypeError) as caught:
        Ragged(line(), optax.sgd(0.1)).fit(BATCH, 3)
    assert note not in getattr(caught.value, "__notes__", ())
    assert int(caught.value.result.trainer.step_count) == 0


# Leaves that are masked.

RULES = {"w": optax.sgd(1.0), "n.b": optax.adam(0.1)}


def masked(tx):
    return optax.masked(tx, {"w": True, "n": {"b": False}, "none": None})


def partitioned(tx):
    labels = {"w": "x", "n": {"b": "y"}, "none": None}
    return optax.partition({"x": tx, "y": optax.set_to_zero()}, labels)


@pytest.mark.seams
@pytest.mark.parametrize("wrap", [masked, partitioned])
def test_rules_of_masked_leaves_have_nothing_to_do(wrap):
    tx = wrap(vn.ParamOptimiser(RULES))
    state = tx.init(MODEL)
    grads = jax.tree.map(jnp.ones_like, MODEL)
    updates, _ = tx.update(grads, state, MODEL)
    np.testing.assert_array_equal(updates["w"], -np.ones(2))
    assert updates["n"]["b"] == (1.0 if wrap is masked else 0.0)


def test_a_rule_of_a_masked_leaf_is_still_known_to_be_one():
    tx = masked(vn.ParamOptimiser({"w": optax.sgd(1.0), "n.c": optax.sgd(1.0)}))
    with pytest.raises(vn.UnknownPathError, match=r"'n\.c' matches nothing"):
        tx.init(MODEL)


def test_a_mask_that_asks_a_rules_leaves_for_an_attribute():
    mask = lambda params: params.slope
    both = {("slope", "offset"): optax.masked(optax.sgd(1.0), mask)}
    one = {"slope": optax.masked(optax.sgd(1.0), mask)}
    for rules in both, one:
        optimiser = vn.ParamOptimiser(rules, default=optax.sgd(1.0))
        with pytest.raises(AttributeError, match=r"by path.*`params\['slope'\]`"):
            fitted(optimiser)


def test_an_error_of_attributes_elsewhere_is_the_users():
    mask = lambda params: np.nothing
    rules = {"slope": optax.masked(optax.sgd(1.0), mask), "offset": None}
    with pytest.raises(AttributeError, match="module 'numpy'"):
        fitted(vn.ParamOptimiser(rules))


@pytest.mark.seams
def test_optax_maps_the_parts_of_a_state_that_are_like_parameters():
    rules = {"w": optax.adam(0.1), "n.b": vn.window(optax.sgd(0.1, momentum=0.9), 1)}
    optimiser = vn.ParamOptimiser(rules, first=optax.trace(0.5))
    state = optimiser.init(MODEL)
    ones = jax.tree.map(jnp.ones_like, MODEL)
    _, state = optimiser.update(ones, state, MODEL)
    doubled = optax.tree_map_params(optimiser, lambda x: 2 * x, state)
    adam, window = doubled.groups
    assert adam[0].count == 1
    assert window.count == 1
    for name in ("mu", "nu"):
        own, before = getattr(adam[0], name), getattr(state.groups[0][0], name)
        np.testing.assert_array_equal(own["w"], 2 * before["w"])
    np.testing.assert_array_equal(doubled.first.trace["w"], 2 * np.ones(2))
    # It is a state like any other.
    updates, after = jax.jit(optimiser.update)(ones, doubled, MODEL)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert bool(jnp.all(updates["w"] < 0))
    marks = optax.tree_map_params(
        optimiser, lambda _: 1, state, transform_non_params=lambda _: 0
    )
    assert sum(jax.tree.leaves(marks)) == 5


# Static fields.


class Grid(eqx.Module):
    weight: jax.Array
    grid: object = eqx.field(static=True)


STATIC = {
    "array": (np.ones(3), False),
    "in a tuple": ((1, np.ones(1)), False),
    "in a dict": ({"x": np.arange(2)}, False),
    "numbers": ((1.0, "text", None), True),
    "list": ([1, 2], True),
}


@pytest.mark.seams
@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
@pytest.mark.parametrize("name", STATIC)
def test_an_array_in_a_static_field_is_named(name):
    value, is_right = STATIC[name]
    model = {"optics": [Grid(jnp.ones(2), value)]}

    class Fit(vn.Trainer):
        def loss(self, model, batch):
            return jnp.sum(model["optics"][0].weight ** 2)

    if is_right:
        trainer, _ = Fit(model, optax.sgd(0.1)).step(None)
        assert int(trainer.step_count) == 1
        return
    with pytest.raises(TypeError, match=r"static field 'optics\.0\.grid' holds an arr"):
        Fit(model, optax.sgd(0.1))


# What a batch may hold.


class Foreign:
    """An array of another library."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        if self.array is None:
            raise RuntimeError("it requires grad: use tensor.detach()")
        return np.asarray(self.array, dtype)


class OnDevice(Foreign):
    """One that NumPy does not see."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("implicit conversion is not allowed")

    def __dlpack__(self, **options):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("kind", [Foreign, OnDevice])
def test_arrays_of_other_libraries_are_turned_into_ours(kind):
    seen = []

    class Fit(LineFit):
        def loss(self, model, batch):
            seen.extend(batch)
            return super().loss(model, batch)

    y = np.array(BATCH[1])
    batch = kind(X), kind(y)
    trainer = Fit(line(), optax.sgd(0.1))
    _, info = trainer.step(batch)
    assert info.loss == trainer.step(BATCH)[1].loss
    assert all(isinstance(leaf, jax.Array) for leaf in seen)
    data = vn.Minibatches(batch, 2, key=jax.random.key(0))
    y[:] = 0.0
    np.testing.assert_array_equal(data.arrays[1], BATCH[1])


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("kind", [">f4", ">f8", ">i4", "<f8"])
def test_an_array_of_either_byte_order_is_an_array(kind):
    x = np.array(X).astype(kind)
    batch = np.asarray(x, float), BATCH[1]
    trainer = fitted()
    assert trainer.step((x, BATCH[1]))[1].loss == trainer.step(batch)[1].loss
    model = np.ones(2).astype(kind)
    if model.dtype.kind == "f":
        params = Named(model, optax.sgd(0.1)).params
        assert params.dtype == model.dtype.newbyteorder("=")


class Quantity(np.ndarray):
    unit = "m"


class Unhashable:
    __hash__ = None  # pyright: ignore


MEANINGFUL = {
    "masked": (np.ma.masked_array(X, X > 0.5), r"a masked array.*compressed"),
    "masked, nothing": (
        np.ma.masked_array(X),
        r"a masked array.*Nothing is masked.*`y\.data`",
    ),
    "quantity": (X.view(Quantity), r"a Quantity.*to_value"),
    "records": (np.zeros(5, [("a", float)]), "an array of dtype"),
    "objects": (np.array([1, None, 2]), "an array of dtype object"),
    "foreign objects": (Foreign(np.array([1, None])), "an array of dtype object"),
    "foreign masked": (Foreign(None), "a Foreign.*detach"),
    "dates": (np.array(["2020-01-01"], "M8[D]"), "an array of dtype datetime64"),
    "bytes": (np.void(b"a"), "an array of dtype .V1"),
    "an array of long doubles": (np.longdouble([1, 2]), "an array of long doubles"),
    "no hash": (Unhashable(), ".*cannot be hashed"),
}


@pytest.mark.parametrize("name", MEANINGFUL)
def test_arrays_that_mean_more_than_their_numbers_are_refused(name):
    leaf, message = MEANINGFUL[name]
    trainer, batch = fitted(), {"a": X, "b": [leaf]}
    told = rf"\['b'\]\[0\]` is {message}"
    validation = {"validation": (batch, 1)}
    with pytest.raises(TypeError, match=f"`data{told}"):
        trainer.fit(batch, 3)
    with pytest.raises(TypeError, match=f"`validation{told}"):
        trainer.fit(BATCH, 3, **validation)
    with pytest.raises(TypeError, match=told):
        vn.Minibatches(batch, 2, key=jax.random.key(0))


def test_a_memory_map_is_an_array(tmp_path):
    x = np.memmap(tmp_path / "x", float, "w+", shape=5)
    x[:] = X
    assert fitted().step((x, BATCH[1]))[1].loss == fitted().step(BATCH)[1].loss


# Batches of a stream that change in what is static.


class Counted(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sum(model**2) * len(batch["name"]) + batch["n"]


def counted(numbers):
    batches = [{"n": n, "name": "text", "x": X} for n in numbers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Counted(jnp.ones(2), optax.sgd(0.1)).fit(vn.Stream(batches), len(batches))
    return [str(w.message) for w in caught], [w.filename for w in caught]


def test_a_stream_that_compiles_at_each_step_is_told_of_once():
    (told,), (where,) = counted([1, 2, 3, 4, 5])
    assert "`batch['n']` (from 3 to 4)" in told
    assert "name" not in told
    assert where == __file__


@pytest.mark.parametrize("numbers", [[1] * 5, [1, 2, 3] * 2, [1.0, 2.0, 3.0, 4.0]])
def test_a_stream_with_few_values_is_left_alone(numbers):
    assert counted(numbers) == ([], [])


# Metrics that only some batches have.


class Named(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sum(model**2), {f"loss/e{batch['n']}": jnp.mean(batch["x"])}


def test_a_metric_that_a_later_batch_lacks():
    batches = [{"n": n, "x": X} for n in (0, 0, 1)]
    trainer = Named(jnp.ones(2), optax.sgd(0.1))
    message = r"`record`.*no metric 'loss/e0' at step 2; there are 'loss/e1'"
    with pytest.raises(vn.UnknownPathError, match=message) as caught:
        trainer.fit(vn.Stream(batches), 3, record="loss/e0", chunk=3)
    assert len(caught.value.result.history["loss/e0"]) == 2


# Functions that take other arguments than they are given.

ARITY = {
    "callback": (
        lambda: fitted().fit(BATCH, 2, callback=lambda trainer: None),
        r"`callback`.*called as `callback\(trainer, history\)`",
    ),
    "loss": (
        lambda: vn.fit(lambda model: model.slope, line(), optax.sgd(0.1), BATCH, 2),
        r"`loss`.*called as `loss\(model, batch\)`",
    ),
    "predicate": (
        lambda: vn.split(line(), lambda leaf: True),
        r"`selector`.*called as `predicate\(path, leaf\)`",
    ),
    "rule": (
        lambda: fitted(vn.ParamOptimiser({lambda leaf: True: optax.sgd(0.1)})),
        r"`rules`.*called as `predicate\(path, leaf\)`",
    ),
}


@pytest.mark.parametrize("name", ARITY)
def test_a_function_of_the_wrong_arity_is_named(name):
    act, message = ARITY[name]
    with pytest.raises(TypeError, match=message):
        act()


class Callable:
    def __call__(self, trainer, history):
        return None


FORMS = [lambda *args: None, lambda a, b, c=3, **d: None, Callable()]


@pytest.mark.parametrize("callback", FORMS)
def test_functions_of_other_forms_are_taken(callback):
    assert fitted().fit(BATCH, 1, callback=callback).trainer.step_count == 1


# Ctrl-C.

PRESSED = """
import os, signal, threading, time
import jax.numpy as jnp, numpy as np, optax, vernal as vn

def pressed(times):
    started, over = [], threading.Event()

    def press():
        for _ in range(times):
            if not over.is_set():  # on a busy machine it may be late
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)

    def callback(trainer, history):
        if not started:
            started.append(threading.Thread(target=press, daemon=True))
            started[0].start()

    result = vn.fit(
        lambda m, b: jnp.sum(jnp.sin(m * b) ** 2), jnp.ones(50_000), optax.sgd(1e-9),
        jnp.arange(50_000.0), 10**8, callback=callback,
    )
    over.set()
    started[0].join()
    assert result.stop_reason is vn.StopReason.INTERRUPTED
    assert len(result.history) == int(result.trainer.step_count) > 0
    np.testing.assert_array_equal(result.history.steps, np.arange(len(result.history)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print("kept", flush=True)

pressed(2)  # while what a fit ends with is compiled
pressed(1)
"""


def test_ctrl_c_ends_the_fit_and_not_the_program():
    ended = subprocess.run(
        [sys.executable, "-c", PRESSED], capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.split() == ["kept"] * 2, ended.stderr


def test_a_handler_of_the_users_own_is_left_alone():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        callback = lambda trainer, history: os.kill(os.getpid(), signal.SIGINT)
        result = fitted().fit(BATCH, 1, callback=callback)
        time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN


class Sized(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sum(model**2), {"rows": batch["x"], "count": batch["count"]}


def test_a_metric_that_has_another_shape_for_a_later_batch():
    batches = [{"x": np.zeros(n), "count": np.ones(())} for n in (3, 3, 4)]
    trainer = Sized(jnp.ones(2), optax.sgd(0.1))
    message = r"`record`: 'rows' has the shape \(3,\) up to step 1, and \(4,\)"
    with pytest.raises(ValueError, match=message) as caught:
        trainer.fit(vn.Stream(batches), 3, record="rows")
    assert len(caught.value.result.history.loss) == 2


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_metric_that_is_an_integer_first_is_not_rounded_later(chunk):
    batches = [{"x": X, "count": np.asarray(n)} for n in (1, 0.5)]
    trainer = Sized(jnp.ones(2), optax.sgd(0.1))
    result = trainer.fit(vn.Stream(batches), 2, record="count", chunk=chunk)
    np.testing.assert_array_equal(result.history["count"], [1, 0.5])

"""`fit`: a compiled loop, and what happens around it."""

import functools
import os
import pty
import subprocess
import sys
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import (
    GaussianFit,
    LineFit,
    Pull,
    TwoFit,
    gaussian,
    gaussian_batch,
    line,
    line_batch,
    same,
    script,
    two,
)

BATCH = line_batch()
ADAM = optax.adam(0.1)


# Against a loop by hand.


@pytest.mark.seams
@pytest.mark.as_compiled
def test_a_fit_is_one_scan_by_hand():
    """Within a few units of the last place: the compiler may fuse the two otherwise."""
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))
    batch = gaussian_batch()

    @jax.jit
    def by_hand(params):
        def loss(params):
            x, y, sigma = batch
            return 0.5 * jnp.sum(((params(x) - y) / sigma) ** 2)

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimiser.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), (value, params.mean)

        return jax.lax.scan(step, (params, optimiser.init(params)), length=60)

    (params, _), (values, means) = by_hand(gaussian())
    result = GaussianFit(gaussian(), optimiser).fit(batch, 60, record="mean")
    np.testing.assert_allclose(result.history.loss, values, rtol=1e-9)
    np.testing.assert_allclose(result.history["mean"], means, rtol=1e-10)
    for ours, theirs in zip(
        jax.tree.leaves(result.model), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    assert result.history.loss[-1] < 0.1 * values[0]


@pytest.mark.as_compiled
def test_a_fit_is_its_steps_to_the_bit():
    trainer = LineFit(line(), ADAM)
    stepped, losses = trainer, []
    for _ in range(7):
        stepped, info = stepped.step(BATCH)
        losses.append(info.loss)
    result = trainer.fit(BATCH, 7)
    np.testing.assert_allclose(result.history.loss, losses, rtol=1e-14)
    np.testing.assert_allclose(result.model.slope, stepped.model.slope, rtol=1e-14)


class Everything(LineFit):
    """Draws from its key, so that the keys must agree as well."""

    def loss(self, model, batch, key):
        noise = jax.random.normal(key)
        loss = super().loss(model, batch)
        return loss * (1 + 0.1 * noise), {"noise": noise}


@pytest.mark.seams
@pytest.mark.as_compiled
@pytest.mark.parametrize(
    ("data", "cut"),
    [("whole", 1), ("whole", 16), ("minibatches", 7), ("stream", 1), ("stream", 16)],
)
def test_two_fits_are_one_to_the_bit(data, cut):
    steps = 17
    key = jax.random.key(1)
    optimiser = vn.ParamOptimiser(
        {"slope": ADAM, "offset": vn.window(optax.sgd(0.1, momentum=0.5), 3, 12)}
    )

    def source():
        if data == "whole":
            return BATCH
        if data == "minibatches":
            return vn.Minibatches(BATCH, 3, key=jax.random.key(5))
        return vn.Stream(
            lambda step: ((BATCH[0], BATCH[1] + 0.1 * i) for i in range(step, 99))
        )

    trainer = Everything(line(), optimiser, key=key, nan_policy=vn.SkipStep())
    options = {"record": ("noise", "slope", "grad_norm")}
    whole = trainer.fit(source(), steps, **options)
    first = trainer.fit(source(), cut, **options)
    second = first.trainer.fit(source(), steps - cut, **options)
    assert same(second.trainer, whole.trainer)
    joined = first.history + second.history
    np.testing.assert_array_equal(joined.steps, whole.history.steps)
    np.testing.assert_array_equal(joined.loss, whole.history.loss)
    for name in options["record"]:
        np.testing.assert_array_equal(joined[name], whole.history[name])
    assert len(set(whole.history["noise"])) == steps


@pytest.mark.as_compiled
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_nothing(chunk):
    trainer = LineFit(line(), ADAM)
    one, other = trainer.fit(BATCH, 11), trainer.fit(BATCH, 11, chunk=chunk)
    assert same(one.trainer, other.trainer)
    np.testing.assert_array_equal(one.history.loss, other.history.loss)


@pytest.mark.as_compiled
def test_twice_the_same():
    trainer = LineFit(line(), ADAM)
    assert same(trainer.fit(BATCH, 10).trainer, trainer.fit(BATCH, 10).trainer)


def test_no_steps():
    trainer = LineFit(line(), ADAM)
    result = trainer.fit(BATCH, 0, record=("slope", "grad_norm"))
    assert same(result.trainer, trainer)
    assert len(result.history) == 0
    assert result.history["slope"].shape == (0,)
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN


def test_a_result():
    result = LineFit(line(), optax.sgd(0.1)).fit(BATCH, 20)
    assert same(result.model, result.trainer.model)
    assert same(result.best, result.trainer.best)
    assert str(result.stop_reason) == "All steps were taken."
    assert "steps=20" in repr(result)
    assert "All steps were taken." in repr(result)
    assert "non_finite" not in repr(result)
    assert repr(result.trainer).startswith("LineFit(")
    assert np.min(result.history.loss) == result.trainer.best_loss


def test_a_result_tells_of_steps_that_were_skipped():
    trainer = LineFit(line(), ADAM, nan_policy=vn.SkipStep())
    bad = jax.tree.map(lambda x: x * jnp.nan, BATCH)
    assert "non_finite=3, " in repr(trainer.fit(bad, 3))


def test_the_best_outlives_what_follows():
    """A rate that diverges: the best is at the start, and stays over another fit."""
    result = LineFit(line(), optax.sgd(1.5)).fit(BATCH, 8)
    assert result.trainer.best_loss == result.history.loss[0]
    assert same(result.best, line())
    later = result.trainer.fit(BATCH, 3)
    assert same(later.best, line())
    assert later.trainer.best_loss == result.history.loss[0]
    better = result.trainer.replace(model=line(2.0, 1.0)).fit(BATCH, 1)
    assert better.trainer.best_loss == 0
    assert better.best.slope == 2


def test_the_one_liner():
    result = vn.fit(
        lambda model, batch: jnp.mean((model(batch[0]) - batch[1]) ** 2),
        line(),
        vn.ParamOptimiser({"slope": ADAM, "offset": None}),
        BATCH,
        9,
        record="slope",
        progress=False,
        nan_policy=vn.SkipStep(),
    )
    rules = vn.ParamOptimiser({"slope": ADAM, "offset": None})
    expected = LineFit(line(), rules).fit(BATCH, 9)
    np.testing.assert_allclose(result.history.loss, expected.history.loss, rtol=1e-14)
    assert isinstance(result.trainer.nan_policy, vn.SkipStep)


def test_the_one_liner_with_key_and_metrics():
    def loss(model, batch, key):
        return jnp.sum(model**2), {"draw": jax.random.uniform(key)}

    key = jax.random.key(2)
    result = vn.fit(
        loss, jnp.ones(2), ADAM, None, 3, key=key, record="draw", progress=False
    )
    draws = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(3)]
    np.testing.assert_array_equal(result.history["draw"], draws)


# The callback.


def test_a_callback_sees_every_chunk():
    seen = []

    def callback(trainer, history):
        seen.append((int(trainer.step_count), len(history), float(history.loss[-1])))

    result = LineFit(line(), ADAM).fit(BATCH, 10, chunk=4, callback=callback)
    assert [s[:2] for s in seen] == [(4, 4), (8, 8), (10, 10)]
    assert [s[2] for s in seen] == [result.history.loss[i] for i in (3, 7, 9)]


@pytest.mark.parametrize(
    "stop", [True, np.bool_(True), jnp.asarray(True)], ids=["bool", "numpy", "jax"]
)
def test_a_callback_ends_the_fit(stop):
    callback = lambda trainer, history: stop if trainer.step_count >= 6 else None
    result = LineFit(line(), ADAM).fit(BATCH, 100, chunk=3, callback=callback)
    assert int(result.trainer.step_count) == 6
    assert result.stop_reason is vn.StopReason.CALLBACK
    assert str(result.stop_reason) == "The callback ended the fit."


def test_a_callback_that_returns_false_goes_on():
    callback = lambda trainer, history: np.bool_(False)
    assert (
        len(LineFit(line(), ADAM).fit(BATCH, 4, chunk=2, callback=callback).history)
        == 4
    )


def test_a_callback_changes_the_trainer():
    def callback(trainer, history):
        if trainer.step_count == 4:
            return trainer.replace(optimiser=optax.adam(0.0))
        return None

    result = LineFit(line(), ADAM).fit(
        BATCH, 10, chunk=2, callback=callback, record="slope"
    )
    slopes = result.history["slope"]
    assert np.all(np.diff(slopes[:5]) != 0)
    assert np.all(np.diff(slopes[4:]) == 0)
    assert int(result.trainer.step_count) == 10


RETURNED = {
    "itself": lambda trainer, history: trainer,
    "made again": lambda trainer, history: jax.tree.map(lambda leaf: leaf, trainer),
    "copied": lambda trainer, history: jax.tree.map(jnp.copy, trainer),
}


@pytest.mark.parametrize(
    ("is_many", "options"),
    [
        (False, {"stop": vn.Converged(1e-4, 10)}),
        (False, {"stop": vn.Patience(5), "validation": (BATCH, 3)}),
        (True, {"stop": vn.Patience(5), "validation": (BATCH, 3)}),
    ],
)
def test_a_criterion_goes_on_if_a_callback_changes_no_parameter(is_many, options):
    trainer, options = LineFit(line(), optax.sgd(0.3)), options | {"chunk": 4}
    fit = lambda callback: (
        vn.fit_many([trainer] * 2, BATCH, 2_000, callback=callback, **options)
        if is_many
        else trainer.fit(BATCH, 2_000, callback=callback, **options)
    )
    plain = fit(None)
    assert plain.history.steps[-1] < 1_999
    for name, callback in RETURNED.items():
        steps = fit(callback).history.steps
        np.testing.assert_array_equal(steps, plain.history.steps, err_msg=name)


@pytest.mark.parametrize("has_mesh", [False, True])
@pytest.mark.parametrize("is_many", [False, True])
def test_what_a_callback_changes_may_lie_on_another_device(has_mesh, is_many):
    device = jax.devices()[1]
    moved = lambda trainer, history: jax.device_put(trainer, device)
    mesh = jax.make_mesh((2,), ("data",)) if has_mesh else None
    trainer, batch = LineFit(line(), optax.sgd(0.3)), line_batch()
    options = {"mesh": mesh, "chunk": 2, "stop": vn.Converged(1e-9, 99)}
    if is_many:
        fit = lambda **more: vn.fit_many([trainer] * 2, batch, 6, **options, **more)
    else:
        fit = lambda **more: trainer.fit(batch, 6, **options, **more)
    plain, seen = fit(), fit(callback=moved)
    np.testing.assert_allclose(seen.history.loss, plain.history.loss, rtol=1e-12)


@pytest.mark.parametrize("value", [0.5, 1, np.float64(0.5), jnp.float16(0.5)])
@pytest.mark.parametrize("stop", [None, vn.Converged(1e-9, 99)])
def test_what_a_callback_changes_keeps_its_dtype(value, stop):
    def moved(trainer, history):
        return eqx.tree_at(lambda t: t.params.slope, trainer, value)

    trainer, batch = LineFit(line(), optax.adam(0.1)), line_batch()
    result = trainer.fit(batch, 4, callback=moved, chunk=2, stop=stop)
    assert result.model.slope.dtype == trainer.model.slope.dtype
    assert not result.model.slope.weak_type
    assert float(result.model.slope) == float(value)


class Weighted(LineFit):
    weight: Any

    def __init__(self, *args, weight):
        super().__init__(*args)
        self.weight = weight

    def loss(self, model, batch):
        return self.weight * super().loss(model, batch)


def test_a_criterion_begins_anew_if_a_callback_changes_the_loss():
    """The loss rises to a hundred times what it was, and falls from there."""
    trainer = Weighted(line(), optax.sgd(1e-3), weight=jnp.asarray(1.0))

    def heavier(trainer, history):
        if trainer.step_count == 20:
            return eqx.tree_at(lambda t: t.weight, trainer, jnp.asarray(100.0))

    options = {"stop": vn.Converged(1e-3, 30), "chunk": 20}
    result = trainer.fit(line_batch(), 60, callback=heavier, **options)
    first = trainer.fit(line_batch(), 20).trainer
    other = eqx.tree_at(lambda t: t.weight, first, jnp.asarray(100.0))
    alone = other.fit(line_batch(), 40, stop=options["stop"])
    assert result.stop_reason is alone.stop_reason
    assert same(result.trainer.params, alone.trainer.params)


def test_a_callback_that_goes_back_to_an_older_trainer():
    """The steps of the fit are counted on; those of the trainer are its own."""
    older = []

    def callback(trainer, history):
        older.append(trainer)
        return older[0] if len(older) == 2 else None

    result = LineFit(line(), ADAM).fit(BATCH, 6, chunk=2, callback=callback)
    assert int(result.trainer.step_count) == 4
    np.testing.assert_array_equal(result.history.steps, [0, 1, 2, 3, 2, 3])
    np.testing.assert_array_equal(result.history.loss[2:4], result.history.loss[4:])


def clipped(trainer, history):
    model = jax.tree.map(lambda x: jnp.clip(x, -1.5, 1.5), trainer.model)
    return trainer.replace(model=model)


@pytest.mark.parametrize("is_on_another_device", [False, True])
def test_a_model_from_a_callback_does_not_begin_the_best_anew(is_on_another_device):
    def callback(trainer, history):
        answer = clipped(trainer, history)
        return (
            jax.device_put(answer, jax.devices()[1]) if is_on_another_device else answer
        )

    trainers = [LineFit(line(slope), optax.adam(0.1)) for slope in (50.0, 1.0, 20.0)]
    batch, options = line_batch(), {"chunk": 20, "callback": callback}
    result = trainers[1].fit(batch, 60, **options)
    assert result.best_loss == result.history.loss.min()
    np.testing.assert_allclose(LineFit.loss(None, result.best, batch), result.best_loss)
    many = vn.fit_many(trainers, batch, 60, **options)
    np.testing.assert_array_equal(many.best_losses, many.history.loss.min(axis=0))
    assert same(many.trainer(1).best, many.best) == (many.best_index == 1)


RESTARTS = {
    "of the trainer": lambda trainer, model: trainer.model,
    "of NumPy": lambda trainer, model: jax.tree.map(np.asarray, trainer.model),
    "from before": lambda trainer, model: model,
}


@pytest.mark.parametrize("restart", RESTARTS)
@pytest.mark.parametrize("is_many", [False, True])
def test_nor_does_one_on_a_mesh(restart, is_many):
    trainer, batch = LineFit(line(), optax.adam(0.1)), line_batch()
    kept = line(jnp.zeros(4), jnp.zeros(4)) if is_many else line(0.0, 0.0)
    back = lambda t, _: t.replace(model=RESTARTS[restart](t, kept))
    options = {"mesh": jax.make_mesh((4,), ("data",)), "chunk": 3, "callback": back}
    if is_many:
        result = vn.fit_many([trainer] * 4, batch, 6, **options)
        best_losses = result.best_losses
    else:
        result = trainer.fit(batch, 6, **options)
        best_losses = result.best_loss
    np.testing.assert_array_equal(best_losses, result.history.loss.min(axis=0))


def test_what_is_not_trained_does():
    model = {"line": line(), "shift": jnp.asarray(0.0)}

    class Shifted(vn.Trainer):
        def loss(self, model, batch):
            x, y = batch
            return jnp.mean((model["line"](x) + model["shift"] - y) ** 2)

    def callback(trainer, history):
        if trainer.step_count == 20:
            return trainer.replace(model={**trainer.model, "shift": jnp.asarray(9.0)})

    trainer = Shifted(model, optax.sgd(1e-3), train="line")
    result = trainer.fit(line_batch(), 40, chunk=20, callback=callback)
    assert result.best_loss == result.history.loss[20:].min()
    assert result.history.loss[:20].max() < result.best_loss


def test_a_callback_is_called_every_chunk_however_large_a_row():
    counts = []
    trainer = Pull(jnp.ones((1000, 700)), optax.sgd(0.1))
    result = trainer.fit(
        jnp.asarray(0.0),
        12,
        chunk=6,
        record="",
        callback=lambda t, h: counts.append(int(t.step_count)),
    )
    assert counts == [6, 12]
    np.testing.assert_allclose(
        result.history[""][:, 0, 0], 0.8 ** np.arange(12), rtol=1e-12
    )


def test_more_rows_than_a_buffer_holds():
    counts = []
    result = LineFit(line(), optax.sgd(0.01)).fit(
        BATCH, 40_000, chunk=20_000, callback=lambda t, h: counts.append(len(h))
    )
    assert counts == [20_000, 40_000]
    np.testing.assert_array_equal(result.history.steps, np.arange(40_000))
    assert np.all(np.diff(result.history.loss[:1000]) < 0)


# Ending early.


def test_a_stop_inside_a_chunk_really_stops_the_work():
    evaluations = []

    class Counted(TwoFit):
        def loss(self, model, batch):
            jax.debug.callback(lambda _: evaluations.append(1), self.step_count)
            batch = jax.tree.map(lambda x: x[self.step_count % 8], batch)
            return super().loss(model, batch)

    result = Counted(two(), optax.sgd(0.1)).fit(script("...a"), 10_000, chunk=10_000)
    jax.effects_barrier()
    assert int(result.trainer.step_count) == 4
    assert len(result.history) == 4
    assert len(evaluations) == 4
    assert result.stop_reason is vn.StopReason.NON_FINITE


def test_an_interrupt_in_a_callback():
    def callback(trainer, history):
        if trainer.step_count >= 6:
            raise KeyboardInterrupt

    result = LineFit(line(), ADAM).fit(BATCH, 100, chunk=3, callback=callback)
    assert result.stop_reason is vn.StopReason.INTERRUPTED
    assert int(result.trainer.step_count) == len(result.history) == 6
    whole = LineFit(line(), ADAM).fit(BATCH, 9)
    assert same(result.trainer.fit(BATCH, 3).trainer, whole.trainer)


def test_an_interrupt_in_a_stream_keeps_the_steps_before():
    def batches():
        for _ in range(5):
            yield BATCH
        raise KeyboardInterrupt

    result = LineFit(line(), ADAM).fit(vn.Stream(batches()), 100, chunk=50)
    assert result.stop_reason is vn.StopReason.INTERRUPTED
    assert int(result.trainer.step_count) == len(result.history) == 5


def test_an_error_in_a_callback_is_the_users():
    def callback(trainer, history):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        LineFit(line(), ADAM).fit(BATCH, 10, callback=callback)


# The progress bar.

BARRED = """
import sys, termios, warnings
import jax.numpy as jnp, optax, vernal as vn
warnings.simplefilter("ignore")
loss = lambda m, b: jnp.sum((m - b) ** 2)
policy = vn.SkipStep()
for data, columns in (1.0, 80), (float("nan"), 80), (float("nan"), 0):
    termios.tcsetwinsize(sys.stderr, (24, columns))
    vn.fit(loss, jnp.ones(2), optax.sgd(0.1), data, 30, nan_policy=policy)
    print("over", file=sys.stderr)
"""


@functools.cache
def bars():
    """Runs `BARRED` with a terminal for its standard error: its output, its errors."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", BARRED],
        stdout=subprocess.PIPE,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    output = process.communicate(timeout=60)[0].decode()
    return output, shown.decode().split("over")[:-1]


@pytest.mark.seams
def test_a_bar_that_says_that_it_compiles():
    output, shown = bars()
    assert output == ""
    assert len(shown) == 3
    for bar in shown:
        first, *_, last = bar.strip().split("\r")
        assert first.startswith("compiling")
        assert "compiling" not in last
        assert "30/30" in last
        assert "loss=" in last
        assert "best=" in last
        assert "Traceback" not in bar


def test_what_compiling_took_is_no_rate():
    """Of one slow step out of 30 nothing is told of the time that is left."""
    first = next(bar for bar in bars()[1][0].split("\r") if " 1/30 " in bar)
    assert "<?, ?it/s, loss=0," in first


def test_a_narrow_terminal_has_room_for_all_of_it():
    """Also one that does not know how wide it is."""
    for shown in bars()[1][1:]:
        last = shown.rstrip().split("\r")[-1]
        assert "non-finite=30, loss=nan, best=inf]" in last
        assert len(last) <= 80


def test_silence_without_a_terminal(capfd):
    LineFit(line(), ADAM).fit(BATCH, 5)
    out, err = capfd.readouterr()
    assert out == err == ""


def test_no_bar_where_none_is_wanted(capfd, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    LineFit(line(), ADAM).fit(BATCH, 5, progress=False)
    out, err = capfd.readouterr()
    assert out == err == ""


# What is left alone.


def test_trainer_and_data_are_the_callers():
    trainer = LineFit(line(), ADAM)
    before = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, trainer)
    data = vn.Minibatches(BATCH, 4, key=jax.random.key(0))
    result = trainer.fit(data, 5)
    result.trainer.fit(data, 5)
    assert same(trainer, before)
    assert not any(x.is_deleted() for x in jax.tree.leaves((trainer, result.trainer)))
    assert same(trainer.fit(data, 5).trainer, result.trainer)


class Shell:
    """What IPython tells of itself in a notebook."""

    kernel, config = object(), {}


@pytest.mark.parametrize(
    ("shell", "is_shown"), [(Shell(), True), (object(), False), (None, False)]
)
def test_a_bar_in_a_notebook(shell, is_shown, monkeypatch, capfd):
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    LineFit(line(), ADAM).fit(BATCH, 10, progress=True)
    assert ("10/10" in capfd.readouterr().err) is is_shown


def test_where_there_is_no_console(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert len(LineFit(line(), ADAM).fit(BATCH, 10, progress=True).history) == 10


def test_a_boolean_is_no_number():
    """To Python they are equal, and might share a program."""

    class Choosy(vn.Trainer):
        def loss(self, model, batch):
            return (model - (1.0 if batch is True else 2.0)) ** 2

    trainer = Choosy(jnp.asarray(0.0), optax.sgd(0.1))
    for given, loss in ((1, 4.0), (True, 1.0), (1, 4.0)):
        assert trainer.fit(given, 1).history.loss[0] == loss
        assert float(trainer.step(given)[1].loss) == loss
        scores = trainer.fit(given, 1, validation=(given, 1)).history.validation
        np.testing.assert_allclose(scores, (np.sqrt(loss) * 0.8) ** 2)


def test_a_stream_keeps_no_parameters_of_the_steps_behind_it():
    class Broad(vn.Trainer):
        def loss(self, model, batch):
            return jnp.sum((model - batch) ** 2)

    sizes = []

    def batches():
        for step in range(60):
            live = [x.nbytes for x in jax.live_arrays() if x.nbytes > 10_000]
            sizes.append(sum(live))
            yield jnp.asarray(float(step))

    trainer = Broad(jnp.zeros(5_000), optax.adam(0.1))
    trainer.fit(vn.Stream(batches()), 60, chunk=60)
    # The first chunk has one step, and is compiled by it.
    assert sizes[-1] <= sizes[5] + 5 * 5_000 * 8


def test_a_fit_is_no_part_of_a_program():
    trainer = LineFit(line(), ADAM)
    with pytest.raises(TypeError, match=r"`fit` runs .*use `vn.unroll`"):
        jax.jit(lambda t: t.fit(BATCH, 10).trainer.model)(trainer)


def test_more_steps_than_can_be_counted():
    trainer = LineFit(line(), ADAM)
    last = jnp.asarray(2**31 - 1 - 300, jnp.int32)
    late = eqx.tree_at(lambda t: t._progress.step_count, trainer, last)
    assert len(late.fit(BATCH, 300, every=7).history) == 43
    with pytest.raises(ValueError, match=r"`steps` is 301.*counts to"):
        late.fit(BATCH, 301)


@pytest.mark.own_words
def test_a_number_is_a_batch_as_well():
    class Level(vn.Trainer):
        def residuals(self, model, batch):
            return model - batch

    found = Level(jnp.ones(2), ADAM).fit(3, np.int64(5))
    assert found.trainer.step_count == 5


def test_an_error_keeps_a_result_of_its_own():
    inner = LineFit(line(jnp.nan), ADAM, nan_policy=vn.RaiseOnNan())

    def callback(trainer, history):
        inner.fit(BATCH, 10)

    with pytest.raises(vn.NonFiniteError) as caught:
        LineFit(line(), ADAM).fit(BATCH, 10, callback=callback)
    assert np.isnan(caught.value.result.trainer.model.slope)

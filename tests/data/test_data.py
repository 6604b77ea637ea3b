"""Where the batches come from."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import LineFit, line, line_batch, same


class Seen(vn.Trainer):
    """Tells which examples it was given: they are their own numbers."""

    def loss(self, model, batch):
        return model * 0.0, {"seen": batch["id"], "pair": batch["x"][:, 0]}


N, SIZE = 11, 3


def examples():
    return {"id": jnp.arange(N), "x": np.arange(2.0 * N).reshape(N, 2)}


def seen(steps, start=0, key=0):
    data = vn.Minibatches(examples(), SIZE, key=jax.random.key(key))
    trainer = Seen(jnp.asarray(1.0), optax.sgd(0.1))
    options = {"record": ("seen", "pair")}
    if start:
        trainer = trainer.fit(data, start, **options).trainer
    result = trainer.fit(data, steps, **options)
    np.testing.assert_array_equal(result.history["pair"], 2 * result.history["seen"])
    return result.history["seen"]


def test_each_example_once_an_epoch():
    per_epoch = N // SIZE
    assert vn.Minibatches(examples(), SIZE, key=jax.random.key(0)).steps_per_epoch == 3
    order = seen(20 * per_epoch).reshape(20, per_epoch * SIZE)
    assert all(len(set(epoch)) == per_epoch * SIZE for epoch in order)
    # The tail that is dropped is another one each time.
    dropped = {frozenset(range(N)) - frozenset(epoch.tolist()) for epoch in order}
    assert len(dropped) > 5
    assert len({tuple(epoch) for epoch in order}) == 20
    assert set(order.ravel()) == set(range(N))


def test_the_order_depends_on_key_and_step_alone():
    whole = seen(14)
    np.testing.assert_array_equal(whole, seen(14))
    for start in (1, 3):
        np.testing.assert_array_equal(whole[start:], seen(14 - start, start))
    assert not np.array_equal(whole, seen(14, key=1))


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("size", [1, N - 1, N])
def test_sizes_at_the_edge_and_keys_of_either_style(size, key):
    data = vn.Minibatches(examples(), size, key=key(0))
    assert data.steps_per_epoch == N // size
    take = jax.jit(lambda cursor, step: data.next(cursor, step))
    cursor, seen = data.start(jnp.asarray(0)), []
    for step in range(2 * data.steps_per_epoch):
        batch, cursor = take(cursor, jnp.asarray(step))
        seen.append(batch["id"])
    first, second = np.reshape(seen, (2, -1))
    assert len({*first.tolist()}) == len({*second.tolist()}) == size * (N // size)
    assert not np.array_equal(first, second)


# Streams.

BATCH = line_batch()


def batches(shift=0):
    for i in itertools.count(shift):
        yield BATCH[0], BATCH[1] + 0.1 * i


def trainer():
    return LineFit(line(), optax.adam(0.1))


def expected(steps, shift=0):
    t = trainer()
    for batch in itertools.islice(batches(shift), steps):
        t, _ = t.step(batch)
    return t


SOURCES = {
    "list": lambda: list(itertools.islice(batches(), 9)),
    "generator": batches,
    "factory": lambda: batches,
    "loader": lambda: type("Loader", (), {"__iter__": lambda self: batches()})(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_one_batch_a_step(source):
    stream = vn.Stream(SOURCES[source]())
    result = trainer().fit(stream, 9)
    reference = expected(9)
    np.testing.assert_allclose(result.model.slope, reference.model.slope, rtol=1e-13)
    assert len(result.history) == 9
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", [{}, {"chunk": 2}])
def test_a_stream_goes_on_where_the_last_fit_left_it(source, options):
    stream = vn.Stream(SOURCES[source]())
    first = trainer().fit(stream, 4, **options)
    second = first.trainer.fit(stream, 5, **options)
    whole = trainer().fit(vn.Stream(batches()), 9)
    assert same(second.trainer, whole.trainer)


def test_a_factory_is_given_the_step():
    asked = []

    def factory(step):
        asked.append(step)
        return batches(step)

    stream = vn.Stream(factory)
    result = trainer().fit(stream, 3)
    result.trainer.fit(stream, 2)
    assert asked == [0, 3]


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
@pytest.mark.parametrize("record", [(), "grad_norm"])
def test_a_stream_that_runs_dry_keeps_what_there_is(chunk, record):
    stream = vn.Stream(list(itertools.islice(batches(), 7)))
    with pytest.raises(vn.StreamExhaustedError, match="after 7 of 10 steps") as caught:
        trainer().fit(stream, 10, chunk=chunk, record=record)
    result = caught.value.result
    assert len(result.history) == int(result.trainer.step_count) == 7
    assert result.stop_reason is not vn.StopReason.STEPS_TAKEN
    np.testing.assert_allclose(result.model.slope, expected(7).model.slope, rtol=1e-13)


class Told(LineFit):
    def loss(self, model, batch):
        return super().loss(model, batch), {"last": batch[1][-1]}


def test_looking_at_a_batch_does_not_use_it_up():
    """The metrics are known only once there is a batch."""
    t = Told(line(), optax.adam(0.1))
    stream = vn.Stream(list(itertools.islice(batches(), 5)))
    first = t.fit(stream, 2, record="last")
    second = first.trainer.fit(stream, 3, record="last")
    told = (first.history + second.history)["last"]
    np.testing.assert_allclose(told, 3 + 0.1 * np.arange(5), rtol=1e-12)


def test_a_batch_of_which_no_step_was_taken_is_there_for_the_next_fit():
    t = Told(line(), optax.adam(0.1))
    stream = vn.Stream(list(itertools.islice(batches(), 3)))
    with pytest.raises(vn.UnknownPathError, match="lost"):
        t.fit(stream, 3, record="lost")
    t.fit(stream, 0, record="last")
    with pytest.raises(ValueError, match="evenly"):
        t.fit(stream, 3, mesh=jax.make_mesh((7,), ("data",)))
    history = t.fit(pickle.loads(pickle.dumps(stream)), 3, record="last").history
    np.testing.assert_allclose(history["last"], 3 + 0.1 * np.arange(3), rtol=1e-12)


def test_a_stream_that_an_earlier_version_pickled():
    stream = vn.Stream(list(itertools.islice(batches(), 3)))
    state = stream.__getstate__()
    del state["unused"]
    older = vn.Stream.__new__(vn.Stream)
    older.__setstate__(state)
    assert len(trainer().fit(older, 3).history) == 3


class AtStep(vn.StopCriterion):
    def init(self, params):
        return None

    def apply(self, view, state):
        return view.step_count >= 5, state


@pytest.mark.parametrize("chunk", [None, 1, 5, 100])
@pytest.mark.parametrize("is_bad", [False, True])
def test_the_last_batch_may_be_the_one_at_which_a_fit_ends(chunk, is_bad):
    seen = list(itertools.islice(batches(), 5))
    if is_bad:
        seen[-1] = jax.tree.map(lambda x: x * np.nan, seen[-1])
    t, options = LineFit(line(), optax.adam(0.1)), {"chunk": chunk}
    if is_bad:
        with pytest.warns(UserWarning, match="At step 4"):
            result = t.fit(vn.Stream(seen), 9, **options)
        assert result.stop_reason is vn.StopReason.NON_FINITE
        raising = t.replace(nan_policy=vn.RaiseOnNan())
        with pytest.raises(vn.NonFiniteError, match="step 4"):
            raising.fit(vn.Stream(seen), 9, **options)
    else:
        result = t.fit(vn.Stream(seen), 9, stop=AtStep(), **options)
        assert result.stop_reason is vn.StopReason.CRITERION


def test_an_empty_stream_with_a_metric():
    t = Told(line(), optax.adam(0.1))
    with pytest.raises(vn.StreamExhaustedError, match="after 0 of 5 steps") as caught:
        t.fit(vn.Stream([]), 5, record="last")
    assert same(caught.value.result.trainer, t)
    assert len(caught.value.result.history) == 0


def test_no_steps_of_a_stream_with_a_metric():
    t = Told(line(), optax.adam(0.1))
    result = t.fit(vn.Stream([BATCH]), 0, record="last")
    assert len(result.history) == 0


def test_a_stop_leaves_the_rest_of_a_stream_unread():
    read = []

    def bad_at_three():
        for i in range(1000):
            read.append(i)
            yield BATCH[0], BATCH[1] * (jnp.nan if i == 3 else 1.0)

    result = trainer().fit(vn.Stream(bad_at_three()), 1000, chunk=900)
    assert int(result.trainer.step_count) == 4
    # One ahead of the step, and what a step in flight hides.
    assert len(read) <= 40


def test_each_shape_of_a_stream_compiles_once():
    traces = []

    class Counted(LineFit):
        def loss(self, model, batch):
            traces.append(batch[0].shape)
            return super().loss(model, batch)

    def ragged():
        for i in range(12):
            x, y = BATCH
            yield (x, y) if i % 3 else (x[:5], y[:5])

    Counted(line(), optax.sgd(0.1)).fit(vn.Stream(ragged()), 12)
    per_shape = traces.count((16,))
    assert traces.count((5,)) == per_shape <= 2
    assert len(traces) == 2 * per_shape


def test_rows_of_a_stream_cost_no_buffer_each():
    """Thousands of steps of a stream hold thousands of rows, and no more."""
    t = Told(line(), optax.sgd(1e-3))
    arrays = []

    def watched():
        for i in range(600):
            if i == 599:
                arrays.append(sum(x.nbytes for x in jax.live_arrays()))
            yield BATCH

    before = sum(x.nbytes for x in jax.live_arrays())
    t.fit(vn.Stream(watched()), 600, chunk=600)
    assert arrays[0] - before < 2e6


# One batch.


@pytest.mark.parametrize("batch", [2.0, np.float64(2), jnp.asarray(2.0)], ids=repr)
def test_numbers_are_batches(batch):
    loss = lambda model, batch: (model - batch) ** 2
    result = vn.fit(loss, jnp.asarray(0.0), optax.sgd(0.25), batch, 2)
    np.testing.assert_allclose(result.model, 1.5)


def test_none_is_a_batch():
    loss = lambda model, batch: model**2 if batch is None else jnp.nan
    result = vn.fit(loss, jnp.asarray(1.0), optax.sgd(0.25), None, 1)
    assert result.model == 0.5


def test_the_data_may_change_during_the_fit_and_after():
    x, y = (np.array(v) for v in BATCH)
    result = trainer().fit((x, y), 6, chunk=2, callback=lambda t, h: y.fill(0.0))
    reference = trainer().fit(BATCH, 6)
    assert same(result.trainer, reference.trainer)


@pytest.mark.parametrize("batch", [(np.ones(3), jnp.ones(3)), {"x": np.ones(3)}])
def test_a_function_of_the_step_that_returns_one_batch(batch):
    trainer = LineFit(line(), optax.adam(0.1))
    with pytest.raises(TypeError, match="iterable of all batches from that step on"):
        trainer.fit(vn.Stream(lambda step: batch), 3)


class Wide(vn.Trainer):
    """Its steps take longer than it takes to fill a batch."""

    def loss(self, model, batch):
        hidden = jnp.tanh(batch @ model["in"])
        return jnp.mean(jnp.square(hidden @ model["out"] - 1))


def wide():
    weights = np.random.default_rng(1).normal(size=(64, 256)) / 8
    model = {"in": jnp.asarray(weights), "out": jnp.zeros(256)}
    return Wide(model, vn.ParamOptimiser({"**": optax.sgd(1e-2)}))


def by_fit(batches):
    return wide().fit(vn.Stream(batches), 6).history.loss


def by_step(batches):
    trainer, losses = wide(), []
    for batch in batches:
        trainer, info = trainer.step(batch)
        losses.append(info.loss)
    return np.asarray(losses)


@pytest.mark.parametrize("run", [by_fit, by_step])
def test_a_loader_may_fill_one_array_again_and_again(run):
    """Also while the step before is still computing."""
    rows = 2048

    def batches(is_shared):
        rng, shared = np.random.default_rng(0), np.empty((rows, 64))
        for _ in range(6):
            batch = shared if is_shared else np.empty_like(shared)
            batch[:] = rng.normal(size=batch.shape)
            yield batch
            # What it holds after the step was asked for is of no matter.
            shared[:] = np.nan

    np.testing.assert_array_equal(run(batches(True)), run(batches(False)))


def test_what_is_copied_was_there_when_it_was_given():
    """The device is busy, and would copy later."""
    busy = jax.jit(lambda x: jnp.linalg.matrix_power(x, 20))
    array = np.ones(1_000_000)
    model = {"a": jnp.ones(2), "table": np.ones(1_000_000)}
    running = busy(jnp.eye(700))
    trainer = Plain(model, vn.ParamOptimiser({"a": optax.sgd(0.1)}))
    held = vn.Minibatches(array, 10, key=jax.random.key(0))
    array[:], model["table"][:] = 9, 9
    np.testing.assert_array_equal(held.arrays, 1)
    np.testing.assert_array_equal(trainer.model["table"], 1)
    jax.block_until_ready(running)


class Plain(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sum(model["a"] ** 2)


class Exported:
    """An array of another library, which gives its memory and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_another_library(make, dtype):
    if make is np.asarray and dtype == "bfloat16":
        pytest.skip("NumPy does not export it")
    array = make([1.0, 2.0]).astype(dtype)
    held = vn.Minibatches(Exported(array), 1, key=jax.random.key(0)).arrays
    assert held.dtype == dtype
    np.testing.assert_array_equal(np.asarray(held, float), [1, 2])

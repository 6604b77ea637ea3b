"""What a fit promises: one compilation, nothing printed, nothing lost."""

import copy
import itertools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import Line, LineFit, line, line_batch, same

# A schedule of Optax.
pytestmark = pytest.mark.loose_dtypes


class Count:
    """Counts how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, model, batch):
        self.traces += 1
        x, y = batch
        return jnp.mean((model(x) - y) ** 2)


@pytest.fixture
def counted():
    """A trainer's class of its own, so that nothing is compiled for it yet."""
    count = Count()

    class Counted(vn.Trainer):
        def loss(self, model, batch):
            return count(model, batch)

    return Counted, count


def make(cls, rate=0.1, start=0.5, scale=None):
    """All anew: rules, predicates, masks, schedules, policy."""
    optimiser = vn.ParamOptimiser(
        {
            "slope": optax.adamw(rate, mask=lambda params: dict.fromkeys(params, True)),
            lambda path, leaf: path == "offset": optax.chain(
                optax.clip_by_global_norm(1.0),
                optax.sgd(optax.cosine_decay_schedule(rate, 100), momentum=0.5),
            ),
        },
        first=optax.clip(10.0),
    )
    if scale is not None:
        optimiser = optimiser.with_scale({"slope": scale})
    return cls(line(start), optimiser, nan_policy=vn.SkipStep() | vn.StopAfter(3))


@pytest.mark.seams
def test_one_compilation_for_a_fit_whatever_its_length(counted):
    cls, count = counted
    make(cls).fit(line_batch(), 1)
    first = count.traces
    assert first <= 2
    for steps in (2, 7, 3000):
        make(cls).fit(line_batch(), steps)
    make(cls).fit(line_batch(), 9, chunk=2)
    make(cls).fit(line_batch(), 9, every=3)
    make(cls).fit(line_batch(), 9, callback=lambda t, h: None)
    assert count.traces == first


def test_nothing_is_compiled_for_more_of_the_same(counted):
    cls, count = counted
    result = make(cls).fit(line_batch(), 3)
    first = count.traces
    x, y = line_batch()
    result.trainer.fit(line_batch(), 3)
    make(cls).fit(line_batch(), 3)
    make(cls, rate=0.01).fit(line_batch(), 3)
    make(cls, start=3.0).fit(line_batch(), 3)
    make(cls, scale=0.5).fit(line_batch(), 3)
    make(cls).fit((x + 1, y - 1), 3)
    make(cls).fit((np.asarray(x), np.asarray(y)), 3)
    result.trainer.replace(model=line(2.0, 3.0)).fit(line_batch(), 3)
    result.trainer.replace(optimiser=make(cls, rate=0.5).optimiser).fit(line_batch(), 3)
    result.trainer.fit(
        line_batch(), 3, callback=lambda t, h: t.replace(model=line()), chunk=1
    )
    assert count.traces == first


def test_something_is_compiled_for_what_differs(counted):
    """The other way round: a compilation is never wrongly shared."""
    cls, count = counted
    make(cls).fit(line_batch(), 3)
    seen = [count.traces]
    cls(line(), optax.adam(0.1, b1=0.5)).fit(line_batch(), 3)
    seen.append(count.traces)
    cls(line(), optax.adam(0.1, b1=0.6)).fit(line_batch(), 3)
    seen.append(count.traces)
    make(cls).fit(line_batch(5), 3)
    seen.append(count.traces)
    assert all(a < b for a, b in itertools.pairwise(seen))


@pytest.mark.seams
def test_steps_compile_once(counted):
    cls, count = counted
    trainer = make(cls)
    for _ in range(4):
        trainer, _ = trainer.step(line_batch())
    first = count.traces
    for rate in (0.1, 0.2):
        make(cls, rate=rate, scale=2.0).step(line_batch())
    assert count.traces == first
    assert first <= 3


@pytest.mark.seams
def test_the_one_liner_with_a_lambda_built_anew():
    traces = []

    def once(rate):
        return vn.fit(
            lambda m, b: (traces.append(1), jnp.mean((m(b[0]) - b[1]) ** 2))[1],
            line(),
            optax.adam(rate),
            line_batch(),
            3,
        )

    once(0.1)
    first = len(traces)
    again, other = once(0.1), once(0.2)
    assert len(traces) == first
    assert again.model.slope != other.model.slope


@pytest.mark.seams
def test_minibatches_compile_once(counted):
    cls, count = counted
    for seed in range(3):
        data = vn.Minibatches(line_batch(), 4, key=jax.random.key(seed))
        make(cls).fit(data, 10)
        if seed == 0:
            first = count.traces
    assert count.traces == first


def test_a_stream_compiles_once(counted):
    cls, count = counted
    make(cls).fit(vn.Stream([line_batch()] * 5), 5)
    first = count.traces
    make(cls, rate=0.3).fit(vn.Stream([line_batch()] * 5), 5)
    assert count.traces == first <= 2


@pytest.mark.seams
def test_compilations_by_equinox_own_count():
    """A trainer goes through a user's own jit without a retrace."""

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def step(trainer, batch):
        return trainer.step(batch)

    for rate in (0.1, 0.2):
        trainer = make(LineFit, rate)
        for _ in range(3):
            trainer, _ = step(trainer, line_batch())
    fitted = make(LineFit).fit(line_batch(), 3).trainer
    step(fitted, line_batch())


@pytest.mark.seams
def test_a_model_with_functions_and_floats_compiles_once():
    traces = []

    class Named(vn.Trainer):
        def loss(self, model, batch):
            traces.append(1)
            return jnp.sum(model["f"](model["w"]) ** 2) * model["scale"] * batch

    build = lambda: {"w": jnp.ones(2), "f": jax.nn.tanh, "scale": 0.5, "none": None}
    for _ in range(2):
        Named(build(), optax.adam(0.1)).fit(1.0, 3)
        if not _:
            first = len(traces)
    assert len(traces) == first
    other = Named({**build(), "f": jax.nn.relu}, optax.adam(0.1))
    other.fit(1.0, 3)
    assert len(traces) > first


def test_nothing_is_printed(capfd):
    result = make(LineFit).fit(line_batch(), 30, progress=True)
    result.trainer.step(line_batch())
    repr(result)
    out, err = capfd.readouterr()
    assert out == err == ""


@pytest.mark.seams
def test_everything_can_be_printed():
    result = make(LineFit).fit(line_batch(), 3, record=("slope", "grad_norm"))
    for text in (repr(result), str(result), repr(result.trainer), str(result.trainer)):
        assert "object at 0x" not in text
    assert "steps=3" in repr(result)
    assert repr(vn.SkipStep() | vn.StopAfter(3)).count("StopAfter") == 1


@pytest.mark.seams
def test_the_same_inputs_give_the_same_bits():
    one, other = (
        make(LineFit).fit(line_batch(), 50),
        make(LineFit).fit(line_batch(), 50),
    )
    assert same(one.trainer, other.trainer)
    np.testing.assert_array_equal(one.history.loss, other.history.loss)


@pytest.mark.seams
def test_nothing_is_donated():
    trainer, batch = make(LineFit), line_batch()
    before = jax.tree.map(np.array, eqx.filter(trainer, eqx.is_array))
    first = trainer.fit(batch, 3)
    second = trainer.fit(batch, 3)
    first.trainer.fit(line_batch(), 3)
    trainer.step(batch)
    after = jax.tree.map(np.array, eqx.filter(trainer, eqx.is_array))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert same(first.trainer, second.trainer)
    assert same(batch, line_batch())
    assert first.best.slope.is_deleted() is False


@pytest.mark.seams
def test_state_keeps_structure_and_types():
    trainer = make(LineFit)
    after = trainer.fit(line_batch(), 5).trainer
    assert jax.tree.structure(trainer) == jax.tree.structure(after)
    kind = lambda t: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(t)]
    assert kind(trainer) == kind(after)


@pytest.mark.seams
def test_a_chunk_runs_without_the_host():
    """Nothing but the last state and the rows crosses over, once a chunk."""
    trainer = make(LineFit).fit(line_batch(), 3).trainer
    batch = jax.device_put(line_batch())
    jaxpr = jax.make_jaxpr(lambda t, b: t.step(b))(trainer, batch)
    assert "callback" not in str(jaxpr)


@pytest.mark.parametrize("count", [1, 4])
def test_the_work_of_a_compilation_does_not_grow_with_the_steps(count):
    model = {f"p{i}": Line(jnp.asarray(1.0), jnp.asarray(2.0)) for i in range(count)}
    traces = []

    class Sum(vn.Trainer):
        def loss(self, model, batch):
            traces.append(1)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(model))

    optimiser = vn.ParamOptimiser({f"p{i}": optax.adam(0.1) for i in range(count)})
    Sum(model, optimiser).fit(None, 5)
    assert len(traces) <= 2


@pytest.mark.seams
def test_a_deep_copy_is_the_same_trainer():
    trainer = make(LineFit)
    twin = copy.deepcopy(trainer)
    assert same(twin.fit(line_batch(), 3).trainer, trainer.fit(line_batch(), 3).trainer)


@pytest.mark.seams
def test_errors_can_be_pickled():
    error = vn.NonFiniteError(3, ["power"], {"power": vn.NanCount(1, 3)}, None)
    twin = pickle.loads(pickle.dumps(error))
    assert str(twin) == str(error)
    assert twin.report == error.report
    dry = vn.StreamExhaustedError(3, 5, None)
    assert str(pickle.loads(pickle.dumps(dry))) == str(dry)

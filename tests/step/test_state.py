"""State beside the parameters: carried, held on rejected steps, kept, restored."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from models import Line, LineFit, TwoFit, at, line, line_batch, same, script, two

BATCH = line_batch()


class Mean(LineFit):
    """Carries the mean of all losses so far, in float32, and how many there were."""

    def loss(self, model, batch, *, state):
        loss = super().loss(model, batch)
        count, mean = state["count"] + 1, state["mean"].astype(float)
        mean = mean + (loss - mean) / count.astype(float)
        return loss, {"mean": mean}, {"count": count, "mean": mean}


START = {"count": np.int32(0), "mean": jnp.asarray(0.0, "f4")}


def mean(**options):
    return Mean(line(), optax.sgd(0.1), **{"state": START, **options})


def test_it_is_carried_from_step_to_step():
    result = mean().fit(BATCH, 10, record="mean")
    state = result.trainer.state
    assert int(state["count"]) == 10
    np.testing.assert_allclose(state["mean"], result.history.loss.mean(), rtol=1e-6)
    running = np.cumsum(result.history.loss) / np.arange(1, 11)
    np.testing.assert_allclose(result.history["mean"], running, rtol=1e-6)
    assert state["mean"].dtype == jnp.float32


def test_a_step_carries_it_as_a_fit_does():
    trainer = mean()
    for _ in range(3):
        trainer, info = trainer.step(BATCH)
    assert float(info.metrics["mean"]) == pytest.approx(float(trainer.state["mean"]))
    assert same(trainer.state, mean().fit(BATCH, 3).trainer.state)


def test_a_fit_without_it_is_the_same():
    with_it, without = (
        mean().fit(BATCH, 10),
        LineFit(line(), optax.sgd(0.1)).fit(BATCH, 10),
    )
    np.testing.assert_allclose(with_it.model.slope, without.model.slope, rtol=1e-14)
    assert without.trainer.state is None
    assert without.trainer.best_state is None


class Walk(TwoFit):
    """Counts the steps that were taken, in a state that goes bad when asked to."""

    def loss(self, model, batch, *, state):
        batch = at(batch, self.step_count)
        return super().loss(model, batch), (state[0] + 1, state[1] * batch.b)


@pytest.mark.parametrize(
    ("policy", "steps", "taken"),
    [
        (vn.SkipStep(), "..a.l.", 4),
        (vn.ZeroNans(), "..a...", 6),
        (vn.ZeroNans(), "..b...", 5),
        (vn.SkipStep(), "u.....", 5),
    ],
)
def test_a_step_that_is_not_taken_holds_it(policy, steps, taken):
    state = (jnp.array(0), jnp.asarray(1.0, "f4"))
    trainer = Walk(two(), optax.adam(0.1), nan_policy=policy, state=state)
    result = trainer.fit(script(steps), len(steps))
    count, product = result.trainer.state
    assert int(count) == taken
    assert float(product) == 1.0
    if "b" in steps:
        assert result.trainer.nan_report()["update"] == vn.NanCount(1, 2)


def test_the_best_has_a_state_of_its_own():
    trainer = mean()
    result = trainer.fit(BATCH, 6)
    # The last loss that was scored is the lowest: that of the model after five steps.
    five = trainer.fit(BATCH, 5).trainer
    assert same(result.best, five.model)
    assert same(result.trainer.best_state, five.state)


def test_with_a_validation_it_is_that_of_the_model_that_was_scored():
    away = (BATCH[0], 0.4 * BATCH[0] - 0.2)
    trainer = Mean(line(), optax.sgd(0.02), state=START)
    result = trainer.fit(BATCH, 60, validation=(away, 3))
    lowest = int(np.argmin(result.history.validation))
    assert 0 < lowest < 19
    there = trainer.fit(BATCH, 3 * (lowest + 1)).trainer
    assert same(result.trainer.best_state, there.state)


class Network(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key):
        first, last = jax.random.split(key)
        self.first = eqx.nn.Linear(1, 8, key=first)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.1)
        self.last = eqx.nn.Linear(8, 1, key=last)

    def __call__(self, x, state, key=None):
        hidden, state = self.norm(self.first(x), state)
        return self.last(self.dropout(jax.nn.tanh(hidden), key=key)), state


class NetworkFit(vn.Trainer):
    def loss(self, model, batch, *, key, state):
        x, y = batch
        keys = jax.random.split(key, len(x))
        run = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
        told, state = run(x, state, keys)
        return jnp.mean((told - y) ** 2), state

    def evaluate(self, model, batch):
        x, y = batch
        run = jax.vmap(eqx.nn.inference_mode(model), (0, None), axis_name="batch")
        return jnp.mean((run(x, self.state)[0] - y) ** 2)


make_network = eqx.filter_jit(eqx.nn.make_with_state(Network))


def network(seed=0, **options):
    model, state = make_network(jax.random.key(seed))
    return NetworkFit(
        model, optax.adam(0.02), state=state, key=jax.random.key(1), **options
    )


def curve(n=64):
    x = np.linspace(-2, 2, n)[:, None]
    return x, np.sin(2 * x)


def minibatches():
    return vn.Minibatches(curve(), 16, key=jax.random.key(2))


@pytest.mark.loose_dtypes
def test_batch_norm_and_dropout():
    result = network().fit(minibatches(), 400, validation=(curve(33), 100))
    assert result.history.validation[-1] < 0.2 < 0.3 < result.history.validation[0]
    # By hand: the model with its own state gives the score that was told.
    model = eqx.nn.inference_mode(result.best)
    x, y = curve(33)
    run = jax.jit(jax.vmap(model, (0, None), axis_name="batch"))
    score = np.mean((np.asarray(run(x, result.trainer.best_state)[0]) - y) ** 2)
    assert float(score) == pytest.approx(result.history.validation.min())


def test_batch_norm_by_hand():
    """Against Equinox's own loop."""
    trainer, (x, y) = network(), curve(16)
    model, state, optimiser = trainer.model, trainer.state, optax.adam(0.02)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def by_hand(model, state, opt_state, step):
        def loss(model, state):
            keys = jax.random.split(jax.random.fold_in(trainer.key, step), len(x))
            run = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
            told, state = run(x, state, keys)
            return jnp.mean((told - y) ** 2), state

        grads, state = eqx.filter_grad(loss, has_aux=True)(model, state)
        updates, opt_state = optimiser.update(grads, opt_state, model)
        return eqx.apply_updates(model, updates), state, opt_state

    for step in range(5):
        model, state, opt_state = by_hand(model, state, opt_state, jnp.asarray(step))
    result = trainer.fit((x, y), 5)
    for ours, theirs in (result.model, model), (result.trainer.state, state):
        ours, theirs = (eqx.filter(tree, eqx.is_array) for tree in (ours, theirs))
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("way", ["fit", "save", "checkpoint"])
def test_in_two_parts_it_is_the_same(way, tmp_path):
    options = {"validation": (curve(33), 4)}
    whole = network().fit(minibatches(), 14, **options)
    if way == "checkpoint":
        kept = {**options, "checkpoint": vn.Checkpoints(tmp_path / "kept")}
        network().fit(minibatches(), 9, **kept)
        result = network().fit(minibatches(), 14, **kept)
    else:
        trainer = network().fit(minibatches(), 9, **options).trainer
        if way == "save":
            vn.save(tmp_path / "trainer", trainer)
            trainer = vn.load(tmp_path / "trainer", network(seed=7))
        result = trainer.fit(minibatches(), 5, **options)
    assert same(result.trainer, whole.trainer)
    assert same(result.trainer.best_state, whole.trainer.best_state)


def test_a_state_can_start_anew(tmp_path):
    trainer = mean().fit(BATCH, 10).trainer
    vn.save(tmp_path / "trainer", trainer)
    loaded = vn.load(tmp_path / "trainer", mean(), reset="state")
    assert same(loaded.state, mean().state)
    assert same(loaded.model, trainer.model)
    replaced = trainer.replace(state=START)
    assert same(replaced.state, mean().state)
    assert same(trainer.replace(optimiser=optax.sgd(0.2)).state, trainer.state)


def test_a_key_in_the_state():
    class Drawn(LineFit):
        def loss(self, model, batch, *, state):
            key, own = jax.random.split(state)
            return super().loss(model, batch), {"draw": jax.random.normal(own)}, key

    trainer = Drawn(line(), optax.sgd(0.1), state=jax.random.key(3))
    result = trainer.fit(BATCH, 4, record="draw")
    assert len(set(result.history["draw"])) == 4
    assert result.trainer.state.dtype == trainer.state.dtype


def test_it_compiles_once():
    count = 0

    class Counted(Mean):
        def loss(self, model, batch, *, state):
            nonlocal count
            count += 1
            return super().loss(model, batch, state=state)

    trainer = Counted(line(), optax.sgd(0.1), state=START)
    first = trainer.fit(BATCH, 3)
    traced = count
    first.trainer.fit(BATCH, 30)
    Counted(line(), optax.sgd(0.1), state={**START, "count": np.int32(5)}).fit(BATCH, 3)
    assert count == traced


def test_a_state_is_no_parameter_and_is_seen_by_all_methods():
    class Centred(vn.Trainer):
        def loss(self, model, batch, *, state):
            return self.nll(model, batch), state + 0.1 * (model.offset - state)

        def nll(self, model, batch):
            x, y = batch
            return jnp.sum((model(x) - y) ** 2) + 0 * self.state

    trainer = Centred(line(), optax.sgd(0.01), state=jnp.array(0.0))
    assert float(trainer.step(BATCH)[0].state) == pytest.approx(-0.1)
    assert trainer.fisher(BATCH).shape == (2, 2)
    solved = trainer.solve(optx.BFGS(rtol=1e-8, atol=1e-8), BATCH)
    np.testing.assert_allclose(solved.model.slope, 2, rtol=1e-6)
    assert float(solved.trainer.state) == 0.0


def test_of_a_plain_function():
    def loss(model, batch, *, key, state):
        return jnp.mean((model(batch[0]) - batch[1]) ** 2), state + 1

    result = vn.fit(
        loss,
        line(),
        optax.sgd(0.1),
        BATCH,
        5,
        state=jnp.array(0),
        key=jax.random.key(0),
    )
    assert int(result.trainer.state) == 5


class Counting(eqx.Module):
    slope: jax.Array
    count: eqx.nn.StateIndex

    def __init__(self):
        self.slope = jnp.array(0.5)
        self.count = eqx.nn.StateIndex(jnp.array(0))


@pytest.mark.loose_dtypes
def test_a_line_search_does_not_use_it_up():
    """Which scores the loss many times in one step."""

    class Counted(vn.Trainer):
        def loss(self, model, batch, *, state):
            state = state.set(model.count, state.get(model.count) + 1)
            return jnp.mean((model.slope * batch[0] - batch[1]) ** 2), state

    model, state = eqx.nn.make_with_state(Counting)()
    search = optax.scale_by_backtracking_linesearch(9)
    optimiser = optax.lbfgs(memory_size=2, linesearch=search)
    trainer = Counted(model, optimiser, state=state)
    result = trainer.fit(BATCH, 3)
    assert int(result.trainer.state.get(model.count)) == 3
    assert int(trainer.state.get(model.count)) == 0
    assert result.history.loss[-1] < result.history.loss[0]


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (
            lambda loss, state: loss,
            TypeError,
            r"returned one value.*`\(scalar, state\)`",
        ),
        (lambda loss, state: (loss, {}, state, state), TypeError, "a tuple of 4"),
        (lambda loss, state: (loss, 3.0, state), TypeError, "a tuple of 3"),
        (
            lambda loss, state: (loss, {"count": state["count"]}),
            ValueError,
            "The state that `loss`",
        ),
        (
            lambda loss, state: (loss, {**state, "mean": jnp.zeros(2)}),
            ValueError,
            r"'mean' has shape \(2,\)",
        ),
    ],
)
def test_what_a_loss_must_return(returned, error, match):
    class Odd(LineFit):
        def loss(self, model, batch, *, state):
            return returned(super().loss(model, batch), state)

    with pytest.raises(error, match=match):
        Odd(line(), optax.sgd(0.1), state=START).step(BATCH)


def test_what_a_state_may_be():
    class Likely(vn.Trainer):
        def nll(self, model, batch):
            return jnp.sum(model.slope)

    with pytest.raises(TypeError, match=r"`state` is for a `loss`.*Likely"):
        Likely(line(), optax.sgd(0.1), state=jnp.array(0.0))
    with pytest.raises(TypeError, match=r"`state\['name'\]` is of type `str`"):
        mean(state={"name": "a"})
    with pytest.raises(ValueError, match="`state` must have the structure"):
        mean().replace(state=jnp.array(0))


@pytest.mark.parametrize(("x64", "bits"), [(False, 32), (True, 64)])
def test_a_whole_number_that_is_too_long(x64, bits):
    """To begin with, or in the place of another; a shorter one is taken."""
    long = 2 ** (bits - 1)
    with jax.enable_x64(x64):
        model = Line(jnp.asarray(1.0), jnp.asarray(0.0))
        made = lambda number: Mean(model, optax.sgd(0.1), state=number)
        first = made(long - 1)
        assert first.state == long - 1
        for use in (made, lambda number: first.replace(state=number)):
            for number in (long, -long - 1):
                with pytest.raises(ValueError, match=f"`state`.*{bits} bits.*a float"):
                    use(number)


def test_the_best_and_its_state_belong_together(tmp_path):
    trainer = mean().fit(BATCH, 10).trainer
    vn.save(tmp_path / "trainer", trainer)
    loaded = vn.load(tmp_path / "trainer", mean(), reset="best")
    assert same(loaded.best, trainer.model)
    assert same(loaded.best_state, trainer.state)
    replaced = trainer.replace(model=line(3.0), state=START)
    assert same(replaced.best, replaced.model)
    assert same(replaced.best_state, mean().state)

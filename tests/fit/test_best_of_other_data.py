"""A best is of the data that the last fit saw: losses of other data do not compare."""

import decimal
import enum
import fractions
import functools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import inside
import vernal as vn
from models import LineFit, line, line_batch

X, Y = line_batch()
NEXT = X, Y + 30 * jnp.sin(X)
"""Data that no line fits as well as the first ones."""
SOLVER = optx.BFGS(rtol=1e-8, atol=1e-8)
HALVES = {"key": jax.random.key(0)}


class Scaled(LineFit):
    sigma: jax.Array

    def __init__(self, model, optimiser, *, sigma):
        self.sigma = jnp.asarray(sigma)
        super().__init__(model, optimiser)

    def loss(self, model, batch):
        return super().loss(model, batch) / self.sigma


def quiet(trainer, data, steps=40, **options):
    return trainer.fit(data, steps, progress=False, **options)


def fitted():
    return quiet(LineFit(line(), optax.adam(0.05)), (X, Y), 300).trainer


def stepped(trainer, data):
    for _ in range(5):
        trainer, _ = trainer.step(data)
    return trainer


WAYS = {
    "fit": lambda trainer, data: quiet(trainer, data).trainer,
    "fit(validation=)": lambda trainer, data: (
        quiet(trainer, (X, Y), validation=(data, 1)).trainer
    ),
    "fit(Minibatches)": lambda trainer, data: (
        quiet(trainer, vn.Minibatches(data, 4, **HALVES)).trainer
    ),
    "fit(Stream)": lambda trainer, data: (
        quiet(trainer, vn.Stream(lambda step: iter([data] * 99))).trainer
    ),
    "solve": lambda trainer, data: trainer.solve(SOLVER, data).trainer,
    "step": stepped,
    "unroll": lambda trainer, data: vn.unroll(trainer, data, 5)[0],
    "compiled unroll": lambda trainer, data: jax.jit(
        lambda trainer, data: vn.unroll(trainer, data, 5)[0]
    )(trainer, data),
    "fit_many": lambda trainer, data: quiet_many([trainer] * 2, data).trainer(1),
    "fit_many(solver=)": lambda trainer, data: vn.fit_many(
        [trainer], data, 99, solver=SOLVER
    ).trainer(0),
}


def quiet_many(trainers, data, steps=40, **options):
    return vn.fit_many(trainers, data, steps, progress=False, **options)


def on(trainer, data):
    return trainer.loss(trainer.best, data)


@pytest.mark.parametrize("way", WAYS)
def test_a_best_of_other_data_is_dropped(way):
    before = fitted()
    after = WAYS[way](before, NEXT)
    assert after.best_loss > 10 * before.best_loss
    assert on(after, NEXT) <= 1.01 * on(before, NEXT)
    if "Minibatches" not in way:
        np.testing.assert_allclose(after.best_loss, on(after, NEXT), rtol=1e-12)


@pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("fit(")])
def test_and_so_is_that_of_another_way(way):
    """The loss of four points, or of another sum, is lower than that of all."""
    before = WAYS[way](fitted(), (X, Y))
    after = before.solve(SOLVER, (X, Y)).trainer
    np.testing.assert_allclose(after.best_loss, on(after, (X, Y)), rtol=1e-12)
    assert after.best_loss <= on(before, (X, Y))


class Night:
    """Data of a user's own class, which JAX takes for a constant."""

    def __init__(self, offset):
        self.offset = offset

    def __call__(self):
        return self.offset


class Sky(enum.Enum):
    DARK, BRIGHT = 0.0, 50.0


class Tagged(eqx.Module):
    x: jax.Array
    offset: float = eqx.field(static=True)


class Offset(vn.Trainer):
    def residuals(self, model, batch):
        x, constants = batch
        return model["slope"] * x - 2 * x + sum(map(number_of, constants.values()))


def number_of(constant):
    match constant:
        case bool():
            return 50.0 * constant
        case Sky():
            return constant.value
        case Tagged():
            return constant.offset
    return float(constant() if callable(constant) else constant)


# Of each kind of constant: one with a low loss, and one with a high loss.
CONSTANTS = {
    "word": ("0", "50"),
    "bool": (False, True),
    "bytes": (b"0", b"50"),
    "decimal": (decimal.Decimal(0), decimal.Decimal(50)),
    "fraction": (fractions.Fraction(0), fractions.Fraction(50)),
    "member of an enumeration": tuple(Sky),
    "function": (lambda: 0.0, lambda: 50.0),
    "partial": (functools.partial(max, 0.0, 0.0), functools.partial(max, 0.0, 50.0)),
    "method": (Night(0.0).__call__, Night(50.0).__call__),
    "object": (Night(0.0), Night(50.0)),
    "static field": (Tagged(X, 0.0), Tagged(X, 50.0)),
}
LOW = X, {name: low for name, (low, _) in CONSTANTS.items()}
# All of them are low but one: so a program for low ones is compiled but once.
HIGH = {name: (X, LOW[1] | {name: high}) for name, (_, high) in CONSTANTS.items()}


EAGER = {name: WAYS[name] for name in ("fit", "solve", "unroll")}
EAGER |= {name: way for name, way in WAYS.items() if name.startswith("fit_many")}
EAGER["fit(validation=)"] = lambda trainer, data: (
    quiet(trainer, LOW, validation=(data, 1)).trainer
)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "fit") for name in CONSTANTS),
        *(("object", way) for way in EAGER if way != "fit"),
    ],
)
def test_a_constant_of_the_data_is_of_the_data(name, way):
    begin = Offset({"slope": jnp.ones(())}, optax.sgd(1e-3))
    trainer = EAGER[way](begin, LOW)
    assert EAGER[way](trainer, LOW).best_loss <= trainer.best_loss < 10
    assert EAGER[way](trainer, HIGH[name]).best_loss > 1_000


@pytest.mark.parametrize("way", ["fit", "unroll"])
def test_an_object_that_changes_is_other_data(way):
    data = X, {"night": (night := Night(0.0))}
    trainer = WAYS["fit"](Offset({"slope": jnp.ones(())}, optax.sgd(1e-3)), data)
    night.offset = 50.0
    assert EAGER[way](trainer, data).best_loss > 1_000


def test_each_member_knows_on_what_it_was_scored():
    low, high = LOW, HIGH["object"]
    begin = Offset({"slope": jnp.ones(())}, optax.sgd(-1e-3))
    trainers = [EAGER["fit"](begin, data) for data in (high, low)]
    result = quiet_many(trainers, low)
    kept, losses = trainers[1].best_loss, result.history.loss
    assert result.best_losses[0] == losses[:, 0].min()
    assert result.best_losses[1] == kept < losses[:, 1].min()
    again = quiet(result.trainer(1), low)
    assert again.best_loss == kept
    assert quiet(result.trainer(1), high).best_loss > 1_000


@pytest.mark.parametrize("way", ["fit(Minibatches)", "fit(validation=)", "step"])
def test_a_member_keeps_its_best_beside_one_that_was_scored_otherwise(way):
    before = quiet(departing(fitted()), (X, Y)).trainer
    other = departing(WAYS[way](fitted(), (X, Y)))
    result = quiet_many([before, other], (X, Y))
    assert result.best_losses[0] == before.best_loss


def test_what_a_callback_changes_in_an_object_and_no_loss_reads():
    data = X, {"night": (night := Night(0.0))}
    begin = Offset({"slope": jnp.ones(())}, optax.sgd(-1e-3))

    def count(trainer, history):
        night.seen = len(history)

    def count_and_go_on(trainer, history):
        count(trainer, history)
        return trainer.replace(optimiser=trainer.optimiser)

    for callback in (count, count_and_go_on):
        result = quiet(begin, data, 9, callback=callback, chunk=3)
        assert night.seen == 9
        assert result.best_loss == result.history.loss[0]
        assert quiet(result.trainer, data, 9).best_loss == result.best_loss


KEPT = {
    "the same": lambda trainer: quiet(trainer, (X, Y)),
    "equal": lambda trainer: quiet(trainer, (X + 0, np.asarray(Y))),
    "with other policies": lambda trainer: quiet(
        trainer.replace(nan_policy=vn.SkipStep()), (X, Y)
    ),
    "solve": lambda trainer: trainer.solve(optx.BFGS(1.0, 1.0), (X, Y), max_steps=1),
    "pickled": lambda trainer: quiet(pickle.loads(pickle.dumps(trainer)), (X, Y)),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_best_of_the_same_data_is_kept(case):
    before = quiet(departing(fitted()), (X, Y)).trainer
    later = KEPT[case](before)
    assert later.best_loss == before.best_loss < later.history.loss.min()


def departing(trainer):
    """The next steps go away from the minimum."""
    return trainer.replace(optimiser=optax.sgd(-0.1))


def test_a_file_knows_its_data(tmp_path):
    before = quiet(departing(fitted()), (X, Y)).trainer
    vn.save(tmp_path / "file", before)
    loaded = vn.load(tmp_path / "file", LineFit(line(), optax.sgd(-0.1)))
    assert quiet(loaded, (X, Y)).best_loss == before.best_loss
    assert quiet(loaded, NEXT).best_loss > 10 * before.best_loss


def test_no_step_drops_nothing():
    before = fitted()
    assert quiet(before, NEXT, 0).best_loss == before.best_loss


def test_a_trainer_that_has_stopped_keeps_its_best():
    before = quiet(departing(fitted()), (X, Y)).trainer
    with pytest.warns(UserWarning, match="not finite"):
        stopped = quiet(before, (X * jnp.nan, Y)).trainer
    best = stopped.best_loss
    for way in ("fit", "step", "unroll"):
        assert WAYS[way](stopped, (X, Y)).best_loss == best


def test_each_of_many_has_data_of_its_own():
    trainers = [LineFit(line(), optax.adam(0.05))] * 3
    first = jnp.stack([Y, Y + 1, 2 * Y])
    second = first.at[1].set(NEXT[1])
    options = {"data_axis": (None, 0)}
    before = quiet_many(trainers, (X, first), 200, **options).trainers
    before = quiet_many(departing(before), (X, first), **options)
    after = quiet_many(before.trainers, (X, second), **options)
    same = after.best_losses == before.best_losses
    assert same.tolist() == [True, False, True]
    other = after.trainer(1)
    np.testing.assert_allclose(other.best_loss, on(other, (X, second[1])), rtol=1e-12)
    alone = before.trainer(2), (X, first[2])
    assert quiet(*alone).best_loss == before.best_losses[2]


def test_one_of_many_that_share_their_data_goes_on_alone():
    before = quiet_many([LineFit(line(), optax.adam(0.05))] * 2, (X, Y), 300).trainers
    before = quiet_many(departing(before), (X, Y))
    assert quiet(before.trainer(1), (X, Y)).best_loss == before.best_losses[1]


@pytest.mark.parametrize("many", [False, True])
def test_an_own_field_counts_as_data(many):
    def run(trainer):
        if not many:
            return quiet(trainer, (X, Y), 20).trainer
        return quiet_many([trainer] * 2, (X, Y), 20).trainer(1)

    before = run(Scaled(line(), optax.sgd(0.01), sigma=100.0))
    before = run(departing(before).replace(optimiser=optax.sgd(-1.0)))
    assert run(before).best_loss == before.best_loss
    other = eqx.tree_at(lambda trainer: trainer.sigma, before, jnp.asarray(1.0))
    assert run(other).best_loss > 10 * before.best_loss


class Mean(vn.Trainer):
    def loss(self, model, batch):
        return jnp.mean(jnp.square(model["a"] - batch["d"]))


def means(data, other, **options):
    """Leaves the minimum for the best, and goes on with other data."""
    start = Mean({"a": jnp.float32(0.6)}, optax.sgd(-0.1))
    before = quiet(start, data, 3)
    same = jax.tree.map(lambda x: x + 0, data)
    assert quiet(before.trainer, same, 3).best_loss == before.best_loss
    after = quiet(before.trainer, other, 3)
    assert after.best_loss == after.history.loss.min()


@pytest.mark.parametrize("shape", [(10,), (2**22 // 3 + 1, 3)])
def test_one_number_in_many_counts(shape):
    """Large arrays are summed up on their device."""
    data = jnp.zeros(shape, jnp.float32)
    other = data.reshape(-1).at[-2].set(1e6).reshape(shape)
    means({"d": data}, {"d": other})


@pytest.mark.parametrize("dtype", ["bool", "int4", "float8_e4m3fn", "complex64"])
def test_large_arrays_of_any_dtype_are_summed_up(dtype):
    dtype = jnp.dtype(dtype)
    data = np.zeros(2**24 // dtype.itemsize + 8, dtype)
    other = data.copy()
    other[7] = 1
    sums = [inside.leaf_sums({"d": jax.device_put(x)}) for x in (data, data, other)]
    assert sums[0] == sums[1] != sums[2]


def test_a_sum_sees_the_places_of_numbers():
    data = jnp.arange(2**22 + 2, dtype=jnp.float32)
    means({"d": data / data.size}, {"d": jnp.flip(data) / data.size})


def test_a_member_that_has_stopped_keeps_its_model():
    """It has no other; a loss of other data it has not."""

    class Fourth(vn.Trainer):
        def loss(self, model, batch):
            return jnp.mean((model["a"] - batch) ** 4)

    data = jnp.stack([jnp.full(4, 1e3), jnp.full(4, 2.0)])
    trainers = [Fourth({"a": jnp.float32(0)}, optax.sgd(1e-2))] * 2
    before = quiet_many(trainers, data, 30, data_axis=0)
    assert before.trainers.stopped.tolist() == [True, False]
    after = quiet_many(before.trainers, data + 1, 5, data_axis=0)
    assert after.trainer(0).best["a"] == 0
    assert after.best_losses[0] == jnp.inf
    assert after.best_index == 1


def test_what_a_callback_returns_is_looked_at():
    def polish(trainer, history):
        return trainer.solve(SOLVER, NEXT).trainer if len(history) == 50 else None

    data = vn.Minibatches(NEXT, 4, **HALVES)
    start = LineFit(line(), optax.adam(0.05))
    mixed = quiet(start, data, 200, chunk=10, callback=polish)
    after = mixed.trainer.solve(SOLVER, NEXT).trainer
    np.testing.assert_allclose(after.best_loss, on(after, NEXT), rtol=1e-12)


FIELDS = {
    "fit(Stream)": WAYS["fit(Stream)"],
    "many streams": lambda trainer, data: quiet_many(
        [trainer] * 2, vn.Stream(lambda step: iter([data] * 99))
    ).trainer(0),
}


@pytest.mark.parametrize("way", FIELDS)
def test_an_own_field_counts_where_data_are_not_known(way):
    before = FIELDS[way](Scaled(line(), optax.sgd(0.01), sigma=100.0), (X, Y))
    other = eqx.tree_at(lambda trainer: trainer.sigma, before, jnp.asarray(1.0))
    assert FIELDS[way](other, (X, Y)).best_loss > 10 * before.best_loss


def test_names_that_look_alike_are_told_apart():
    """A key with a dot, and a key within a key: one has a row for each member."""

    class Twice(vn.Trainer):
        def loss(self, model, batch):
            return (model["a"] - batch["p.q"] - batch["p"]["q"]) ** 2

    def run(trainers, shared):
        data = {"p.q": jnp.zeros(2), "p": {"q": jnp.asarray(shared)}}
        axes = {"p.q": 0, "p": {"q": None}}
        return quiet_many(trainers, data, 200, data_axis=axes)

    before = run([Twice({"a": jnp.asarray(0.0)}, optax.sgd(0.1))] * 2, 1.0)
    after = run(before.trainers, 9.0)
    assert [after.trainer(i).best["a"] > 8 for i in range(2)] == [True, True]

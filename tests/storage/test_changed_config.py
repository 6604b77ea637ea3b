"""What a callback changes of the configuration is there after a fit is taken up again.

The oracle is the fit that nothing has ended.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import same, same_results

AT, END, STEPS = 10, 20, 30
POINTS = vn.Minibatches(
    jax.random.normal(jax.random.key(0), (40, 3)), 16, key=jax.random.key(1)
)


class Halve(vn.NanPolicy):
    """Halves all gradients, or multiplies them by another factor."""

    factor: jax.Array

    def init(self, params):
        return None

    def apply(self, loss, grads, state):
        less = jax.tree.map(lambda g: g * self.factor.astype(g.dtype), grads)
        return less, vn.Verdict(True, False), state


class Noisy(vn.Trainer):
    weight: jax.Array
    power: float
    shape: np.ndarray
    form: Callable

    def __init__(self, model, optimiser, **options):
        super().__init__(model, optimiser, key=jax.random.key(2), **options)
        self.weight, self.power = jnp.asarray(1.0), 2.0
        self.shape, self.form = np.ones(3), jnp.abs

    def loss(self, model, batch, *, key):
        weights = model["w"].astype(float)
        misfit = self.form(batch @ weights - model["aim"])
        noise = jnp.sum(jax.random.normal(key, (3,)) * weights * self.shape)
        return jnp.mean(self.weight * misfit**self.power) + 0.1 * noise


def rules(rate):
    # The weights have a dtype of less bits than the rates.
    return vn.ParamOptimiser({"w": optax.sgd(rate, momentum=0.5)})


def make(rate=0.1, dtype=jnp.float32, optimiser=rules):
    model = {"w": jnp.zeros(3, dtype), "aim": jnp.asarray(1.0)}
    policy = Halve(jnp.asarray(0.5))
    return Noisy(model, optimiser(rate), train="w", nan_policy=policy)


def with_field(name, value):
    return lambda t: eqx.tree_at(lambda t: getattr(t, name), t, value)


CHANGES = {
    "rate": lambda t: t.replace(optimiser=rules(1e-3)),
    "factor of a rule": lambda t: t.replace(
        optimiser=t.optimiser.with_scale({"w": 0.1})
    ),
    "policy": lambda t: t.replace(nan_policy=Halve(jnp.asarray(0.1))),
    "array": with_field("weight", jnp.asarray(0.1)),
    "number": with_field("power", 1.5),
    "array of NumPy": with_field("shape", np.arange(3.0)),
    "key": with_field("key", jax.random.key(5)),
    "frozen leaf": lambda t: t.replace(model=t.model | {"aim": jnp.asarray(3.0)}),
}


def stepping(change, is_due=lambda step: step == AT, end=None):
    """A callback that makes a change, and another that ends the fit."""

    def callback(trainer, history):
        step = int(trainer.step_count.max())
        if step == end:
            raise InterruptedError
        return change(trainer) if is_due(step) else None

    return callback


def fit(folder, change, steps=STEPS, made=None, **when):
    return (make() if made is None else made).fit(
        POINTS,
        steps,
        chunk=5,
        callback=stepping(change, **when),
        checkpoint=None if folder is None else vn.Checkpoints(folder),
    )


def ended(folder, change, **options):
    with pytest.raises(InterruptedError):
        fit(folder, change, end=END, **options)


@functools.cache
def unchanged(dtype):
    return fit(None, lambda t: None, made=make(dtype=dtype)).trainer


# What is computed with the weights depends on their dtype.
CHOSEN = [(name, jnp.float32) for name in CHANGES]
CHOSEN += [(n, jnp.bfloat16) for n in ("rate", "factor of a rule", "policy", "array")]


@pytest.mark.parametrize(("name", "dtype"), CHOSEN)
def test_a_change_stays(name, dtype, tmp_path):
    """Warnings are errors here: there is none."""
    change, made = CHANGES[name], make(dtype=dtype)
    whole = fit(None, change, made=made)
    assert not same(whole.trainer, unchanged(dtype))
    ended(tmp_path, change, made=made)
    assert same_results(fit(tmp_path, change, made=made), whole)


def test_a_change_stays_once_more(tmp_path):
    """It is not in what the second run has begun with."""
    change = CHANGES["rate"]
    ended(tmp_path, change)
    assert fit(tmp_path, change, steps=25).trainer.step_count == 25
    assert same_results(fit(tmp_path, change), fit(None, change))


def test_a_change_that_is_made_again(tmp_path):
    when = {"is_due": lambda step: step >= AT}
    whole = fit(None, CHANGES["rate"], **when)
    ended(tmp_path, CHANGES["rate"], **when)
    assert same_results(fit(tmp_path, CHANGES["rate"], **when), whole)


def test_a_change_of_many(tmp_path):
    """The rate of each member."""
    each = eqx.filter_vmap(lambda rate: make(optimiser=optax.sgd, rate=rate))
    before, after = jnp.asarray([[0.1, 0.05], [1e-3, 1e-2]], jnp.float32)
    change = lambda t: t.replace(optimiser=each(after).optimiser)

    def run(folder, **when):
        return vn.fit_many(
            each(before),
            POINTS,
            STEPS,
            chunk=5,
            callback=stepping(change, **when),
            checkpoint=None if folder is None else vn.Checkpoints(folder),
        )

    whole = run(None)
    with pytest.raises(InterruptedError):
        run(tmp_path, end=END)
    assert same_results(run(tmp_path), whole)


def test_the_program_has_the_last_word(tmp_path):
    """As for hyperparameters: a rate that is another in the program is taken."""
    ended(tmp_path, CHANGES["rate"])
    resumed = fit(tmp_path, CHANGES["rate"], made=make(rate=0.01))
    assert resumed.trainer.learning_rates()["w"] == pytest.approx(0.01)


def test_what_cannot_be_kept(tmp_path):
    change = with_field("form", jnp.square)
    ended(tmp_path, change)
    with pytest.warns(UserWarning, match="a callback had changed 'form'"):
        fit(tmp_path, change)
    # It is said once.
    fit(tmp_path, change, steps=STEPS + 5)

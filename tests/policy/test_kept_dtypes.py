"""The state of a policy, a criterion and a loss keeps its dtype, or says why not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import LineFit, line, line_batch

BATCH, SGD = line_batch(4), optax.sgd(0.1)


class Policy(vn.NanPolicy):
    first: object
    then: object

    def init(self, params):
        return {"a": self.first}

    def apply(self, loss, grads, state):
        return grads, vn.Verdict(True, False), {"a": self.then(state["a"])}


class Criterion(vn.StopCriterion):
    first: object
    then: object

    def init(self, params):
        return {"a": self.first}

    def apply(self, view, state):
        return False, {"a": self.then(state["a"])}


class Stateful(vn.Trainer):
    then: object

    def __init__(self, first, then):
        self.then = then
        super().__init__(line(), SGD, state={"a": first})

    def loss(self, model, batch, *, state):
        return model.slope**2, {"a": self.then(state["a"])}


def step_of_policy(first, then):
    trainer, _ = LineFit(line(), SGD, nan_policy=Policy(first, then)).step(BATCH)
    return trainer._progress.policy_state["a"]


def fit_of_criterion(first, then):
    LineFit(line(), SGD).fit(BATCH, 2, stop=Criterion(first, then))


def step_of_loss(first, then):
    trainer, _ = Stateful(first, then).step(BATCH)
    return trainer.state["a"]


# What holds it, what an error calls it, and what it tells one to do.
HOLDERS = {
    "policy": (step_of_policy, "the state that `Policy.apply` returned", "Let `init`"),
    "criterion": (fit_of_criterion, "the state that `Criterion.apply`", "Let `init`"),
    "loss": (step_of_loss, "The state that `loss` returns", "Give `state=`"),
}
ONE = np.int32(1)
# The first state, that of the next step, and the dtype that has no room for it.
LOST = {
    "a float": (0, lambda s: s + 0.5, "int32|int64"),
    "a strong float": (jnp.array(0), lambda s: s + jnp.ones(()), "int32|int64"),
    "a complex number": (0.0, lambda s: s + 1j, "float32|float64"),
    "a count": (False, lambda s: s + ONE, "bool"),
    "a sign": (np.uint8(1), lambda s: s - jnp.int32(2), "uint8"),
    "a number for a key": (jax.random.key(0), lambda s: jnp.int32(0), "key<fry>"),
}
KEPT = {
    "a count": (0, lambda s: s + 1, 1),
    "a flag": (False, lambda s: ~s, True),
    "an unsigned count": (np.uint8(1), lambda s: s + 1, 2),
    "a number of Python": (np.uint8(1), lambda s: 3, 3),
    "an integer for a float": (0.0, lambda s: jnp.int32(3), 3.0),
    "a flag for an integer": (0, lambda s: s == 0, 1),
    "another width": (jnp.float16(0), lambda s: jnp.float32(0.5), 0.5),
    "a float for a complex number": (1j, lambda s: s.imag, 1.0 + 0j),
}


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_a_state_cannot_hold_is_refused(holder, case):
    (use, what, remedy), (first, then, dtype) = HOLDERS[holder], LOST[case]
    with pytest.raises(TypeError, match=f"{what}.*at 'a'.*({dtype}).*{remedy}"):
        use(first, then)


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("use", [step_of_policy, step_of_loss])
def test_what_a_state_can_hold_is_cast(use, case):
    first, then, expected = KEPT[case]
    state = use(first, then)
    assert state == expected
    assert state.dtype == jnp.asarray(first).dtype


def test_replacing_a_state_loses_nothing():
    trainer = Stateful(0, lambda s: s)
    with pytest.raises(TypeError, match=r"`state` is float.*Make a new trainer"):
        trainer.replace(state={"a": 0.5})
    assert trainer.replace(state={"a": 2}).state["a"] == 2

"""The state of a policy, a criterion and a loss keeps its dtype, or says why not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import LineFit, line, line_batch

BATCH, SGD = line_batch(4), optax.sgd(0.1)


def next_of(then, state):
    return {name: then[name](value) for name, value in state.items()}


class Policy(vn.NanPolicy):
    first: dict
    then: dict

    def init(self, params):
        return self.first

    def apply(self, loss, grads, state):
        return grads, vn.Verdict(True, False), next_of(self.then, state)


class Criterion(vn.StopCriterion):
    first: dict
    then: dict

    def init(self, params):
        return self.first

    def apply(self, view, state):
        return False, next_of(self.then, state)


class Stateful(vn.Trainer):
    then: dict

    def __init__(self, first, then):
        self.then = then
        super().__init__(line(), SGD, state=first)

    def loss(self, model, batch, *, state):
        return model.slope**2, next_of(self.then, state)


def step_of_policy(first, then):
    trainer, _ = LineFit(line(), SGD, nan_policy=Policy(first, then)).step(BATCH)
    return trainer._progress.policy_state


def fit_of_criterion(first, then):
    LineFit(line(), SGD).fit(BATCH, 2, stop=Criterion(first, then))


def step_of_loss(first, then):
    trainer, _ = Stateful(first, then).step(BATCH)
    return trainer.state


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
        use({"a": first}, {"a": then})


@pytest.mark.parametrize("use", [step_of_policy, step_of_loss])
def test_what_a_state_can_hold_is_cast(use):
    firsts = {case: first for case, (first, _, _) in KEPT.items()}
    state = use(firsts, {case: then for case, (_, then, _) in KEPT.items()})
    for case, (first, _, expected) in KEPT.items():
        assert np.asarray(state[case]) == expected, case
        assert state[case].dtype == jnp.asarray(first).dtype, case


def test_replacing_a_state_loses_nothing():
    trainer = Stateful({"a": 0}, {"a": lambda s: s})
    with pytest.raises(TypeError, match=r"`state` is float.*Make a new trainer"):
        trainer.replace(state={"a": 0.5})
    assert trainer.replace(state={"a": 2}).state["a"] == 2

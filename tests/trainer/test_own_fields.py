"""What a class adds to a trainer: fields of any kind, in each way to fit it."""

import copy
import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

X = jnp.linspace(0.0, 1.0, 8)
BFGS = optx.BFGS(1e-6, 1e-6)


class Line(vn.Trainer):
    own: Any

    def __init__(self, model, optimiser, own):
        super().__init__(model, optimiser)
        self.own = own

    def residuals(self, model, batch):
        return self.gain() * model["a"] * X - batch

    def gain(self):
        return 1.0


class Gained(Line):
    def gain(self):
        return self.own.gain


class ByArray(Line):
    def gain(self):
        return self.own


class Static(Line):
    own: Any = eqx.field(static=True)


@dataclasses.dataclass
class Config:
    gain: float = 2.0


# Several in one: a trainer is compiled for each.
OWN = {"a dictionary": {"order": 1, "list": [1, 2.5, "a"]}}
LEAVES = {
    "objects": ("linear", {1, 2}, Config()),
    "of NumPy": {"array": np.ones(3), "number": np.float64(2.0)},
}
WAYS = {
    "step": lambda ts: ts[0].step(2 * X),
    "table": lambda ts: ts[0].table(2 * X),
    "fit_many": lambda ts: vn.fit_many(ts, jnp.stack([X, X]), 5, data_axis=0),
    "solver": lambda ts: vn.fit_many(ts, 2 * X, 50, solver=BFGS),
}
CASES = [
    *(pytest.param(Static, own, id=f"static {name}") for name, own in OWN.items()),
    *(pytest.param(Line, own, id=name) for name, own in LEAVES.items()),
]


@pytest.mark.parametrize(("kind", "own"), CASES)
def test_any_field_goes_any_way(kind, own):
    """Each of two trainers has its own, which is equal: unlike sets, arrays may be."""
    copied = copy.deepcopy(own) if own is LEAVES["of NumPy"] else own
    model = {"a": jnp.asarray(1.0)}
    trainers = [kind(model, optax.adam(0.1), field) for field in (own, copied)]
    for go in WAYS.values():
        go(trainers)


def test_a_change_within_an_object_is_seen():
    trainer = Gained({"a": jnp.asarray(1.0)}, optax.adam(0.1), Config())
    np.testing.assert_allclose(trainer.solve(BFGS, 2 * X).model["a"], 1.0, rtol=1e-5)
    trainer.own.gain = 4.0
    np.testing.assert_allclose(trainer.solve(BFGS, 2 * X).model["a"], 0.5, rtol=1e-5)


def test_members_may_share_an_array_of_numpy():
    model, shared = {"a": jnp.asarray(1.0)}, np.asarray([2.0])
    many = vn.fit_many([ByArray(model, None, shared)] * 2, 2 * X, 50, solver=BFGS)
    np.testing.assert_allclose(many.trainers.model["a"], [1.0, 1.0], rtol=1e-5)


def test_arrays_of_numpy_may_differ_between_members():
    model = {"a": jnp.asarray(1.0)}
    trainers = [ByArray(model, None, np.asarray(gain)) for gain in (1.0, 4.0)]
    many = vn.fit_many(trainers, 2 * X, 50, solver=BFGS)
    np.testing.assert_allclose(many.trainers.model["a"], [2.0, 0.5], rtol=1e-5)


class Mixin:
    stopped = False


class Counted(Line):
    step_count: Any = None


class Told(Line):
    @property
    def model(self):
        return super().model


class Required(Line):
    params: Any


class Keyed(Line):
    key: Any = None


class Stepped(Line):
    step: int = 3


class Hooked(Line):
    constrain: Any


class Mixed(Mixin, Line):
    pass


class Policy(vn.NanPolicy):
    init: Any = None

    def apply(self, loss, grads, state):
        return grads, vn.Verdict(True, False), state


class Map(vn.Bijection):
    forward: Any = None

    def inverse(self, value):
        return value


class Likely(vn.likelihoods.AbstractLikelihood):
    count: int = 3

    def nll(self):
        return jnp.asarray(0.0)

    def residuals(self):
        return jnp.zeros(3)

    scoring_residuals = residuals


@pytest.mark.parametrize(
    ("kind", "name", "what"),
    [
        (Counted, "step_count", "property of every `Trainer`"),
        (Told, "model", "property"),
        (Required, "params", "property"),
        (Keyed, "key", "field"),
        (Stepped, "step", "method"),
        (Hooked, "constrain", "method"),
        (Mixed, "stopped", "property"),
        (Policy, "init", "method of every `NanPolicy`"),
        (Map, "forward", "method of every `Bijection`"),
        (Likely, "count", "method of every `AbstractLikelihood`"),
    ],
)
def test_a_name_of_the_base_class_is_taken(kind, name, what):
    given = ({}, None, None) if issubclass(kind, vn.Trainer) else ()
    with pytest.raises(TypeError, match=f"`{kind.__name__}`: `{name}` is a {what}"):
        kind(*given)


class Overriding(Line):
    constrain = staticmethod(lambda model: model)

    def fit(self, *args, **options):
        return super().fit(*args, progress=False, **options)

    def __repr__(self):
        return "mine"


class Raising(vn.NanPolicy):
    raises: bool = True
    leaves_good_steps = True

    def init(self, params):
        return None

    def apply(self, loss, grads, state):
        return grads, vn.Verdict(True, False), state


def test_methods_may_be_overridden():
    trainer = Overriding({"a": jnp.asarray(1.0)}, optax.adam(0.1), None)
    assert repr(trainer.replace(nan_policy=Raising()).fit(2 * X, 3).trainer) == "mine"


@pytest.mark.parametrize("array", [np.ones(2), jnp.ones(2), [np.ones(2)]])
@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_a_static_array_is_refused_at_once(array):
    with pytest.raises(TypeError, match="`Static`: the static field 'own' holds an"):
        Static({"a": jnp.asarray(1.0)}, None, array)

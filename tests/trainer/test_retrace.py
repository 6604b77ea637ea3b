"""`vernal.explain_retrace`: it names a difference exactly if something compiles."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import vernal as vn
from models import GaussianFit, LineFit, gaussian, gaussian_batch, line, line_batch, zoo


class Net(eqx.Module):
    weight: jax.Array
    mask: np.ndarray
    activation: object
    power: float
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return self.activation(self.weight * x) ** self.power * self.mask.sum()


def net(**changes):
    start = Net(jnp.ones(3), np.ones(2), jax.nn.tanh, 2.0, "net")
    return dataclasses.replace(start, **changes)


traces = []


class NetFit(vn.Trainer):
    def loss(self, model, batch, key=None):
        traces.append(1)
        leaves = [leaf for leaf in jax.tree.leaves(batch) if eqx.is_array(leaf)]
        return jnp.sum(model(0.1) ** 2) + sum(jnp.sum(leaf) for leaf in leaves)


def fitted(optimiser=None, model=None, **options):
    optimiser = optax.adam(0.1) if optimiser is None else optimiser
    return NetFit(net() if model is None else model, optimiser, **options)


def rules(tx):
    return vn.ParamOptimiser({"weight": tx})


def cosine(rate=0.1, steps=10):
    return optax.sgd(optax.cosine_decay_schedule(rate, steps))


def masked(limit=1):
    return optax.adamw(0.1, mask=lambda params: limit < 2)


def scaled(scale, *, offset=0.0):
    def activation(x, by=scale, *, plus=offset):
        return by * x + plus

    return activation


class Scaling(eqx.Module):
    scale: float

    def apply(self, x):
        return self.scale * x


def counting():
    count = 0

    def activation(x):
        nonlocal count
        count += 1
        return x

    return activation


policies = lambda patience: vn.SkipStep() | vn.StopAfter(patience)

TRAINERS = {
    "another rate": (fitted(), fitted(optax.adam(0.2)), None),
    "another rate of a rule": (
        fitted(rules(cosine(0.1))),
        fitted(rules(cosine(0.2)).with_scale({"weight": 3.0})),
        None,
    ),
    "other values": (fitted(), fitted(model=net(weight=jnp.zeros(3))), None),
    "other frozen values": (fitted(train="weight"),) * 2 + (None,),
    "functions defined anew": (fitted(masked()), fitted(masked()), None),
    "functions defined elsewhere": (
        fitted(optax.adamw(0.1, mask=lambda params: True)),
        fitted(optax.adamw(0.1, mask=lambda params: False)),
        "optimiser: mask of `masked` is another `<lambda>` than before",
    ),
    "a function that reads other values": (
        fitted(masked(limit=1)),
        fitted(masked(limit=2)),
        "optimiser: limit of `<lambda>` was 1, is 2",
    ),
    "another beta": (
        fitted(),
        fitted(optax.adam(0.1, b1=0.8)),
        "optimiser: b1 of `scale_by_adam` was 0.9, is 0.8",
    ),
    "another beta of a rule": (
        fitted(rules(optax.adam(0.1))),
        fitted(rules(optax.adam(0.2, b2=0.5))),
        "optimiser.transforms.0: b2 of `scale_by_adam` was 0.999, is 0.5",
    ),
    "another schedule": (
        fitted(cosine()),
        fitted(cosine(steps=20)),
        "optimiser: decay_steps of `cosine_decay_schedule` was 10, is 20",
    ),
    "another window": (
        fitted(vn.window(optax.sgd(0.1), 2)),
        fitted(vn.window(optax.sgd(0.1), 2, 9)),
        "optimiser: stop of `window` was None, is 9",
    ),
    "another transformation": (
        fitted(optax.sgd(0.1)),
        fitted(optax.sgd(0.1, momentum=0.9)),
        "optimiser: part 0 of `chain` was `identity`, is `trace`",
    ),
    "one more transformation": (
        fitted(optax.chain(optax.clip(1.0), optax.scale(-0.1))),
        fitted(optax.chain(optax.scale(-0.1))),
        "optimiser: content of `chain` was (`clip`, `scale`), is (`scale`)",
    ),
    "a schedule for a number": (
        fitted(optax.sgd(0.1)),
        fitted(cosine()),
        "optimiser: part 1 of `chain` was `scale`, is `scale_by_schedule`",
    ),
    "an integer for a rate": (
        fitted(optax.sgd(1.0)),
        fitted(optax.sgd(1)),
        "optimiser: step_size of `scale` was an array (~float64[]), is -1",
    ),
    "a rate of another dtype": (
        fitted(optax.sgd(jnp.asarray(0.1, jnp.float32))),
        fitted(optax.sgd(jnp.asarray(0.1, jnp.float64))),
        "optimiser: step_size of `scale`: dtype was float32, is float64",
    ),
    "another rule": (
        fitted(rules(optax.sgd(0.1))),
        fitted(vn.ParamOptimiser({"*": optax.sgd(0.1)}), train="weight"),
        "optimiser.selectors.0: was 'weight', is '*'",
    ),
    "another policy": (
        fitted(nan_policy=vn.SkipStep()),
        fitted(nan_policy=vn.ZeroNans()),
        "nan_policy: was a `SkipStep`, is a `ZeroNans`",
    ),
    "another patience": (
        fitted(nan_policy=policies(3)),
        fitted(nan_policy=policies(4)),
        "nan_policy.second.patience: static, was 3, is 4",
    ),
    "other parameters": (
        fitted(train="weight"),
        fitted(train=("weight", "mask")),
        "model.mask: was frozen, is trained",
    ),
    "another shape": (
        fitted(),
        fitted(model=net(weight=jnp.ones(4))),
        "params.weight: shape was (3,), is (4,)",
    ),
    "another dtype": (
        fitted(),
        fitted(model=net(weight=jnp.ones(3, jnp.float32))),
        "params.weight: dtype was float64, is float32",
    ),
    "another frozen shape": (
        fitted(train="weight"),
        fitted(model=net(mask=np.ones(5)), train="weight"),
        "model.mask: shape was (2,), is (5,)",
    ),
    "another static field": (
        fitted(),
        fitted(model=net(name="other")),
        "model.name: static, was 'net', is 'other'",
    ),
    "another activation": (
        fitted(),
        fitted(model=net(activation=jax.nn.relu)),
        "model.activation: was `tanh`, is `relu`",
    ),
    "another default": (
        fitted(model=net(activation=scaled(2.0))),
        fitted(model=net(activation=scaled(3.0, offset=1.0))),
        "model.activation: plus of `activation` was 0.0, is 1.0",
    ),
    "a method of another object": (
        fitted(model=net(activation=Scaling(2.0).apply)),
        fitted(model=net(activation=Scaling(3.0).apply)),
        "model.activation.__self__.scale: was 2.0, is 3.0",
    ),
    "a variable that is written to": (
        fitted(model=net(activation=counting())),
        fitted(model=net(activation=counting())),
        "model.activation: something differs that has no name: a value that its code "
        "reads, or a variable that it writes to",
    ),
    "another number": (
        fitted(),
        fitted(model=net(power=3.0)),
        "model.power: was 2.0, is 3.0",
    ),
    "a number for an array": (
        fitted(train="weight"),
        fitted(model=net(power=jnp.asarray(2.0)), train="weight"),
        "model.power: was static, is frozen",
    ),
    "a key": (
        fitted(),
        fitted(key=jax.random.key(0)),
        "key: was None, is an array (key<fry>[])",
    ),
}
"""Two trainers, and a line that must be told: none if nothing compiles."""


sizes = itertools.count(10)


def fresh():
    """A batch for which nothing is compiled yet."""
    return np.ones(next(sizes))


def count(fn):
    """How often the loss is traced by a call."""
    before = len(traces)
    fn()
    return len(traces) - before


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_compiles_anew_exactly_if_a_difference_is_told(name):
    old, new, line = TRAINERS[name]
    told, batch = vn.explain_retrace(old, new), fresh()
    # To trace the step is enough, which is all that is counted.
    traced = lambda trainer: count(lambda: jax.eval_shape(lambda: trainer.step(batch)))
    assert traced(old) > 0
    assert traced(old) == 0
    compiled = traced(new) > 0
    assert compiled is not told.startswith("Nothing differs")
    assert (line in told.split("\n")) if line else not compiled


@pytest.mark.seams
def test_a_fit_compiles_anew_exactly_if_a_difference_is_told():
    run = lambda trainer, data: trainer.fit(data, 3).trainer
    first, x = fitted(), fresh()
    after = run(first, (x, 2))
    assert vn.explain_retrace(first, after).startswith("Nothing differs")
    assert count(lambda: run(after, (x, 2))) == 0
    other = fresh()
    for batch, expected in (
        ((x + 1, 2), None),
        ((other, 2), f"0: shape was {x.shape}, is {other.shape}"),
        ((x, 3), "1: was the static 2, is the static 3"),
    ):
        told = vn.explain_retrace((x, 2), batch)
        assert (count(lambda batch=batch: run(first, batch)) > 0) is bool(expected)
        assert told.startswith(expected or "Nothing differs")


class Static(eqx.Module):
    value: object = eqx.field(static=True)


@jax.tree_util.register_pytree_node_class
class Own:
    """A node of one's own, which has no fields to name."""

    def __init__(self, child, tag):
        self.child, self.tag = child, tag

    def tree_flatten(self):
        return (self.child,), self.tag

    @classmethod
    def tree_unflatten(cls, tag, children):
        return cls(*children, tag)


ones = jnp.ones(3)
mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
spread = NamedSharding(mesh, PartitionSpec("x"))

TREES = {
    "other values": ((ones, line()), (ones + 1, line(3.0)), None),
    "NumPy's": ((ones, np.float64(1)), (np.ones(3), jnp.asarray(np.float64(1))), None),
    "another order of keys": ({"a": ones, "b": 1}, {"b": 1, "a": ones}, None),
    "equal numbers": ((1, 0.0), (1.0, -0.0), None),
    "equal statics": (Static((1, "a")), Static((1, "a")), None),
    "shape": ({"x": ones}, {"x": jnp.ones((3, 1))}, "x: shape was (3,), is (3, 1)"),
    "dtype": ([ones], [jnp.ones(3, int)], "0: dtype was float64, is int64"),
    "weak type": (jnp.array(1.0), jnp.ones(()), "weak type was True, is False"),
    "a number": ((ones, 1), (ones, 2), "1: was the static 1, is the static 2"),
    "a number for an array": (
        (ones, jnp.asarray(2.0)),
        (ones, 2.0),
        "1: was an array (~float64[]), is the static 2.0",
    ),
    "an array for a number": (
        {"n": 2},
        {"n": jnp.asarray(2)},
        "n: was the static 2, is an array (~int64[])",
    ),
    "not a number": ((ones, np.nan), (ones, float("nan")), "1: is another static nan"),
    "a string": ({"m": "a"}, {"m": "b"}, "m: was 'a', is 'b'"),
    "a function": ((ones, jnp.sin), (ones, jnp.cos), "1: was `sin`, is `cos`"),
    "a lambda": (lambda: 1, lambda: 2, "is another `<lambda>` than before"),
    "nothing": ((ones, None), (ones, ones), "1: was None, is an array (float64[3])"),
    "an absent key": (
        {"a": ones, "b": ones},
        {"a": ones},
        "b: was an array (float64[3]), is absent",
    ),
    "a new key": ({"a": ones}, {"a": ones, "c": 2}, "c: was absent, is the static 2"),
    "longer": ([ones], [ones, ones], "1: was absent, is an array (float64[3])"),
    "a list for a tuple": (
        {"l": [ones]},
        {"l": (ones,)},
        "l: was a `list`, is a `tuple`",
    ),
    "another class": (line(), gaussian(), "was a `Line`, is a `Gaussian`"),
    "a static field": (
        [Static("a")],
        [Static(("b",))],
        "0.value: static, was 'a', is ('b',)",
    ),
    "a static field within": (
        zoo(),
        dataclasses.replace(zoo(), name="ark"),
        "name: static, was 'zoo', is 'ark'",
    ),
    "a node of one's own": (
        (Own(ones, "a"),),
        (Own(ones, "b"),),
        "0: its structure was 'a', is 'b'",
    ),
    "minibatches": (
        vn.Minibatches(line_batch(), 4, key=jax.random.key(0)),
        vn.Minibatches(line_batch(), 5, key=jax.random.key(0)),
        "size: static, was 4, is 5",
    ),
    "a key of the old kind": (
        jax.random.key(0),
        jax.random.PRNGKey(0),
        "shape was (), is (2,)",
    ),
    "committed": (ones, jax.device_put(ones, jax.devices()[0]), "sharding was left to"),
    "a mesh": (
        jax.device_put(ones, jax.devices()[0]),
        jax.device_put(ones, spread),
        "sharding was SingleDevice",
    ),
    "the same mesh": (
        jax.device_put(ones, spread),
        jax.device_put(ones, NamedSharding(mesh, PartitionSpec())),
        None,
    ),
}
"""Two trees, and the start of a line that must be told: none if nothing compiles."""

compilations = []
COMPILED = "/jax/core/compile/backend_compile_duration"
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compilations.append(event) if event == COMPILED else None
)


@pytest.mark.seams
@pytest.mark.parametrize("name", TREES)
def test_a_function_compiles_anew_exactly_if_a_difference_is_told(name):
    @eqx.filter_jit
    def fn(tree):
        return [
            2 * leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)
        ]

    old, new, line = TREES[name]
    told = vn.explain_retrace(old, new)
    fn(old)
    before = len(compilations)
    fn(old)
    assert len(compilations) == before
    fn(new)
    compiled = len(compilations) > before
    assert compiled is not told.startswith("Nothing differs")
    lines = told.split("\n")
    assert any(t.startswith(line) for t in lines) if line else not compiled


def test_all_differences_are_told_a_line_each():
    old = {"a": ones, "b": (1, jnp.zeros(2)), "c": line()}
    new = {"a": jnp.ones(2), "b": (2, jnp.zeros(2)), "c": line(dtype=jnp.float32)}
    assert vn.explain_retrace(old, new).split("\n") == [
        "a: shape was (3,), is (2,)",
        "b.0: was the static 1, is the static 2",
        "c.slope: dtype was float64, is float32",
        "c.offset: dtype was float64, is float32",
    ]


def test_a_class_that_was_defined_anew_is_told():
    def define():
        class Fit(vn.Trainer):
            def loss(self, model, batch):
                return jnp.sum(model.slope**2)

        return Fit

    told = vn.explain_retrace(*(define()(line(), optax.sgd(0.1)) for _ in range(2)))
    assert told == "is another `Fit` than before"


def test_a_list_that_contains_itself_is_told():
    def holding(number):
        loop = [number]
        loop.append(loop)
        return fitted(model=net(activation=lambda x: x * loop[0]))

    told = vn.explain_retrace(holding(1), holding(2))
    line = "model.activation: loop.0 of `<lambda>` was 1, is 2"
    assert line in told.split("\n")


def test_a_projector_is_told():
    batch = gaussian_batch()
    old = GaussianFit(gaussian(), optax.sgd(0.1)).whiten(batch)
    new = GaussianFit(gaussian(), optax.sgd(0.1))
    told = vn.explain_retrace(old, new)
    assert "projector: was a `EigenProjector`, is None" in told
    moved = old.reproject(old.projector)
    assert vn.explain_retrace(old, moved).startswith("Nothing differs")


def test_the_loss_of_the_one_liner_is_told():
    def fit(power):
        loss = lambda model, batch: jnp.sum(model(batch[0]) ** power)
        run = vn.fit(loss, line(), optax.sgd(0.1), line_batch(), 1)
        return run.trainer

    assert vn.explain_retrace(fit(2), fit(2)).startswith("Nothing differs")
    assert (
        vn.explain_retrace(fit(2), fit(4))
        == "function: power of `<lambda>` was 2, is 4"
    )


def test_no_array_is_compared_by_value():
    """Nor is one waited for, or copied."""
    trainer = LineFit(line(), optax.adam(0.1))
    shapes = jax.eval_shape(lambda: trainer)
    assert "array" in vn.explain_retrace(trainer, shapes)
    jax.jit(lambda t: vn.explain_retrace(t, t) and 0)(trainer)

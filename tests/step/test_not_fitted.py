"""Which numbers of a model are parameters, and how the others are seen."""

import collections
import dataclasses
import enum
import functools
import logging
import math
import threading
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import vernal as vn
from models import Gaussian, GaussianFit, Positive, gaussian_batch

FLOATS = {
    "np.mean": np.mean(np.asarray([1.0, 2.0])),
    "np.float64": np.float64(1.5),
    "np.float32": np.float32(1.5),
    "np.float16": np.float16(1.5),
    "bfloat16": jnp.bfloat16(1.5).dtype.type(1.5),
    "0-d array of NumPy": np.asarray(1.5),
    "array of NumPy": np.asarray([1.5, 1.5]),
    "array": jnp.asarray(1.5),
}
COMPLEX = {
    "np.complex128": np.complex128(1.5),
    "np.complex64": np.complex64(1.5),
    "complex array": jnp.asarray(1.5 + 0j),
}


class Flavour(enum.IntEnum):
    """A choice, rather than a number."""

    ONE = 1


# What is listed of each, and what it says of it.
UNFITTED = {
    "Python float": (1.5, "frozen (a Python float)"),
    "Python complex": (1.5j, "frozen (a Python complex)"),
    "int32": (jnp.asarray(3, jnp.int32), "not fitted (int32)"),
    "int64, one element": (jnp.asarray([3], jnp.int64), "not fitted (int64)"),
    "uint8 of NumPy": (np.asarray(3, np.uint8), "not fitted (uint8)"),
    "many integers": (jnp.arange(3, dtype=jnp.int32), "not fitted (int32)"),
    "sixteen, unsigned": (np.ones((4, 4), np.uint8), "not fitted (uint8)"),
    "uint32": (jnp.ones(3, jnp.uint32), "not fitted (uint32)"),
    "Python int": (3, "not fitted (a Python int)"),
    "a long Python int": (-(10**15), "not fitted (a Python int)"),
    "np.int64": (np.int64(3), "not fitted (int64)"),
    "frozen array": (jnp.ones(2), "frozen"),
    "np.float32": (np.float32(1.5), "frozen"),
    "np.longdouble": (np.longdouble(1.5), f"not fitted ({np.dtype(np.longdouble)})"),
}
UNLISTED = {
    "integer of more bits": 10**400,
    "bool": True,
    "booleans": jnp.ones(3, bool),
    "enumeration": Flavour.ONE,
    "np.bool_": np.bool_(True),
    "string": "text",
    "function": jnp.sin,
    "key": jax.random.key(0),
    "key of old": jax.random.PRNGKey(0),
    "keys of old": jax.random.split(jax.random.PRNGKey(0), 3),
    "labels": jnp.arange(17),
    "no integers": jnp.zeros(0, int),
    "nothing": None,
}


class Decay(eqx.Module):
    """A number that is a parameter beside what may be one."""

    rate: jax.Array
    nested: dict

    def __call__(self, x):
        return self.rate * x


class Pull(vn.Trainer):
    def loss(self, model, batch):
        parts = (jnp.abs(x - batch).sum() for x in jax.tree.leaves(model.nested))
        return sum(part.astype(float) for part in parts) + model.rate**2


def decay(value):
    return Decay(jnp.asarray(2.0), {"x": value, "none": None})


@pytest.mark.parametrize("name", [*FLOATS, *COMPLEX])
def test_scalars_of_numpy_are_parameters_as_arrays_are(name):
    value = (FLOATS | COMPLEX)[name]
    model = decay(value)
    assert vn.paths(model) == ("rate", "nested.x")
    chosen, rest = vn.split(model, "nested")
    assert chosen.nested["x"] is value
    assert rest.nested["x"] is None
    # By a node, by a glob, by default; and as the whole model.
    everything = optax.sgd(0.5)
    for optimiser in (
        everything,
        vn.ParamOptimiser({"nested": everything}),
        vn.ParamOptimiser({"**": everything}, strict=True),
        vn.ParamOptimiser({lambda path, leaf: leaf.ndim <= 1: everything}),
        vn.ParamOptimiser({"rate": None}, default=everything),
    ):
        trainer = Pull(model, optimiser)
        (own,) = jax.tree.leaves(trainer.params.nested)
        assert isinstance(own, jax.Array)
        assert own.dtype == value.dtype
        assert own.shape == value.shape
    with pytest.raises(ValueError, match=r"'nested\.x' has no rule"):
        vn.ParamOptimiser({"rate": everything}, strict=True).owners(model)


def test_scalars_of_numpy_move_as_arrays_do():
    model = Decay(jnp.asarray(2.0), FLOATS | COMPLEX)
    rules = vn.ParamOptimiser({"rate": None}, default=optax.sgd(0.5))
    trainer, _ = Pull(model, rules).step(0.0)
    for name, value in (FLOATS | COMPLEX).items():
        moved = trainer.model.nested[name]
        assert moved.dtype == value.dtype, name
        np.testing.assert_allclose(moved, 1.0, err_msg=name)


def test_a_fit_from_scalars_is_that_from_arrays():
    values = (0.3, np.float64(1.2), np.asarray([0.8]).mean())
    fit = lambda model: GaussianFit(model, optax.adam(0.1)).fit(gaussian_batch(), 5)
    one = fit(Gaussian(*map(np.float64, values)))
    other = fit(Gaussian(*map(jnp.asarray, values)))
    assert (one.history.loss == other.history.loss).all()
    assert one.history.loss[-1] < one.history.loss[0]


def test_a_frozen_scalar_is_no_part_of_the_program():
    class Fit(vn.Trainer):
        def loss(self, model, batch):
            traces.append(model.nested["x"])
            return (model.rate - model.nested["x"]) ** 2

    counts, traces = [], []
    for value in (np.float64(1.0), np.float64(3.0)):
        trainer, _ = Fit(decay(value), optax.sgd(0.5), train="rate").step(0.0)
        np.testing.assert_allclose(trainer.model.rate, value)
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


def test_integers_of_numpy_may_be_sizes():
    class Fit(vn.Trainer):
        def loss(self, model, batch):
            return jnp.sum((jnp.ones(model.nested["x"]) - model.rate) ** 2)

    _trainer, info = Fit(decay(np.int64(3)), optax.sgd(0.1), train="rate").step(0.0)
    np.testing.assert_allclose(info.loss, 3.0)


def test_strict_objects_to_a_python_float():
    rules = {"rate": optax.sgd(0.1)}
    with pytest.raises(ValueError, match=r"'nested\.x', a Python float, has no rule"):
        Pull(decay(1.5), vn.ParamOptimiser(rules, strict=True))
    # A glob is not its own name.
    with pytest.raises(ValueError, match="a Python float"):
        Pull(decay(1.5), vn.ParamOptimiser({**rules, "**": None}, strict=True))
    for rule in (None, optax.sgd(0.1)):
        exact = vn.ParamOptimiser({**rules, "nested.x": rule}, strict=True)
        assert len(jax.tree.leaves(Pull(decay(1.5), exact).params)) == 1 + bool(rule)
    lax = Pull(decay(1.5), vn.ParamOptimiser(rules))
    assert lax.model.nested["x"] == 1.5
    assert type(lax.model.nested["x"]) is float


def listed(model):
    """What each of the three tables says of `nested.x`."""
    optimiser = vn.ParamOptimiser({"rate": optax.sgd(0.1)})
    trainer = Pull(model, optimiser)
    tables = optimiser.summary(model), str(trainer), trainer.table()
    rows = [[r for r in t.splitlines() if r.startswith("nested.x")] for t in tables]
    assert all("rate" in table for table in tables)
    return [row[0] if row else None for row in rows]


@pytest.mark.parametrize("name", UNFITTED)
def test_what_is_not_fitted_is_listed(name):
    value, told = UNFITTED[name]
    for row in listed(decay(value)):
        assert row is not None
        assert row.rstrip().endswith(f"  {told}")


@pytest.mark.parametrize("name", UNLISTED)
def test_what_is_no_number_to_fit_is_not_listed(name):
    assert listed(decay(UNLISTED[name])) == [None, None, None]


# Single integers

SINGLE = {
    "array": lambda: jnp.array(70),
    "int16 of NumPy": lambda: np.array(70, np.int16),
    "np.int64": lambda: np.int64(70),
}
MEANT = {
    "Python int": 70,
    "unsigned": np.uint8(70),
    "boolean": jnp.array(True),
    "key": jax.random.PRNGKey(0),
    "a list": jnp.array([70]),
    "a span of time": np.timedelta64(70, "s"),
    "float": jnp.array(70.0),
}
DEFAULT = vn.ParamOptimiser({"rate": optax.sgd(0.1)}, default=optax.sgd(0.1))
HELD = vn.ParamOptimiser({"**": None, "rate": optax.sgd(0.1)}, default=optax.sgd(0.1))
ONLY = vn.ParamOptimiser({"rate": optax.sgd(0.1)})
STRICT = vn.ParamOptimiser({"rate": optax.sgd(0.1)}, strict=True)


def pull():
    """A class of its own, which nothing was told of."""
    return type("Pulled", (Pull,), {})


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("optimiser", [None, optax.sgd(0.1), DEFAULT])
def test_a_single_integer_is_told_once(name, optimiser):
    kind = pull()
    told = (
        r"`model`: 'nested\.x' is not fitted: integers are constants.*jnp.array\(70.0"
    )
    with pytest.warns(UserWarning, match=told) as seen:
        made_twice(kind, SINGLE[name], optimiser)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def made_twice(kind, value, optimiser):
    trainer = kind(decay(value()), optimiser)
    kind(decay(value()), optimiser)
    trainer.replace(model=decay(value()))


def test_all_single_integers_are_in_one_warning():
    model = Decay(jnp.asarray(2.0), [np.int64(1)] * 7)
    with pytest.warns(UserWarning, match=r"'nested\.4', \.\.\. are not fitted") as seen:
        pull()(model)
    assert len(seen) == 1


@pytest.mark.parametrize("name", MEANT)
def test_what_is_meant_as_it_is_is_not_told(name):
    pull()(decay(MEANT[name]))


# Objects that JAX does not look into


class Plain:
    def __init__(self, value):
        self.value = value

    def method(self):
        return self.value


class Slotted:
    __slots__ = ("empty", "value")

    def __init__(self, value):
        self.value = value


class Careful(Plain):
    """Objects of the user whose attributes are not to be computed."""

    @property
    def large(self):
        pytest.fail("a property was asked for")


class MyDict(dict):
    pass


class MyTuple(tuple):
    pass


def circle(value):
    one = Plain(value)
    one.other = [Plain(one), one]
    return one


ARRAY = jnp.array(1.0)
Line = dataclasses.make_dataclass("Line", ["value", "name"], namespace={})
MODULE = r"make it an `eqx\.Module`, or register"
OPAQUE = {
    "dataclass": (Line(ARRAY, "a"), "Line", MODULE),
    "nested": (Line({"a": [jnp.ones(3)]}, "a"), "Line", MODULE),
    "object": (Plain(ARRAY), "Plain", MODULE),
    "object in objects": (Plain([Plain({1: ARRAY, "a": 2.0})]), "Plain", MODULE),
    "module in an object": (Plain(Decay(ARRAY, {})), "Plain", MODULE),
    "circle": (Plain([circle("a"), circle(ARRAY)]), "Plain", MODULE),
    "slots": (Slotted(ARRAY), "Slotted", MODULE),
    "properties": (Careful(ARRAY), "Careful", MODULE),
    "bound method": (Plain(ARRAY).method, "Plain", MODULE),
    "method of a module": (Decay(ARRAY, {}).__call__, "method", "give its module"),
    "dictionary": (MyDict(a=ARRAY), "MyDict", "make it a `dict`"),
    "proxy": (types.MappingProxyType({"a": ARRAY}), "mappingproxy", "make it a `dict`"),
    "tuple": (MyTuple([ARRAY]), "MyTuple", "make it a `list`"),
    "queue": (collections.deque([ARRAY]), "deque", "make it a `list`"),
    "set": (frozenset([Plain(ARRAY)]), "frozenset", MODULE),
    "array of objects": (
        np.array([ARRAY, None], object),
        "ndarray",
        "make it a `list`",
    ),
    "partial": (
        functools.partial(max, ARRAY),
        "partial",
        r"make it a `jax\.tree_util\.Partial`",
    ),
}
CLEAR = {
    "constants": Line(1.0, "a"),
    "table of NumPy": Plain(np.ones(3)),
    "indices": Plain(jnp.arange(3)),
    "keys of any kind": Plain({1: "x", "a": 2.0}),
    "function": lambda x: x,
    "module": eqx.nn.Linear(2, 1, key=jax.random.key(0)),
    "closure": lambda x: x * ARRAY,
    "partial": functools.partial(max, 1.0),
    "partial of JAX": jax.tree_util.Partial(max, jnp.ones(3)),
    "compiled": jax.jit(lambda x: x * ARRAY),
    "transformation": optax.adam(0.1),
    "logger": logging.getLogger("a"),
    "lock": threading.Lock(),
    "Python's module": Plain(math),
    "class": type("Constant", (), {"value": ARRAY}),
    "circle": circle(1.0),
    "dictionary": MyDict(a=1.0),
    "array of objects": np.array([1.0, None], object),
    "many": Plain([*range(10**6), ARRAY, *range(10**6)]),
}


@pytest.mark.parametrize("name", OPAQUE)
@pytest.mark.parametrize("optimiser", [None, DEFAULT])
def test_arrays_that_jax_does_not_see_are_told_once(name, optimiser):
    kind, (value, of, remedy) = pull(), OPAQUE[name]
    told = rf"the arrays in 'nested\.x' are not fitted: .* `{of}`.*, {remedy}"
    with pytest.warns(UserWarning, match=told) as seen:
        made_twice(kind, lambda: value, optimiser)
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("name", [name for name in OPAQUE if name[:5] != "array"])
def test_arrays_that_jax_does_not_see_do_not_make_a_model(name):
    value, of, remedy = OPAQUE[name]
    told = f"no array of floats .* does not look into .*`{of}`: {remedy}"
    with pytest.raises(ValueError, match=told):
        pull()(value)


@pytest.mark.parametrize("name", CLEAR)
def test_objects_without_such_arrays_are_not_told(name):
    pull()(decay(CLEAR[name]))


@pytest.mark.parametrize(
    "options", [{"optimiser": x} for x in (HELD, ONLY, STRICT)] + [{"train": "rate"}]
)
def test_what_rules_or_train_leave_out_is_not_told(options):
    for value in np.int64(70), jnp.array(70), Plain(ARRAY):
        pull()(decay(value), **options)


# print(trainer)


def test_print_says_what_happens_to_each():
    model = {"a": jnp.ones(3), "b": np.float64(0.5), "c": 2.0, "d": jnp.asarray(1)}
    rules = {("a", "b"): optax.adam(0.1)}

    class Fit(vn.Trainer):
        def loss(self, model, batch):
            return jnp.sum(model["a"] ** 2) + model["b"] ** 2

    trainer = Fit(model, vn.ParamOptimiser(rules))
    assert str(trainer).splitlines() == [
        "Fit(dict, 2 parameters, 4 numbers, step_count=0, best_loss=inf)",
        "parameter  value",
        "─────────  ──────────  ───────────────────────",
        "a          float64[3]  trained by a, b",
        "b          0.5         trained by a, b",
        "c          2           frozen (a Python float)",
        "d          1           not fitted (int64)",
    ]
    trainer, _ = trainer.step(0.0)
    line = "Fit(dict, 2 parameters, 4 numbers, step_count=1, best_loss=3.25)"
    assert repr(trainer) == line


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((), ()), "2 parameters, step"),
        (((100, 137), (3,)), "2 parameters, 13,703 numbers, step"),
        (((0,),), "1 parameter, 0 numbers, step"),
    ],
)
def test_numbers_are_counted_where_they_are_not_the_parameters(shapes, said):
    make = lambda: Pull([jnp.ones(shape) for shape in shapes], optax.adam(0.1))
    assert said in repr(make())
    stacked = eqx.filter_vmap(make, axis_size=2)()
    assert said.replace("step", "2 members, step") in repr(stacked)


def test_print_shows_bounds_ties_and_priors():
    class Fit(vn.Trainer):
        def nll(self, model, batch):
            return jnp.sum(model["a"] ** 2)

    names = {"b": 0.5, "c": 1.0, "d": 2.0}
    trainer = Fit(
        {"a": jnp.ones(3), **{name: jnp.array(x) for name, x in names.items()}},
        train=("a", "b", "c"),
        bounds={"a": (jnp.zeros(3), None), "b": (0, 1), "c": Positive()},
        ties={"d": "b"},
        priors={"b": vn.Normal(0.4, 0.1), "c": dist.Gamma(2.0, 1.0)},
    )
    assert [line.split("  ")[-1].strip() for line in str(trainer).splitlines()[3:]] == [
        "trained, within (float64[3], inf)",
        "trained, within (0, 1), prior 0.4 ± 0.1",
        "trained, by Positive, prior Gamma",
        "tied to b",
    ]


def deleted(trainer):
    for leaf in jax.tree.leaves(trainer._progress):
        leaf.delete()
    return trainer


STATES = {
    "solver alone": lambda t: type(t)(t.model),
    "a leaf": lambda t: type(t)(jnp.asarray(1.0)),
    "deleted": lambda t: deleted(t.replace(model=jax.tree.map(jnp.copy, t.model))),
    "filtered": lambda t: eqx.filter(t, lambda _: False),
    "shapes": lambda t: jax.eval_shape(lambda: t),
    "tuples": lambda t: jax.tree.map(lambda x: x.shape, t),
    "half made": lambda t: object.__new__(type(t)),
    "many leaves": lambda t: type(t)({str(n): jnp.ones(2) for n in range(1000)}),
}


@pytest.mark.parametrize("name", STATES)
def test_a_trainer_can_always_be_printed(name):
    trainer = Pull(decay(np.float64(1.0)), vn.ParamOptimiser({"**": optax.adam(0.1)}))
    odd = STATES[name](trainer)
    assert repr(odd).startswith("Pull(")
    assert len(repr(odd)) < 100
    assert str(odd).startswith(repr(odd))
    assert len(str(odd).splitlines()) < 80


def test_a_stacked_trainer_and_a_traced_one_can_be_printed():
    make = lambda x: Pull(Decay(x, {"x": x}), optax.adam(0.1))
    stacked = eqx.filter_vmap(make)(jnp.arange(3.0))
    assert "2 parameters, 3 members" in repr(stacked)
    assert "rate       float64[3]  trained" in str(stacked)
    told = []
    eqx.filter_jit(lambda t: told.extend((str(t), repr(t))))(make(jnp.asarray(1.0)))
    assert all("step_count=int32[]" in text for text in told)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(2459012.39), "2459012.39"),
        (np.float32(2459012.39), "2459012.5"),
        (np.float64(1e12), "1e+12"),
        (np.float64(1e-20), "1e-20"),
        (np.float64(1234.5678), "1234.57"),
        (np.float64(np.inf), "inf"),
    ],
)
def test_print_shows_the_digits_of_large_numbers(value, expected):
    lines = str(Pull(decay(value), ONLY)).splitlines()
    row = next(line for line in lines if line.startswith("nested.x"))
    assert row.split()[:2] == ["nested.x", expected]

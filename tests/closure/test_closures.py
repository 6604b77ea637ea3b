import copy
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest

from vernal._closure.closure import Closure

pytestmark = pytest.mark.seams

RATES = frozenset({"learning_rate"})


def holding(value):
    def fn():
        return value

    return fn


def same(a, b):
    return Closure.encode(a).skeleton is Closure.encode(b).skeleton


@pytest.mark.parametrize(
    "value",
    [
        1,
        1.0,
        True,
        -0.0,
        math.nan,
        1j,
        "a",
        None,
        (1, (2.0, "b")),
        [1, 2],
        {"a": [1], 2: {3}},
        frozenset({1}),
        np.arange(3),
        np.float32(math.nan),
        jnp.float32,
        len,
        slice(1, 2),
    ],
    ids=repr,
)
def test_round_trip_and_equality_by_value(value):
    closure = Closure.encode(holding(value))
    assert closure.leaves == ()
    assert repr(closure.decode()()) == repr(value)
    assert same(holding(value), holding(copy.deepcopy(value))) or value == slice(1, 2)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ((1,), (1.0,)),
        ((1,), [1]),
        ([1], [True]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1: 0}, {True: 0}),
        ({1}, {1.0}),
        (np.float32(1), np.float64(1)),
        (np.arange(3), np.arange(3.0)),
        (np.zeros((1, 2)), np.zeros((2, 1))),
        (eqx.nn.Lambda(jnp.sin), eqx.nn.Lambda(jnp.cos)),
    ],
)
def test_different_values_never_share(a, b):
    assert not same(holding(a), holding(b))


def test_arrays_are_leaves_and_skeletons_are_interned():
    a, b = (Closure.encode(holding(jnp.arange(n))) for n in (2.0, 3.0))
    assert a.skeleton is b.skeleton
    assert a.decode()().shape == (2,)
    assert b.decode()().shape == (3,)
    assert copy.deepcopy(a).skeleton is a.skeleton
    assert "fn" in repr(a)


def test_rates_are_weak_leaves_by_name():
    def make(learning_rate, beta):
        options = {"learning_rate": learning_rate, "beta": beta}
        return lambda: (learning_rate, beta, options)

    closure = Closure.encode(make(0.1, 0.9), RATES)
    assert [x.weak_type for x in closure.leaves] == [True, True]
    rate, beta, options = (
        jax.jit(lambda c: c.decode()()[0] * jnp.ones(2, "bfloat16"))(closure),
        *closure.decode()()[1:],
    )
    assert rate.dtype == jnp.bfloat16
    assert isinstance(beta, float)
    assert isinstance(options["beta"], float)
    for other, equal in ((make(0.2, 0.9), True), (make(0.1, 0.8), False)):
        assert (Closure.encode(other, RATES).skeleton == closure.skeleton) is equal
    # An integer may be a count, and another package's function may look at a rate.
    assert Closure.encode(make(1, 0.9), RATES).leaves == ()
    assert Closure.encode(make(0.1, 0.9), RATES, within=("optax",)).leaves == ()


def test_shared_cells_are_one_leaf():
    array = jnp.ones(3)
    pair = (lambda: array), (lambda: array + 1)
    closure = Closure.encode(pair)
    assert len(closure.leaves) == 1
    first, second = closure.decode()
    assert first.__closure__[0] is second.__closure__[0]


def test_self_reference():
    def make(scale):
        def power(n):
            return 1.0 if n == 0 else scale * power(n - 1)

        return power

    closure = Closure.encode(make(jnp.asarray(2.0)))
    assert closure.decode()(5) == 32
    assert closure.skeleton is Closure.encode(make(jnp.asarray(3.0))).skeleton


def test_metadata_defaults_and_attributes():
    def make(a):
        def named(x, y=a, *, z: int = 4):
            """Adds."""
            return x + y + z

        named.tag = [a]
        return named

    fn = make(2)
    again = Closure.encode(fn).decode()
    for name in ("name", "qualname", "doc", "module", "kwdefaults", "annotations"):
        assert getattr(again, f"__{name}__") == getattr(fn, f"__{name}__")
    assert again.__dict__ == {"tag": [2]}
    assert again(1) == 7
    assert not same(make(2), make(3))
    assert same(make(2), make(2))
    assert not same(functools.wraps(fn)(holding(1)), holding(1))


def test_plain_functions_decode_to_themselves():
    def plain(x):
        return x

    assert Closure.encode(plain).decode() is plain
    jitted = jax.jit(plain)
    assert Closure.encode(jitted).decode() is jitted
    assert not same(holding(jax.jit(lambda x: x)), holding(jax.jit(lambda x: x)))


def test_methods_partials_and_modules():
    class Model(eqx.Module):
        weight: jax.Array
        power: int = eqx.field(static=True)

        def __call__(self, x):
            return self.weight * x**self.power

        def call(self, x):
            return self(x)

    def objects(weight, power):
        model = Model(jnp.asarray(weight), power)
        return [
            model,
            model.call,
            functools.partial(lambda m, x: m(x), model),
            jtu.Partial(lambda x, *, m: m(x), m=model),
            holding(model)(),
        ]

    for a, b, c in zip(objects(2.0, 2), objects(3.0, 2), objects(2.0, 3), strict=True):
        closure = Closure.encode(a)
        assert closure.decode()(3) == 18
        assert closure.skeleton is Closure.encode(b).skeleton
        assert closure.skeleton != Closure.encode(c).skeleton


def test_what_may_change_unseen_is_shared_until_it_does():
    """A configuration object is the same when its contents are not."""

    class Configuration:
        rate = 0.1

    config = Configuration()
    before = Closure.encode(holding(config))
    assert same(before.decode(), holding(config))
    config.rate = 0.2
    assert Closure.encode(holding(config)).skeleton != before.skeleton
    # Nor where a helper reads it, or a number that has changed since.
    scope = {"__name__": "user", "weight": 3.0, "config": None}
    exec("def helper(x):\n    return weight * x", scope)
    exec("def make():\n    return lambda x: helper(x)", scope)
    first = scope["make"]()
    assert same(first, scope["make"]())
    before = Closure.encode(first)
    scope["weight"] = 10.0
    assert Closure.encode(scope["make"]()).skeleton != before.skeleton


def test_containers_are_kept_by_value():
    loop = [1]
    loop.append(loop)
    assert same(holding(loop), holding(loop))


def test_what_is_compiled_does_not_follow_later_changes():
    config, data = {"a": [1]}, np.zeros(2)
    before = Closure.encode(holding((config, data)))
    config["a"][0] = 2
    data[0] = 1
    assert not same(holding((config, data)), before.decode())
    assert before.decode()()[0] == {"a": [1]}
    assert before.decode()()[1][0] == 0


@jtu.register_pytree_node_class
class Node:
    """A node of a library, whose static data may be containers."""

    def __init__(self, data, *parts):
        self.data, self.parts = data, parts

    def tree_flatten(self):
        return self.parts, ("data", self.data)

    @classmethod
    def tree_unflatten(cls, static, parts):
        return cls(static[1], *parts)


@pytest.mark.parametrize("parts", [(), (jnp.zeros(2),)], ids=["childless", "parent"])
@pytest.mark.parametrize(
    ("make", "other"),
    [
        (dict, {"a": 1}),
        (lambda: {"a": [1]}, {"a": [2]}),
        (lambda: {"a": 1}, {"a": 1.0}),
        (lambda: [{1}], [{2}]),
        (lambda: ("a", {}), ("a", [])),
        (lambda: "a", "b"),
    ],
    ids=["empty", "nested", "type", "set", "tuple", "text"],
)
def test_static_data_of_nodes_are_kept_by_value(make, other, parts):
    node = Node(make(), *parts)
    before = Closure.encode(node)
    assert same(node, Node(make(), *parts))
    assert not same(node, Node(other, *parts))
    if isinstance(node.data, dict | list):
        node.data.clear()
    decoded = before.decode()
    assert decoded.data == make()
    assert len(decoded.parts) == len(parts)


def test_static_data_that_hold_themselves_are_known_by_identity():
    loop = []
    loop.append(loop)
    node = Node(loop, jnp.zeros(2))
    assert same(node, node)
    assert not same(node, Node([], jnp.zeros(2)))


def test_what_a_function_writes_to_is_the_same_object():
    calls, count = [], 0

    def loss():
        nonlocal count
        count += 1
        calls.append(count)

    Closure.encode(loss).decode()()
    assert count == 1
    assert calls == [1]


def test_globals_are_compared_where_they_are_read():
    scope = {"weight": 1.0}
    source = "def make():\n    def f(): return [weight for _ in '1']\n    return f"
    exec(source, scope)
    first = scope["make"]()
    assert same(first, scope["make"]())
    before = Closure.encode(first)
    scope["weight"] = 2.0
    assert Closure.encode(scope["make"]()).skeleton != before.skeleton


def test_a_lambda_built_anew_compiles_nothing_anew():
    @jax.jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def run(closure, x):
        return closure.decode()(x)

    for scale in (1.0, 2.0):
        array = jnp.full(3, scale)
        out = run(Closure.encode(lambda x, a=array: jnp.sum(a * x)), 2.0)
        assert out == 6 * scale
    counted = eqx.debug.assert_max_traces(lambda x: x, max_traces=1)
    assert same(holding(counted), holding(counted))


def test_under_vmap():
    out = jax.vmap(lambda x: Closure.encode(holding(x)))(jnp.arange(3.0))
    found = jax.vmap(lambda c: c.decode()() + 1)(out)
    assert jnp.array_equal(found, jnp.arange(1.0, 4.0))


def test_the_norm_of_a_dogleg_is_itself():
    """It compares its norm by identity, and searches for a root with any other."""
    kept = Closure.encode(optx.Dogleg(1e-8, 1e-8)).decode()
    assert kept.descent.trust_region_norm is optx.two_norm

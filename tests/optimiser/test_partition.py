import functools
import importlib
import unittest
import warnings
from collections import OrderedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from marked import marked
from vernal._optimiser import groups as _groups
from vernal._optimiser.groups import make_groups, update_groups
from vernal._optimiser.transform import Transform

pytestmark = pytest.mark.loose_dtypes


class Layer(eqx.Module):
    weight: jax.Array
    bias: jax.Array | None
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return self.weight @ x + self.bias


PARAMS = {
    "z": Layer(jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), jnp.ones(2), "first"),
    "a": [jnp.linspace(0.2, 3.0, 4), Layer(jnp.ones((2, 2)), None, "second")],
    "masked": optax.MaskedNode(),
    "none": None,
    "s": jnp.asarray(0.5, jnp.float32),
}
LABELS = {
    "z": Layer("x", "y", "first"),
    "a": ["x", "y"],
    "masked": optax.MaskedNode(),
    "none": None,
    "s": "x",
}


def loss(params):
    return sum(jnp.sum(jnp.cos(x) ** 2 * 1.3) for x in jax.tree.leaves(params))


value_and_grad = jax.jit(jax.value_and_grad(loss))


def run(tx, params=PARAMS, steps=4, **extra):
    state = jax.jit(tx.init)(params)
    update = jax.jit(lambda *args, **kw: tx.update(*args, **kw, **extra))
    for _ in range(steps):
        value, grads = value_and_grad(params)
        updates, state = update(grads, state, params, value=value, grad=grads)
        params = optax.apply_updates(params, updates)
    return params, updates


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def biases(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: str(path[-1]).strip("[]'.").endswith("bias"), params
    )


TRANSFORMS = {
    "adam": lambda: optax.adam(1e-2),
    "global norm": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.sgd(1e-1, momentum=0.9)
    ),
    "lamb": lambda: optax.lamb(1e-2),
    "mask by shape": lambda: optax.adamw(1e-2, mask=matrices),
    "mask by path": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=biases),
    "polyak": lambda: optax.polyak_sgd(),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(1e-2),
    "schedule": lambda: optax.adam(optax.linear_schedule(0.1, 0.0, 3)),
    "finite": lambda: optax.apply_if_finite(optax.rmsprop(1e-2), 2),
    "nested": lambda: vn.partition({"q": optax.adam(1e-2)}, "q"),
}
# Such as sum over leaves, or not.
AS_FOR_USERS = ("adam", "global norm", "lamb")
AS_FOR_ALL = [name for name in TRANSFORMS if name not in AS_FOR_USERS]


@pytest.mark.parametrize(
    "name",
    [
        *marked(pytest.mark.seams, AS_FOR_ALL, "polyak", "inject", "finite"),
        *(pytest.param(name, marks=pytest.mark.as_compiled) for name in AS_FOR_USERS),
    ],
)
def test_agrees_with_optax_to_the_bit(name):
    labels = LABELS if name == "adam" else lambda _: LABELS
    transforms = {
        "x": TRANSFORMS[name](),
        "y": optax.sgd(3e-3, momentum=0.9),
        "unused": optax.sgd(1),
    }
    ours, theirs = (
        make(transforms, labels) for make in (vn.partition, optax.partition)
    )
    assert_same_bits(run(ours), run(theirs))


# A line search that compiles in a second, not in ten.
LBFGS = optax.lbfgs(memory_size=2, linesearch=optax.scale_by_backtracking_linesearch(5))


def test_one_group_with_a_line_search():
    ours, theirs = (make({"x": LBFGS}, "x") for make in (vn.partition, optax.partition))
    assert_same_bits(run(ours, value_fn=loss), run(theirs, value_fn=loss))


@pytest.mark.parametrize(
    "own", [pytest.param(("x", "y"), marks=pytest.mark.seams), ("y", "x")]
)
def test_a_line_search_on_a_part_of_the_model(own):
    params = {"p": jnp.asarray([1.0, 2.0]), "q": {"r": jnp.ones(3), "t": jnp.ones(1)}}

    def offset(params, shift):
        total = jnp.sum(params["p"]) + jnp.sum(params["q"]["r"])
        return (total - shift) ** 2 + jnp.sum(params["p"] ** 2)

    tx = vn.partition(
        {"x": LBFGS, "y": optax.set_to_zero()},
        {"p": own[0], "q": own[1]},
        mask_compatible_extra_args=True,
    )
    state = tx.init(params)
    before = offset(params, 3.0)

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(offset)(params, 3.0)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=offset, shift=3.0
        )
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        # Without weak types, so that the second step is the program of the first.
        params, state = step(*jax.tree.map(np.asarray, (params, state)))
    assert offset(params, 3.0) < 0.7 * before
    assert jnp.array_equal(params["q"]["t"], jnp.ones(1))


@pytest.mark.seams
def test_optax_own_tests(monkeypatch):
    pytest.importorskip("absl")
    combining = pytest.importorskip("optax.transforms._combining_test")
    monkeypatch.setattr(combining._combining, "partition", vn.partition)
    monkeypatch.setattr(optax, "partition", vn.partition)
    suite = unittest.defaultTestLoader.loadTestsFromModule(combining)
    result = unittest.TestResult()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        suite.run(result)
    assert result.testsRun > 10
    assert not result.errors + result.failures, result.errors + result.failures


@pytest.mark.seams
def test_optax_finds_parameters_in_the_state():
    importlib.import_module("optax.tree_utils")
    params = {"p": jnp.ones(2), "q": jnp.ones(3)}
    tx = vn.partition({"x": optax.adam(1.0)}, {"p": "x", "q": "x"})
    state = optax.tree_utils.tree_map_params(tx, lambda v: v + 1, tx.init(params))
    assert sum(jnp.sum(x) for x in jax.tree.leaves(state)) == 10
    assert optax.tree_utils.tree_get(state, "count") == 0


@pytest.mark.parametrize("flag", [True, False])
def test_extra_arguments_of_the_same_structure(flag):
    seen = []

    def update(updates, state, params=None, *, tags, scalar, **extra):
        seen.append((tags, scalar))
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda _: (), update)
    params = {"p": jnp.ones(2), "q": jnp.ones(3)}
    tx = vn.partition(
        {"x": spy, "y": optax.sgd(0.1)},
        {"p": "x", "q": "y"},
        mask_compatible_extra_args=flag,
    )
    tags = {"p": 1, "q": 2}
    tx.update(params, tx.init(params), tags=tags, scalar=3)
    assert seen == [({"p": 1} if flag else tags, 3)]


def test_leaves_are_seen_by_path_in_order():
    seen = []

    def init(params):
        seen.append(params)
        return ()

    spy = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
    vn.partition({"x": spy, "y": optax.sgd(0.1)}, LABELS).init(PARAMS)
    assert list(seen[0]) == ["a.0", "s", "z.weight"]
    assert isinstance(seen[0], OrderedDict)
    vn.partition({"x": spy}, "x").init({"a.b": jnp.ones(1), "a": {"b": jnp.ones(2)}})
    assert list(seen[1]) == ["['a']['b']", "['a.b']"]


@pytest.mark.seams
def test_a_callable_module_of_labels_is_a_tree():
    layer = Layer(jnp.ones((2, 2)), jnp.ones(2), "one")
    tx = vn.partition(
        {"x": optax.sgd(1.0), "y": optax.set_to_zero()}, Layer("x", "y", "one")
    )
    updates, _ = tx.update(layer, tx.init(layer), layer)
    assert jnp.array_equal(updates.weight, -layer.weight)
    assert not jnp.any(updates.bias)


def test_bound_methods_and_partials_of_labels_are_functions():
    class Labeller(eqx.Module):
        array: jax.Array

        def labels(self, params):
            return jax.tree.map(lambda _: "x", params)

    labels = Labeller(jnp.ones(1)).labels
    for fn in (labels, jax.tree_util.Partial(labels)):
        assert vn.partition({"x": optax.sgd(0.1)}, fn).init(PARAMS)


@pytest.mark.seams
def test_bare_array_and_empty_trees():
    tx = vn.partition({"x": optax.adam(0.1)}, "x")
    array = jnp.ones(3)
    updates, _ = tx.update(array, tx.init(array), array, value=jnp.asarray(1.0))
    assert updates.shape == (3,)
    for empty in ({}, (), None, {"a": None}):
        assert tx.update(empty, tx.init(empty), empty)[0] == empty


@pytest.mark.parametrize("size", [1, 2])
def test_a_configuration_of_the_shape_of_the_model_is_an_error(size):
    params = {"p": {"q": jnp.ones(2), "r": jnp.ones(2)}, "s": jnp.ones(2)}
    mask = {"p": {"q": True, "r": False}, "s": True}
    labels = {"p": {"q": "x", "r": "x" if size == 2 else "y"}, "s": "y"}
    tx = vn.partition(
        {"x": optax.add_decayed_weights(0.1, mask=mask), "y": optax.sgd(0.1)}, labels
    )
    with pytest.raises(ValueError, match=r"`p\.q`.*function of the parameters"):
        tx.init(params)
    by_path = {"p.q": True} if size == 1 else OrderedDict({"p.q": True, "p.r": False})
    tx = vn.partition(
        {"x": optax.add_decayed_weights(0.1, mask=by_path), "y": optax.sgd(0.1)}, labels
    )
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["p"]["q"], 1.1)


def test_errors():
    params = {"p": {"q": jnp.ones(2)}, "s": jnp.ones(2)}
    tx = vn.partition({"x": optax.adam(0.1)}, "x")
    with pytest.raises(TypeError, match=r"transforms\['x'\].*optax.sgd\(0.1\)"):
        vn.partition({"x": 0.1}, "x")
    with pytest.raises(ValueError, match=r"label 'n' of `p\.q`.*known labels are 'x'"):
        vn.partition({"x": optax.sgd(0.1)}, {"p": "n", "s": "x"}).init(params)
    with pytest.raises(ValueError, match=r"labels do not match.*`p\.q`"):
        vn.partition({"x": optax.sgd(0.1)}, {"s": "x"}).init(params)
    with pytest.raises(ValueError, match=r"different structures: `p\.q`"):
        tx.update({"s": params["s"]}, tx.init(params), params)
    with pytest.raises(ValueError, match="do not match"):
        tx.update({"s": params["s"]}, tx.init(params))


def test_errors_of_a_transformation_itself_are_left_alone():
    def fail(updates, state, params=None):
        raise ValueError("mine")

    tx = vn.partition({"x": optax.GradientTransformation(lambda _: (), fail)}, "x")
    with pytest.raises(ValueError, match="mine") as caught:
        tx.update(PARAMS, tx.init(PARAMS))
    assert str(caught.value) == "mine"


@pytest.mark.seams
def test_a_whole_model_as_parameters():
    model = {"p": jnp.ones(2), "activation": jax.nn.relu}
    grads = {"p": jnp.ones(2), "activation": None}
    tx = vn.partition({"x": optax.adamw(0.1)}, {"p": "x", "activation": None})
    updates, _ = tx.update(grads, tx.init(grads), model)
    assert updates["activation"] is None


@pytest.mark.seams
def test_rates_are_leaves_when_encoded():
    def make(rate):
        return Transform.of(
            vn.partition({"x": optax.adam(rate), "y": optax.sgd(0.1)}, LABELS), "tx"
        )

    assert make(0.1).closure.skeleton is make(0.2).closure.skeleton
    assert len(make(0.1).closure.leaves) == 2


def test_groups_by_name():
    transforms = (optax.sgd(1.0), optax.trace(0.5))
    leaves = {name: jnp.full(2, float(i)) for i, name in enumerate("acd")}
    groups = make_groups(transforms, (0, 1, 1), tuple(leaves))
    states = [group.init(leaves) for group in groups]
    asked = []

    def extra_of(members):
        asked.append(members)
        return {"ignored": 1}

    groups = make_groups(transforms, (0, 1, 1), tuple(leaves), states)
    updates, states = update_groups(groups, leaves, None, extra_of)
    assert asked == [("a",), ("c", "d")]
    assert {name: float(u[0]) for name, u in updates.items()} == {
        "a": 0,
        "c": 1,
        "d": 2,
    }
    assert list(states[1].trace) == ["c", "d"]


PAIRS = {"a": jnp.ones(3), "b": jnp.ones(3), "c": [jnp.ones(2)] * 2, "d": jnp.ones(3)}
PAIR_LABELS = {"a": "a", "b": "b", "c": ["c", "c"], "d": "d"}


def make_pairs(make, *, by):
    # All of one kind, but for the rate of one.
    rules = {label: make(0.2 if label == "d" else 0.1) for label in PAIRS}
    if by == "partition":
        return vn.partition(rules, PAIR_LABELS)
    return vn.ParamOptimiser(rules)


def program(tx, **extra):
    # The rates are arguments: constants are listed in the order that they are met in.
    rates, rest = eqx.partition(tx, eqx.is_array)

    def update(rates, grads, state, params):
        tx = eqx.combine(rates, rest)
        value = loss(params)
        return tx.update(grads, state, params, value=value, grad=grads, **extra)

    args = rates, PAIRS, tx.init(PAIRS), PAIRS
    traced = jax.jit(update).trace(*args)
    return traced.lower().as_text(), traced.out_info


@pytest.fixture
def traces(monkeypatch):
    """Appends to a list whenever Adam is traced."""
    seen = []
    update_moment = optax.tree.update_moment

    def spy(*args):
        seen.append(args)
        return update_moment(*args)

    monkeypatch.setattr(optax.tree, "update_moment", spy)
    return seen


SHARED = {
    "adam": optax.adam,
    "schedule": lambda rate: optax.adam(optax.cosine_decay_schedule(rate, 9)),
    "polyak": optax.polyak_sgd,
    "delay": lambda rate: optax.adam(vn.delay(rate, 2)),
    "global norm": lambda _: TRANSFORMS["global norm"](),
    "mask by path": lambda _: TRANSFORMS["mask by path"](),
    "inject": lambda _: TRANSFORMS["inject"](),
}


@pytest.mark.parametrize("by", ["partition", "rules"])
@pytest.mark.parametrize("name", marked(pytest.mark.seams, SHARED, "adam", "inject"))
def test_a_shared_trace_makes_the_same_program(name, by, monkeypatch):
    tx = make_pairs(SHARED[name], by=by)
    shared, shared_out = program(tx, value_fn=loss)
    monkeypatch.setattr(_groups, "_nameless", lambda *_: None)
    alone, alone_out = program(tx, value_fn=loss)
    assert shared == alone
    # With the paths in the structure of the state, and all types.
    assert jax.tree.structure(shared_out) == jax.tree.structure(alone_out)
    assert jax.tree.structure(shared_out[1]) == jax.tree.structure(tx.init(PAIRS))
    assert jax.tree.leaves(shared_out) == jax.tree.leaves(alone_out)


@pytest.mark.seams
def test_a_shared_window(monkeypatch):
    # Its branches are the same, but JAX prints them once where it met them once.
    tx = make_pairs(lambda rate: vn.window(optax.adam(rate), 1, 3), by="rules")
    shared = run(tx, PAIRS)
    monkeypatch.setattr(_groups, "_nameless", lambda *_: None)
    assert_same_bits(shared, run(tx, PAIRS))


@pytest.mark.seams
@pytest.mark.parametrize(("by", "least"), [("partition", 3), ("rules", 2)])
def test_groups_of_a_kind_are_traced_once(by, least, traces):
    # A float of Optax's own is a constant of the program, a rate of ours is a leaf.
    program(make_pairs(lambda rate: optax.adam(rate, b1=0.8), by=by), value_fn=loss)
    assert len(traces) == least


GROWING = {
    "adam": lambda: optax.adam(0.1, b1=0.7),
    "delay": lambda: optax.adam(vn.delay(0.1, 2), b1=0.7),
    "window": lambda: vn.window(optax.adam(0.1, b1=0.7), 1, 3),
}


@pytest.mark.parametrize("name", GROWING)
def test_traces_do_not_grow_with_the_groups(name, traces):
    # One trace of each shared update: JAX traces a window's branches twice.
    for count in (2, 20):
        traces.clear()
        params = {f"p{i}": jnp.asarray(1.0) for i in range(count)}
        tx = vn.ParamOptimiser({path: GROWING[name]() for path in params})
        jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        assert len(traces) <= (2 if name == "window" else 1)


def test_functions_of_the_user_see_the_paths():
    seen = []

    def mask(params):
        seen.append(list(params))
        return jax.tree.map(lambda _: True, params)

    @functools.wraps(optax.constant_schedule(0.1))
    def schedule(count):
        seen.append("schedule")
        return 0.1

    program(make_pairs(lambda _: optax.adamw(0.1, mask=mask), by="rules"))
    for own in (["a"], ["b"], ["c.0", "c.1"], ["d"]):
        # When the state is made, and in the update.
        assert seen.count(own) == 2
    seen.clear()
    program(make_pairs(lambda _: optax.sgd(schedule), by="partition"))
    assert len(seen) == len(PAIRS)


def test_an_error_in_a_shared_trace_has_the_path():
    tx = make_pairs(lambda rate: optax.adam(rate), by="partition")
    state = tx.init({**PAIRS, "a": [jnp.ones(3)]} | {"b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"`a` met trees that do not match"):
        jax.make_jaxpr(tx.update)(PAIRS, state, PAIRS)


@pytest.mark.parametrize("is_traced", [False, True])
def test_an_error_of_a_transformation_has_a_note_of_its_parameters(is_traced):
    """Some of Optax cannot take a parameter without axes, and do not say so."""

    tx = vn.ParamOptimiser({"a": optax.sm3(0.1), "b": optax.sgd(0.1)})
    params = {"a": jnp.asarray(1.0), "b": jnp.asarray(2.0)}
    update = jax.make_jaxpr(tx.update) if is_traced else tx.update
    with pytest.raises(IndexError) as caught:
        update(params, tx.init(params))
    assert "This is from the transformation of `a`." in caught.value.__notes__


def test_line_searches_of_many_groups():
    tx = vn.ParamOptimiser({"p": LBFGS, "q": LBFGS})
    params = {"p": jnp.asarray([0.3]), "q": jnp.asarray([0.4])}
    new, _ = run(tx, params, 3, value_fn=loss)
    assert loss(new) < 0.5 * loss(params)


def test_of_an_empty_tree_it_is_that_of_optax():
    rules, labels = {"x": optax.adam(0.1), "y": optax.sgd(0.1)}, {"a": "x"}
    state = vn.partition(rules, labels).init({})
    expected = optax.partition(rules, lambda tree: tree).init({})
    assert jax.tree.structure(state) == jax.tree.structure(expected)

"""Paths, selectors and `split`."""

import collections
import enum

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import vernal as vn
from models import ZOO_PATHS, Pair, line, zoo


def chosen(tree, selector):
    """The paths of what `selector` selects."""
    return vn.paths(vn.split(tree, selector)[0])


def test_paths_of_every_kind_of_node():
    assert vn.paths(zoo()) == ZOO_PATHS


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ((), ()),
        (None, ()),
        ({"a": None, "b": 1, "c": True, "d": "text"}, ()),
        (jnp.zeros(2), ("",)),
        ([1.0, (2.0, [jnp.ones(1)])], ("0", "1.0", "1.1.0")),
        ({1: jnp.ones(1), 2: [jnp.ones(1)]}, ("1", "2.0")),
        (Pair(jnp.ones(1), None), ("left",)),
        ({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, ("w",)),
        ({"w": jnp.ones(1, jnp.bfloat16), "n": np.float32(1)}, ("n", "w")),
        ({"k": jax.random.key(0), "w": jnp.ones(1)}, ("w",)),
    ],
)
def test_paths(tree, expected):
    assert vn.paths(tree) == expected


def test_paths_follow_the_order_of_the_leaves():
    tree = zoo()
    params = eqx.filter(tree, lambda x: eqx.is_inexact_array_like(x))
    values = {path: jax.tree.leaves(params)[i] for i, path in enumerate(vn.paths(tree))}
    assert values["layers.1.bias"] is tree.layers[1]["bias"]
    assert values["table.a.b"] is tree.table["a.b"]
    assert values["host"] is tree.host


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}},
        {"a.b": {"c": jnp.ones(1)}, "a": {"b.c": 1.0}},
    ],
)
def test_two_leaves_of_one_path(tree):
    for use in (vn.paths, lambda t: vn.split(t, "a")):
        with pytest.raises(ValueError, match=r"same path.*tree\[.*and tree\["):
            use(tree)


def test_a_collision_with_what_is_no_parameter_is_none():
    tree = {"a.b": jnp.ones(1), "a": {"b": jnp.asarray(1)}}
    assert vn.paths(tree) == ("a.b",)


W, B = ("layers.0.weight", "layers.1.weight"), ("layers.0.bias", "layers.1.bias")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("scalar", {"scalar"}),
        ("layers.0.weight", {"layers.0.weight"}),
        ("layers", {*W, *B}),
        ("layers.1", {"layers.1.weight", "layers.1.bias"}),
        ("table", {"table.a.c", "table.a.b"}),
        ("table.a", {"table.a.c"}),
        ("table.a.b", {"table.a.b"}),
        ("table.*", {"table.a.c", "table.a.b"}),
        ("table.a.*", {"table.a.c", "table.a.b"}),
        ("layers.*", {*W, *B}),
        ("layers.*.bias", set(B)),
        ("*.0.bias", {"layers.0.bias"}),
        ("**.bias", set(B)),
        ("**.weight", set(W)),
        ("layers.**", {*W, *B}),
        ("layers.**.bias", set(B)),
        ("**.layers.**.bias", set(B)),
        ("lay*.0.w*", {"layers.0.weight"}),
        ("*ight", None),
        ("pair.right", {"pair.right.0"}),
        ("**.0", {"layers.0.weight", "layers.0.bias", "pair.right.0"}),
        ("pair.*", {"pair.left", "pair.right.0"}),
        ("**", set(ZOO_PATHS) - {"number"}),
        ("*", set(ZOO_PATHS) - {"number"}),
        ("number", {"number"}),
        (("number", "scalar"), {"number", "scalar"}),
        (["scalar", ("wave", ["layers.*.bias"])], {"scalar", "wave", *B}),
        ("num*", None),
        (lambda path, leaf: leaf.ndim == 2, set(W)),
        (lambda path, leaf: path.endswith("bias"), set(B)),
        ((lambda path, leaf: leaf.ndim == 2, "scalar"), {*W, "scalar"}),
        (lambda path, leaf: np.bool_(path == "host"), {"host"}),
    ],
)
def test_what_a_selector_selects(selector, expected):
    if expected is None:
        with pytest.raises((vn.UnknownPathError, TypeError)):
            vn.split(zoo(), selector)
    else:
        assert set(chosen(zoo(), selector)) == expected


def test_a_predicate_is_asked_about_arrays_of_floats_only():
    asked = []
    vn.split(zoo(), lambda path, leaf: asked.append(path) is None)
    assert asked == [path for path in ZOO_PATHS if path != "number"]


def test_a_key_that_looks_like_a_glob_is_a_path():
    tree = {"a*": jnp.ones(1), "ab": jnp.ones(1), "**": jnp.ones(1)}
    assert chosen(tree, "a*") == ("a*",)
    assert chosen(tree, "**") == ("**",)


def test_an_empty_key_is_a_segment():
    tree = {"": {"y": jnp.ones(1), "": jnp.ones(1)}, "a": {"": jnp.ones(1)}}
    assert set(vn.paths(tree)) == {".y", ".", "a."}
    for glob, expected in {
        "*": {".y", ".", "a."},
        "**": {".y", ".", "a."},
        "*.*": {".y", ".", "a."},
        "**.y": {".y"},
        "*.y": {".y"},
        "a.*": {"a."},
        "a.**": {"a."},
        "*.": {".", "a."},
    }.items():
        assert set(chosen(tree, glob)) == expected, glob


def test_a_tree_that_is_one_array():
    assert vn.split(jnp.ones(2), "**")[1] is None
    assert vn.split(jnp.ones(2), "")[1] is None


def test_regular_expressions_have_no_meaning_in_a_glob():
    tree = {"a+b": jnp.ones(1), "aab": jnp.ones(1), "a\nb": jnp.ones(1)}
    assert set(chosen(tree, "a+*")) == {"a+b"}
    assert set(chosen(tree, "a*b")) == {"a+b", "aab", "a\nb"}


def owners(*rules):
    """Which rule owns each leaf of the zoo: rates tell them apart."""
    optimiser = vn.ParamOptimiser(dict.fromkeys(rules, optax.sgd(0.1)))
    return {
        path: None if owner is None else rules[owner]
        for path, owner in zip(
            (path for path, _ in leaves(zoo())), optimiser.owners(zoo()), strict=True
        )
    }


def leaves(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(k, simple=True, separator="."), v) for k, v in flat]


def is_weight(path, leaf):
    return path.endswith("weight")


# Each beats those to its right on `layers.0.weight`.
LADDER = (
    "layers.0.weight",
    "layers.0",
    "layers",
    "layers.0.*",
    "layers.*",
    "**",
    is_weight,
)


@pytest.mark.parametrize("winner", range(len(LADDER) - 1))
@pytest.mark.parametrize("backwards", [False, True])
def test_the_most_specific_wins(winner, backwards):
    rules = LADDER[winner:][:: -1 if backwards else 1]
    assert owners(*rules)["layers.0.weight"] == LADDER[winner]


def test_the_rest_of_a_node_stays_with_it():
    found = owners("layers", "layers.1", "layers.1.bias")
    assert {p: r for p, r in found.items() if r} == {
        "layers.0.weight": "layers",
        "layers.0.bias": "layers",
        "layers.1.weight": "layers.1",
        "layers.1.bias": "layers.1.bias",
    }


@pytest.mark.parametrize(
    ("rules", "leaf"),
    [
        (("*.0.bias", "layers.*.bias"), "layers.0.bias"),
        (("**.bias", "layers.**"), "layers.0.bias"),
        (("scalar", ("scalar", "wave")), "scalar"),
        ((is_weight, lambda path, leaf: leaf.ndim == 2), "layers.0.weight"),
        ((("layers.1", "scalar"), ("layers.1", "wave")), r"layers\.1\."),
    ],
)
def test_two_rules_as_specific_as_each_other(rules, leaf):
    with pytest.raises(ValueError, match=f"equally specific on '{leaf}") as error:
        owners(*rules)
    for rule in rules:
        for atom in rule if isinstance(rule, tuple) else (rule,):
            if isinstance(atom, str) and "*" in atom:
                assert repr(atom) in str(error.value)


def test_two_rules_that_name_a_parameter_are_shown_whole():
    words = r"the rules \('scalar', \('wave', is_weight\)\) and 'scalar' .*both name it"
    with pytest.raises(ValueError, match=words) as error:
        owners(("scalar", ("wave", is_weight)), "scalar")
    assert "exact path" not in str(error.value)


def test_equal_rules_apart_are_no_conflict():
    assert owners("*.0.bias", "layers.1.*")["layers.1.bias"] == "layers.1.*"


def test_a_conflict_that_a_third_rule_settles_is_none():
    found = owners("**.bias", "layers.**", "layers.0.bias", "layers.1.bias")
    assert found["layers.0.bias"] == "layers.0.bias"


@pytest.mark.own_words
@pytest.mark.parametrize(
    ("selector", "error", "match"),
    [
        ("scaler", vn.UnknownPathError, r"'scaler' matches nothing.*'scalar'"),
        ("layers.0.wieght", vn.UnknownPathError, r"'layers\.0\.weight'"),
        ("weight", vn.UnknownPathError, r"'layers\.0\.weight'"),
        ("optics.layers.0.bias", vn.UnknownPathError, r"'layers\.0\.bias'"),
        ("layers.2", vn.UnknownPathError, r"'layers\.[01]'"),
        ("", vn.UnknownPathError, "matches nothing"),
        ("layers.*.gain", vn.UnknownPathError, r"'layers\.\*\.gain' matches nothing"),
        (lambda path, leaf: False, vn.UnknownPathError, "true of no parameter.*scalar"),
        (("scalar", "typo"), vn.UnknownPathError, "'typo'"),
        ("nothing", vn.UnknownPathError, "'nothing' is `None`"),
        ("count", TypeError, "'count', an array of dtype int"),
        ("flag", TypeError, "'flag', an array of dtype bool"),
        ("integer", TypeError, "'integer', a leaf of type int"),
        ("activation", TypeError, "'activation'"),
        ("name", TypeError, "'name' is a static field"),
        ("coun*", TypeError, "'count', an array of dtype int"),
        (3, TypeError, r"`selector` has the selector 3. A"),
        (("scalar", None), TypeError, "selector None"),
        ({"scalar": 1}, TypeError, "A selector is a path"),
    ],
)
def test_a_selector_that_is_wrong(selector, error, match):
    with pytest.raises(error, match=match):
        vn.split(zoo(), selector)


@pytest.mark.parametrize("empty", [(), []])
def test_no_selector_selects_nothing(empty):
    selected, rest = vn.split(zoo(), empty)
    assert vn.paths(selected) == ()
    assert vn.paths(rest) == ZOO_PATHS


def test_an_unknown_path_is_a_key_error_that_reads_well():
    with pytest.raises(KeyError) as error:
        vn.split({"power": 1.0}, "powre")
    assert str(error.value).startswith("`selector`: 'powre'")


def test_an_integer_beneath_a_node_is_passed_over():
    tree = {"node": {"w": jnp.ones(1), "n": jnp.asarray(1), "x": 2.0}}
    assert chosen(tree, "node") == ("node.w",)


def test_a_float_is_selected_by_its_own_name_alone():
    tree = {"node": {"x": 2.0, "w": jnp.ones(1)}}
    assert chosen(tree, "node") == ("node.w",)
    assert chosen(tree, "node.x") == ("node.x",)
    assert chosen(tree, "**.x") == ("node.x",)
    with pytest.raises(TypeError, match=r"'node\.x'"):
        vn.split({"node": {"x": 2.0}}, "node")


def test_a_module_that_can_be_called_is_no_predicate_and_no_leaf():
    assert vn.paths([line()]) == ("0.slope", "0.offset")
    selected, rest = vn.split(line(), "slope")
    assert selected.offset is None
    assert rest.slope is None


def test_split_is_that_of_equinox():
    tree = zoo()
    ours = vn.split(tree, lambda path, leaf: leaf.ndim == 2)
    is_matrix = lambda x: eqx.is_inexact_array_like(x) and jnp.ndim(x) == 2
    theirs = eqx.partition(tree, is_matrix)
    assert eqx.tree_equal(ours[0], theirs[0])
    assert eqx.tree_equal(ours[1], theirs[1])


def test_split_works_on_abstract_trees_and_under_jit():
    shapes = jax.eval_shape(lambda: {"a": jnp.ones(2), "b": jnp.ones(1)})
    assert vn.split(shapes, "a")[0]["a"].shape == (2,)
    out = jax.jit(lambda tree: vn.split(tree, "a")[0])({"a": 1.5 * jnp.ones(1), "b": 1})
    assert out["a"] == 1.5


# Any tree, any selector.

LEAVES = st.sampled_from(
    [None, 1.5, 3, True, np.ones(2), np.arange(2), np.ones((1, 2), np.float32), 1j]
)
NAMES = st.sampled_from(["a", "b", "c", "a.b", "layers", "x*"])
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, max_size=3),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)
SEGMENTS = st.sampled_from(["a", "b", "c", "0", "1", "*", "**", "left", "a*", "layers"])


@given(
    TREES,
    st.lists(
        st.lists(SEGMENTS, min_size=1, max_size=3).map(".".join), min_size=1, max_size=3
    ).map(tuple),
)
@settings(max_examples=300, deadline=None)
def test_combine_undoes_split(tree, selector):
    try:
        selected, rest = vn.split(tree, selector)
    except (ValueError, TypeError, vn.UnknownPathError) as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert "`selector`" in message or "same path" in message
        return
    assert eqx.tree_equal(eqx.combine(selected, rest), tree) is not False
    both = set(vn.paths(selected)) & set(vn.paths(rest))
    assert not both
    assert sorted(vn.paths(selected) + vn.paths(rest)) == sorted(vn.paths(tree))
    assert vn.paths(selected)


@given(TREES)
@settings(max_examples=100, deadline=None)
def test_every_path_selects_its_own_leaf(tree):
    try:
        names = vn.paths(tree)
    except ValueError:
        return
    for name in names:
        assert chosen(tree, name) == (name,)


def test_floats_of_eight_bits_are_no_long_doubles():
    tree = {
        "small": jnp.ones(2, jnp.float8_e4m3fnuz),
        "long": np.ones(2, np.longdouble),
        "complex": np.ones(2, np.clongdouble),
    }
    assert vn.paths(tree) == ("small",)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"bounds": {"x[1]": (0, 1)}}, r"`{'x': \(low_array, high_array\)}`"),
        ({"priors": {"x[1]": vn.Normal(0.0, 1.0)}}, "with a large `std`"),
        ({"ties": {"x[1]": "x"}}, "Tie 'x' as a whole"),
        ({"train": "x[1]"}, "`forward` inserts the element"),
    ],
)
def test_the_name_of_an_element_has_a_remedy(options, remedy):
    class Fit(vn.Trainer):
        def residuals(self, model, batch):
            return model["x"]

    with pytest.raises(vn.UnknownPathError, match=f"is one element.*{remedy}"):
        Fit({"x": jnp.ones(3)}, **options)


def test_a_property_that_raises_is_named_without_it():
    class Fitted(eqx.Module):
        x: jax.Array

        @property
        def area(self):
            raise ValueError("not fitted yet")

    with pytest.raises(TypeError, match="'area' is a static field or a property"):
        vn.split(Fitted(jnp.ones(3)), "area")


# Dictionaries whose keys do not compare


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Mean(vn.Trainer):
    def loss(self, model, batch):
        return sum(jnp.sum((x - 1.0) ** 2) for x in jax.tree.leaves((model, batch)))


ODD = {Colour.RED: jnp.ones(4), Colour.BLUE: jnp.ones(4)}
MEAN = Mean({"a": jnp.ones(4)}, optax.sgd(0.1))
TAKES = {
    r"model\['x'\]\[1\]": lambda odd: Mean({"x": [1.0, odd]}),
    "data": lambda odd: MEAN.fit(odd, 2),
    "batch": lambda odd: MEAN.step(odd),
    r"validation\[0\]": lambda odd: MEAN.fit(1.0, 2, validation=(odd, 1)),
    r"data\[0\]": lambda odd: vn.fit_many([MEAN], (odd,), 2),
    "arrays": lambda odd: vn.Minibatches(odd, 2, key=jax.random.key(0)),
    r"tree\[0\]": lambda odd: vn.paths([odd]),
    "tree": lambda odd: vn.split(odd, "a"),
    r"tree\['x'\]": lambda odd: vn.save("no.vernal", {"x": odd}),
}


@pytest.mark.parametrize("name", TAKES)
def test_a_dictionary_that_jax_cannot_sort_is_named(name):
    told = f"^`{name}` is a dictionary with keys of type `Colour`, which JAX cannot"
    with pytest.raises(ValueError, match=told):
        TAKES[name](ODD)
    with pytest.raises(ValueError, match=f"`{name}` .* `int` and `str`.* Make them"):
        TAKES[name]({1: jnp.ones(4), "a": jnp.ones(4)})


def test_one_in_its_own_order_is_taken():
    ordered = collections.OrderedDict(ODD)
    assert len(vn.paths(ordered)) == 2
    assert int(Mean(ordered, optax.sgd(0.1)).fit(ordered, 2).trainer.step_count) == 2


# Empty selectors


EMPTY = {
    "rules": lambda: vn.ParamOptimiser({"a": None, (): optax.sgd(0.1)}),
    "bounds": lambda: Mean({"a": jnp.ones(4)}, bounds={(): (0, 1)}),
    "ties": lambda: Mean({"a": jnp.ones(4)}, ties={((),): "a"}),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_selector_matches_nothing(name):
    with pytest.raises(vn.UnknownPathError, match=f"`{name}`: .* is empty, and match"):
        EMPTY[name]()

"""Every kind and every name of a leaf goes through a file to the bit, or is refused."""

import enum
import fractions
import json
import unicodedata
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import vernal as vn
from models import LineFit, line, line_batch


def bits(leaf):
    """What a leaf is, to the bit: its type, dtype, shape, and bytes."""
    if not hasattr(leaf, "dtype"):
        return type(leaf), np.asarray(leaf).tobytes()
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf.dtype, leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    array = np.asarray(leaf)
    return type(leaf), leaf.dtype, leaf.shape, np.ascontiguousarray(array).tobytes()


def require_round_trip(path, tree, like=None):
    vn.save(path, tree)
    loaded = vn.load(path, tree if like is None else like)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True)
    assert all(bits(new) == bits(old) for new, old in pairs)
    return loaded


class Colour(enum.IntEnum):
    RED = 1
    BLUE = 2


class Access(enum.IntFlag):
    READ = 4
    WRITE = 2


class Celsius(float):
    pass


class Measured(float):
    def __new__(cls, value, unit):
        new = super().__new__(cls, value)
        new.unit = unit
        return new


class Metres(np.ndarray):
    unit = "m"


FOREIGN = [
    name
    for name in dir(ml_dtypes)
    if isinstance(getattr(ml_dtypes, name), type)
    and issubclass(getattr(ml_dtypes, name), np.generic)
]

HOST_DTYPES = [
    *("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"),
    *("f2", "f4", "f8", "c8", "c16", ">f8", ">i2", ">c8"),
    *("M8[ns]", "M8[10us]", "m8[s]", "U4", "S3", *FOREIGN),
]


@pytest.mark.parametrize("dtype", HOST_DTYPES)
def test_dtypes_of_numpy(dtype, tmp_path):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    size = dtype.itemsize
    raw = np.random.default_rng(0).integers(0, 2, 12 * size).astype(np.uint8)
    if dtype.kind in "US":
        array = np.asarray(["ab", "", "c", "é"[:1] if dtype.kind == "U" else "d"] * 3)
        array = array.astype(dtype)
    else:
        array = raw.view(dtype)
    grid = array.reshape(3, 4)
    read_only = array.copy()
    read_only.flags.writeable = False
    tree = {
        "1-d": array,
        "2-d": grid,
        "0-d": array[:1].reshape(()),
        "empty": array[:0],
        "empty too": array[:0].reshape(3, 0, 2),
        "fortran": np.asfortranarray(grid),
        "strided": grid[::2, ::-1],
        "read-only": read_only,
    }
    if dtype.kind not in "US":
        tree["scalar"] = array[1]
    loaded = require_round_trip(tmp_path / "file", tree)
    assert np.load(tmp_path / "file")["2-d.npy"[:-4]].shape == (3, 4)
    assert all(leaf.flags.writeable for n, leaf in loaded.items() if n != "scalar")


JAX_DTYPES = [
    *("bool", "int2", "int4", "int8", "int16", "int32", "int64"),
    *("uint2", "uint4", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
    *(name for name in FOREIGN if name.startswith("float8") and hasattr(jnp, name)),
    "float4_e2m1fn",
]


def test_dtypes_of_jax(tmp_path):
    tree = {
        dtype: [jnp.asarray(np.asarray(x).astype(dtype)) for x in ([1, 0], 1, [[]])]
        for dtype in JAX_DTYPES
    }
    require_round_trip(tmp_path / "file", tree)
    abstract = eqx.filter_eval_shape(lambda: tree)
    require_round_trip(tmp_path / "file", tree, like=abstract)


def test_bits_that_compare_equal_or_not_at_all(tmp_path):
    words = {
        "float64": np.asarray([0x7FF8000000000123, 0xFFF0000000000000, 1 << 63, 1]),
        "float32": np.asarray([0x7FC00123, 0x7F800001, 1 << 31, 1]),
        "float16": np.asarray([0x7E12, 0x7C01, 1 << 15, 1]),
        "bfloat16": np.asarray([0x7FC3, 0x7F81, 1 << 15, 1]),
    }
    host = {
        name: bits.astype(f"u{jnp.dtype(name).itemsize}").view(jnp.dtype(name))
        for name, bits in words.items()
    }
    numbers = [float(host["float64"][0]), -0.0, complex(-0.0, float("nan")), 5e-324]
    require_round_trip(tmp_path / "file", (host, jax.tree.map(jnp.asarray, host)))
    require_round_trip(tmp_path / "file", numbers)


def test_keys_of_each_kind(tmp_path):
    tree = {
        impl: [
            jax.random.key(3, impl=impl),
            jax.random.split(jax.random.key(4, impl=impl), (2, 3)),
            jax.random.split(jax.random.key(5, impl=impl), 0),
        ]
        for impl in ("threefry2x32", "rbg", "unsafe_rbg")
    } | {"old": jax.random.PRNGKey(1)}
    require_round_trip(tmp_path / "file", tree)
    require_round_trip(tmp_path / "file", tree, like=jax.eval_shape(lambda: tree))
    vn.save(tmp_path / "file", tree["rbg"])
    with pytest.raises(vn.MismatchError, match=r"'0' is key<rbg>\[\] there"):
        vn.load(tmp_path / "file", tree["threefry2x32"])


def test_python_numbers_and_their_subclasses(tmp_path):
    tree = {
        "integers": [0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1],
        "others": [True, False, 0.1, float("inf"), 1e308 - 1j],
        "of NumPy": [np.float64(0.1), np.int8(-1), np.bool_(True)],
        "enumerations": [Colour.BLUE, Access.READ | Access.WRITE],
        "float": Celsius(21.5),
    }
    loaded = require_round_trip(tmp_path / "file", tree)
    assert loaded == tree
    assert loaded["enumerations"][0] is Colour.BLUE
    vn.save(tmp_path / "file", {"a": 7})
    with pytest.raises(vn.MismatchError, match="'a' as 7, not a Colour"):
        vn.load(tmp_path / "file", {"a": Colour.RED})


def masked(values, mask):
    return np.ma.masked_array(values, mask)


RECORDS = np.zeros(2, [("a", "f4"), ("b", "i4")])
REFUSED = {
    "an integer of 65 bits": (lambda: 2**64, ValueError, "65 bits"),
    "a negative one": (lambda: -(2**63) - 1, ValueError, "64 bits"),
    "a mask": (lambda: masked([1.0, 9.0], [False, True]), TypeError, "masked array"),
    "no mask": (lambda: masked([1.0], [False]), TypeError, r"give `y\.data`"),
    "a unit": (lambda: np.ones(2).view(Metres), TypeError, "Quantity"),
    "a matrix": (lambda: np.ones((2, 2)).view(np.matrix), TypeError, "matrix"),
    "structured": (lambda: RECORDS, TypeError, "structured"),
    "records": (lambda: RECORDS.view(np.recarray), TypeError, "recarray"),
    "one record": (lambda: RECORDS[0], TypeError, "structured"),
    "objects": (lambda: np.asarray([None, print]), TypeError, "dtype object"),
    "long doubles": (lambda: np.ones(2, np.longdouble), TypeError, "every machine"),
    "a long double": (lambda: np.longdouble(1), TypeError, "every machine"),
    "a number with a unit": (lambda: Measured(1.0, "m"), TypeError, "unit"),
    "a fraction": (lambda: fractions.Fraction(1, 3), TypeError, "Fraction"),
    "an array of another library": (lambda: Converted(), TypeError, "Converted"),
    "a shape": (lambda: jax.ShapeDtypeStruct((2,), "f4"), ValueError, "no values"),
    "a deleted array": (lambda: deleted(), ValueError, "has been deleted"),
}


class Converted:
    def __array__(self, dtype=None, copy=None):
        return np.ones(2)


def deleted():
    array = jnp.ones(2)
    array.delete()
    return array


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_by_name(name, tmp_path):
    make, error, match = REFUSED[name]
    tree = {"good": jnp.ones(2), "sub": [make()]}
    with pytest.raises(error, match=match) as caught:
        vn.save(tmp_path / "file", tree)
    assert "'sub.0'" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_traced_array_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`save` runs on the host"):
        jax.jit(lambda x: vn.save(tmp_path / "file", {"a": x}))(1.0)


def test_the_program_is_left_out(tmp_path):
    tree = {"f": jnp.sin, "text": "a", "raw": b"b", "class": float, "x": jnp.ones(1)}
    vn.save(tmp_path / "file", tree)
    other = tree | {"text": "another", "x": jnp.zeros(1)}
    loaded = vn.load(tmp_path / "file", other)
    assert loaded["text"] == "another"
    assert loaded["x"] == 1


def test_a_mask_that_a_tree_has_is_not_lost_by_loading(tmp_path):
    vn.save(tmp_path / "file", {"a": np.ones(2)})
    with pytest.raises(TypeError, match="`like` has the leaf 'a', a masked array"):
        vn.load(tmp_path / "file", {"a": masked([1.0, 2.0], [False, True])})


# Names.

NAMES = {
    "empty": "",
    "a slash": "/",
    "slashes": "a/b//c",
    "a folder above": "../x",
    "absolute": "/etc/x",
    "backslashes": "a\\b",
    "a drive": "C:x",
    "a NUL": "a\0b",
    "a newline": "a\nb",
    "control characters": "\x01\x7f\x85",
    "what ends like a member": "a.npy",
    "the header": "vernal.json",
    "a numbered member": "leaves/1",
    "quotes": "a'\"b",
    "accents": "é",
    "other scripts": "光度",
    "beyond 16 bits": "🔭",
    "invisible": "a\u200bb",
    "a lone surrogate": "a\ud800b",
    "a lone low surrogate": "\udcff",
    "200 characters": "x" * 200,
    "201 characters": "y" * 201,
    "100,000 characters": "z" * 100_000,
    "spaces": "  a ",
    "a sign": "#2",
    "percent": "%2e",
}


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(name, tmp_path):
    key = NAMES[name]
    beside = f"{key}b"
    require_round_trip(tmp_path / "file", {key: jnp.ones(2), beside: jnp.zeros(2)})
    vn.save(tmp_path / "file", {key: 1.0})
    with pytest.raises(vn.MismatchError, match="absent"):
        vn.load(tmp_path / "file", {beside: 1.0})


def test_all_odd_names_at_once(tmp_path):
    composed = "é"
    names = [
        *NAMES.values(),
        *("a", "A", "a.NPY", "Vernal.json", "leaves/0", "leaves.0", "leaves/0.npy"),
        unicodedata.normalize("NFD", composed),
        unicodedata.normalize("NFC", composed),
    ]
    tree = {name: jnp.asarray(float(i)) for i, name in enumerate(dict.fromkeys(names))}
    require_round_trip(tmp_path / "file", tree)
    with zipfile.ZipFile(tmp_path / "file") as archive:
        members = archive.namelist()
        assert archive.testzip() is None
    assert len(set(members)) == len(members) == len(tree) + 1
    for member in members:
        assert not member.startswith("/")
        assert not {"..", "."} & set(member.split("/"))
        assert member.isprintable()


def test_a_pair_of_surrogates_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not valid Unicode"):
        vn.save(tmp_path / "file", {"\ud83d\udd2d": 1.0})
    assert not list(tmp_path.iterdir())


def test_names_without_end_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Shorten the keys"):
        vn.save(tmp_path / "file", {"x" * 2_000_000: 1.0})


class Leaf(NamedTuple):
    b: float


COLLISIONS = {
    "two": {"a.b": 1.0, "a": {"b": 2.0}},
    "three": {"a.b.c": 1.0, "a": {"b.c": 2.0, "b": {"c": 3.0}}},
    "a name like one that is given": {"a.b": 1.0, "a": {"b": 2.0}, "a.b#2": 3.0},
    "given first": OrderedDict({"a.b#2": 3.0, "a.b": 1.0, "a": {"b": 2.0}}),
    "given often": {"a": {"b": 0.0}, "a.b": 1.0, "a.b#2": 2.0, "a.b#2#2": 3.0}
    | {"a.b#3": 4.0},
    "collisions of collisions": OrderedDict(
        {"a": {"b": 0.0, "b#2": 1.0}, "a.b": 2.0, "a.b#2": 3.0, "a.b#2#2": 4.0}
    ),
    "numbers and their names": OrderedDict({1: 1.0, "1": 2.0}),
    "other nodes": {"a.0": 1.0, "a": [2.0], "b": Leaf(3.0), "b.b": 4.0},
    "nothing and a dot": OrderedDict({"": {"": 1.0}, ".": 2.0}),
}


@pytest.mark.parametrize("name", COLLISIONS)
@pytest.mark.parametrize("kind", [float, jnp.asarray])
def test_no_two_leaves_have_one_name(name, kind, tmp_path):
    tree = jax.tree.map(kind, COLLISIONS[name])
    require_round_trip(tmp_path / "file", tree)
    header = json.loads(zipfile.ZipFile(tmp_path / "file").read("vernal.json"))
    paths = [leaf["path"] for leaf in header["leaves"]]
    assert len(set(paths)) == len(paths) == len(jax.tree.leaves(tree))


# Precision, and what a program sets.


def test_nothing_is_rounded_without_a_word(tmp_path):
    wide = {"float64": 0.1, "int64": 2**40, "complex128": 0.1j, "uint64": 2**63}
    for dtype, value in wide.items():
        path, array = tmp_path / dtype, np.asarray([value], dtype)
        vn.save(path, {"a": jnp.asarray(array)})
        narrow = jnp.zeros(1, {"c": "c8", "f": "f4", "i": "i4", "u": "u4"}[dtype[0]])
        with pytest.raises(vn.MismatchError, match="jax_enable_x64"):
            vn.load(path, {"a": narrow})
        described = {"a": jax.ShapeDtypeStruct((1,), dtype)}
        like = {"a": jnp.asarray(array)}
        with jax.enable_x64(False):
            for tree in (like, described):
                with pytest.raises(vn.MismatchError, match="`jax_enable_x64` is off"):
                    vn.load(path, tree)
            assert vn.load(path, {"a": np.zeros(1, dtype)})["a"] == array
    numbers = {"a": 0.1, "b": 2**40, "c": np.float64(0.1)}
    with jax.enable_x64(False):
        require_round_trip(tmp_path / "numbers", numbers)


@pytest.mark.parametrize("rate", [np.float64(0.25), 0.25, jnp.asarray([0.1, 0.2]), 1])
@pytest.mark.parametrize("saved", [np.float32(0.1), np.float64(0.1), 0.5])
def test_rates_of_another_kind_come_from_the_program(saved, rate, tmp_path):
    make = lambda rate: LineFit(line(), optax.inject_hyperparams(optax.sgd)(rate))
    old = make(saved).replace()
    vn.save(tmp_path / "file", old)
    own = make(rate).opt_state.hyperparams["learning_rate"]
    loaded = vn.load(tmp_path / "file", make(rate))
    new = loaded.opt_state.hyperparams["learning_rate"]
    assert bits(new) == bits(own)
    assert np.all(new == rate)


def test_a_rate_of_another_dtype_that_was_changed_since_is_kept(tmp_path):
    make = lambda rate: LineFit(line(), optax.inject_hyperparams(optax.sgd)(rate))
    path = lambda trainer: trainer._progress.opt_state.hyperparams["learning_rate"]
    old, changed = make(jnp.asarray(0.25, "float32")), jnp.asarray(0.125, "float32")
    vn.save(tmp_path / "file", eqx.tree_at(path, old, changed))
    like = make(np.float64(0.25))
    new = path(vn.load(tmp_path / "file", like))
    assert (new, new.dtype) == (0.125, path(like).dtype)


def test_a_trainer_without_values_is_refused(tmp_path):
    make = lambda: LineFit(line(), optax.adam(0.1))
    vn.save(tmp_path / "file", make())
    with pytest.raises(ValueError, match="a trainer without values"):
        vn.load(tmp_path / "file", eqx.filter_eval_shape(make))
    with pytest.raises(ValueError, match="has no values"):
        vn.save(tmp_path / "file", eqx.filter_eval_shape(make))


def test_what_was_loaded_can_be_fitted_in_place(tmp_path):
    # Its arrays lie in memory that NumPy has made.
    make = lambda: LineFit(line(), optax.adam(0.1))
    half = make().fit(line_batch(), 3).trainer
    vn.save(tmp_path / "file", half)
    loaded = vn.load(tmp_path / "file", make())
    before = [bits(leaf) for leaf in jax.tree.leaves(loaded.params)]
    new, expected = (t.fit(line_batch(), 3) for t in (loaded, half))
    assert bits(new.model.slope) == bits(expected.model.slope)
    assert [bits(leaf) for leaf in jax.tree.leaves(loaded.params)] == before

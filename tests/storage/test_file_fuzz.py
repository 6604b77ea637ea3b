"""Files that lie: whatever the bytes are, the same values or an error with the path."""

import contextlib
import functools
import io
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vernal as vn
from models import LineFit, line, same

HEADER = "vernal.json"


@functools.cache
def tree():
    return {
        "flux": jnp.asarray([1.5, -2.5, 4.0]),
        "grid": np.asfortranarray(np.arange(6, dtype="f4").reshape(2, 3)),
        "half": jnp.asarray([0.5, 2.0], jnp.bfloat16),
        "key": jax.random.key(3),
        "count": 7,
        "rate": 0.25,
        "flag": True,
        "phase": 1 - 2j,
        "when": np.asarray(["2020-01-01"], "M8[D]"),
        "odd/name": np.int8(-3),
    }


def is_whole(loaded):
    leaves, own = jax.tree.leaves(loaded), jax.tree.leaves(tree())
    kinds = all(type(a) is type(b) for a, b in zip(leaves, own, strict=True))
    is_number = lambda leaf: not isinstance(leaf, jax.Array | np.ndarray)
    numbers = [leaf for leaf in leaves if is_number(leaf)]
    return kinds and same(loaded, tree()) and numbers == list(filter(is_number, own))


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "file"
    vn.save(path, tree())
    return path.read_bytes()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "fit.vernal"


def outcome(file, like=None):
    """The error of a file, which names it, or `None` if its values are as they were."""
    try:
        loaded = vn.load(file, tree() if like is None else like)
    except vn.LoadError as caught:
        error = caught
    else:
        assert is_whole(loaded)
        return None
    assert str(file) in str(error)
    assert len(str(error)) < 2000
    return error


def test_every_truncation_is_an_error(content, file):
    file.write_bytes(content)
    for size in reversed(range(len(content))):
        os.truncate(file, size)
        expected = vn.ForeignFileError if size < 41 else vn.DamagedFileError
        error = outcome(file)
        assert type(error) is expected, size
        assert size < 41 or "cut short" in str(error)


def test_1000_flipped_bits(content, file):
    random.seed(0)
    caught = 0
    file.write_bytes(content)
    with file.open("r+b", buffering=0) as raw:
        for _ in range(1000):
            place, bit = random.randrange(len(content)), random.randrange(8)
            os.pwrite(raw.fileno(), bytes([content[place] ^ 1 << bit]), place)
            caught += outcome(file) is not None
            os.pwrite(raw.fileno(), content[place : place + 1], place)
    assert file.read_bytes() == content
    # The others are dates and attributes of the members.
    assert caught > 650


def test_300_bytes_of_noise_in_a_trainer(tmp_path, file):
    trainer = LineFit(line(), None)
    vn.save(file, trainer)
    content = file.read_bytes()
    random.seed(1)
    for _ in range(300):
        damaged = bytearray(content)
        begin = random.randrange(len(content))
        damaged[begin : begin + random.randrange(1, 40)] = random.randbytes(20)
        file.write_bytes(damaged)
        with contextlib.suppress(vn.LoadError):
            assert same(vn.load(file, trainer), trainer)


# Lies of the header.


def unpacked(content):
    """The header of a file, and its members by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return json.loads(members.pop(HEADER)), members


def packed(header, members, compression=zipfile.ZIP_STORED, edit=lambda entries: None):
    """A file of these; `edit` changes what the directory says of them."""
    stream = io.BytesIO()
    text = header if isinstance(header, bytes) else json.dumps(header)
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(HEADER, text, zipfile.ZIP_STORED)
        for name, data in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, data)
        edit(archive.infolist())
    return stream.getvalue()


MISSING = object()
DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "int64", "uint64", "uint32", "int8"),
    *("uint16", "uint8", "int4", "bool", "complex128", "float", "int", "complex"),
    *("key<fry>", "key<rbg>", "key<>", "datetime64[D]", "datetime64[ns]", "<U2", "|S8"),
]
LIES = {
    "path": ["flux", "grid", "", "no", "../../x", None, 3, [], {}, True, MISSING],
    "shape": [
        *([], [3], [4], [1], [3, 1], [2, 3], [3, 2], [6], [0], [2], [1, 2]),
        *([-3], [3.0], [True], ["3"], [[3]], "3", 3, None, {}, MISSING),
        *([10**12], [10**30], [2**63], [0, 10**30], [1] * 70, [3, 10**12, 0]),
    ],
    "dtype": [
        *DTYPES,
        *("f8", ">f8", "<f8", "float64 ", "O", "object", "V8", "f8,f8", "no", ""),
        *("float128", "str", "M8", "[('a', '<f8')]", "x" * 5000),
        *(None, 3, [], ["f8"], {}, True, MISSING),
    ],
    "member": [
        *("flux.npy", "grid.npy", HEADER, "no", "", None, 3, [], {}, "leaves/99.npy"),
    ],
}


# Leaves of these dtypes are written as arrays of those.
SAME_ARRAY = {
    "int": "int64",
    "float": "float64",
    "complex": "complex128",
    "bfloat16": "uint16",
}


def like_of(leaf):
    """A leaf of the kind that the header tells, if there is one."""
    try:
        kind = {"int": int, "float": float, "complex": complex}.get(leaf["dtype"])
        if kind is not None and leaf["shape"] == []:
            return kind(0)
        if leaf["dtype"] in ("key<fry>", "key<rbg>"):
            impl = {"key<fry>": "threefry2x32", "key<rbg>": "rbg"}[leaf["dtype"]]
            words = jax.random.key_data(jax.random.key(0, impl=impl))
            data = np.zeros((*leaf["shape"], words.size), "u4")
            return jax.random.wrap_key_data(data, impl=impl)
        if np.prod(leaf["shape"], dtype=float) < 100:
            return np.zeros(leaf["shape"], jnp.dtype(leaf["dtype"]))
    except Exception:
        return None
    return None


def lies_about(whole):
    """Yields the field that lies, its value, and what the header says of the leaf."""
    for field, values in LIES.items():
        for value in values:
            leaf = whole | {field: value}
            if value is MISSING:
                del leaf[field]
            # A member that has the name of its leaf may be told as well.
            if leaf != whole and value != f"{whole['path']}.npy":
                yield field, value, leaf


@pytest.mark.parametrize("path", ["flux", "half", "key", "count", "odd/name"])
def test_lies_about_a_leaf(path, content, file):
    header, members = unpacked(content)
    leaves, count = {leaf["path"]: leaf for leaf in header["leaves"]}, 0
    for field, value, leaf in lies_about(leaves[path]):
        lying = [*(leaves | {path: leaf}).values()]
        file.write_bytes(packed(header | {"leaves": lying}, members))
        assert outcome(file) is not None, (field, value)
        # Now with a tree that believes the lie, unless it is none.
        believer = like_of(leaf)
        is_true = SAME_ARRAY.get(leaves[path]["dtype"]) == value
        if believer is not None and field != "path" and not is_true:
            with contextlib.suppress(vn.LoadError):
                vn.load(file, tree() | {path: believer})
                pytest.fail(f"The {field} {value!r} is believed.")
            count += 1
    assert count > 10


HEADERS = {
    "no format": lambda h: {k: h[k] for k in h if k != "format"},
    "no leaves": lambda h: {k: h[k] for k in h if k != "leaves"},
    "empty": lambda h: {},
    "a list": lambda h: [h],
    "a number": lambda h: 3,
    "nothing": lambda h: None,
    "formats of zero": lambda h: h | {"format": 0},
    "a negative format": lambda h: h | {"format": -1},
    "half a format": lambda h: h | {"format": 1.5},
    "a float format": lambda h: h | {"format": 1.0},
    "a boolean format": lambda h: h | {"format": True},
    "a text format": lambda h: h | {"format": "1"},
    "no leaves at all": lambda h: h | {"leaves": []},
    "leaves of None": lambda h: h | {"leaves": None},
    "leaves in a dictionary": lambda h: h | {"leaves": {"flux": h["leaves"][0]}},
    "leaves of text": lambda h: h | {"leaves": ["flux"]},
    "one leaf twice": lambda h: h | {"leaves": [*h["leaves"], h["leaves"][0]]},
    "one leaf for another": lambda h: (
        h | {"leaves": h["leaves"][1:] + h["leaves"][1:2]}
    ),
    "one leaf less": lambda h: h | {"leaves": h["leaves"][:-1]},
    "makers of a number": lambda h: h | {"made_by": 3},
    "makers of text": lambda h: h | {"made_by": ["scale_by_adam"]},
    "makers without a rule": lambda h: h | {"made_by": [["scale_by_adam"]]},
    "makers of numbers": lambda h: h | {"made_by": [[0, 1]]},
    "no text": lambda h: b"",
    "half a text": lambda h: json.dumps(h).encode()[:-20],
    "text after it": lambda h: json.dumps(h).encode() + b"{}",
    "no UTF-8": lambda h: b"\xff\xfe\x00",
    "a pickle": lambda h: pickle.dumps(h),
    "deep": lambda h: b"[" * 100_000,
    "digits": lambda h: b'{"format": ' + b"1" * 100_000 + b', "leaves": []}',
    "no number": lambda h: b'{"format": NaN, "leaves": []}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_none(name, content, file):
    header, members = unpacked(content)
    file.write_bytes(packed(json_or_bytes(HEADERS[name](header)), members))
    assert type(outcome(file)) is vn.DamagedFileError


def json_or_bytes(header):
    return header if isinstance(header, bytes) else json.dumps(header).encode()


@pytest.mark.parametrize("by", [None, 3, MISSING])
def test_a_later_format_is_told_from_damage(by, content, file):
    header, members = unpacked(content)
    header |= {"format": 3, "written_by": by, "leaves": None}
    if by is MISSING:
        del header["written_by"]
    expected = vn.DamagedFileError if by is MISSING else vn.NewerFormatError
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file.write_bytes(packed(header, members, compression))
        assert type(outcome(file)) is expected


def test_what_does_no_harm(content, file):
    header, members = unpacked(content)
    header["leaves"].reverse()
    header["leaves"][0]["note"] = [1]
    header |= {"written_by": None, "note": "more"}
    file.write_bytes(packed(header, dict(reversed(members.items()))) + b"after it")
    assert outcome(file) is None


# Lies of the arrays.


def npy(array, version=None):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), version, allow_pickle=True)
    return stream.getvalue()


def described(text, numbers=bytes(24), version=b"\x01\x00"):
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text + numbers


FLOATS = "{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }\n"
ARRAYS = {
    "float32[3]": lambda: npy(np.ones(3, "f4")),
    "float32[6], of as many bytes": lambda: npy(np.ones(6, "f4")),
    "float64[4]": lambda: npy(np.ones(4)),
    "a scalar": lambda: npy(1.0),
    "a column": lambda: npy(np.ones((3, 1))),
    "integers": lambda: npy([1, 2, 3]),
    "unsigned": lambda: npy(np.ones(3, "u8")),
    "complex": lambda: npy(np.ones(3, complex)),
    "text": lambda: npy(["ab", "cd", "ef"]),
    "bytes": lambda: npy(np.asarray([b"12345678"] * 3)),
    "dates": lambda: npy(np.zeros(3, "M8[ns]")),
    "structured": lambda: npy(np.zeros(3, [("a", "f8")])),
    "void": lambda: npy(np.zeros(3, "V8")),
    "objects": lambda: npy(np.asarray([print, 1, None], object)),
    "another byte order": lambda: npy(np.ones(3, ">f8")),
    "a later version": lambda: npy(np.ones(3), (2, 0)),
    "nothing": lambda: b"",
    "only a beginning": lambda: npy(np.ones(3))[:20],
    "no array": lambda: b"some text that is no array of any kind whatsoever",
    "a pickle": lambda: pickle.dumps(np.ones(3)),
    "fewer numbers": lambda: npy(np.ones(3))[:-8],
    "more numbers": lambda: npy(np.ones(3)) + bytes(8),
    "code": lambda: described(b"{'descr': __import__('os').getcwd(), }\n"),
    "parentheses": lambda: described(b"(" * 60_000),
    "no end": lambda: described(FLOATS.encode()[:-1]),
    "longer than it is": lambda: described(FLOATS.encode() + b" "),
    "a negative side": lambda: described(FLOATS.replace("3", "-3").encode()),
    "a side of digits": lambda: described(FLOATS.replace("3", "3" * 3000).encode()),
    "a huge side": lambda: described(FLOATS.replace("3", "9" * 18).encode()),
    "a huge element": lambda: described(FLOATS.replace("f8", "U999999999").encode()),
    "no dtype": lambda: described(FLOATS.replace("f8", "q8").encode()),
    "a header of 4 GB": lambda: described(b"", b"\xff" * 4, b"\x02\x00"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_is_another(name, content, file):
    header, members = unpacked(content)
    for path in ("flux", "count"):
        changed = members | {f"{path}.npy": ARRAYS[name]()}
        file.write_bytes(packed(header, changed))
        assert type(outcome(file)) is vn.DamagedFileError


@pytest.mark.parametrize("value", [2.7, 1 + 1j, True, [7], [[7]], "7", b"7", None])
@pytest.mark.parametrize("path", ["count", "rate", "flag", "phase"])
def test_a_number_that_is_another(value, path, content, file):
    header, members = unpacked(content)
    kinds = {"count": int, "rate": float, "flag": bool, "phase": complex}
    if type(value) is kinds[path]:
        return
    file.write_bytes(packed(header, members | {f"{path}.npy": npy(value)}))
    assert type(outcome(file)) is vn.DamagedFileError


@pytest.mark.parametrize("words", [0, 1, 3, 4])
def test_a_key_of_another_length(words, content, file):
    header, members = unpacked(content)
    file.write_bytes(packed(header, members | {"key.npy": npy(np.zeros(words, "u4"))}))
    error = outcome(file)
    assert type(error) is vn.MismatchError
    assert "'key'" in str(error)


# Lies of the archive.


def renamed(old, new):
    def edit(entries):
        for entry in entries:
            if entry.filename == old:
                entry.filename = new

    return edit


def changed(name, **fields):
    def edit(entries):
        for entry in entries:
            if entry.filename == name:
                for field, value in fields.items():
                    setattr(entry, field, value)

    return edit


def swapped(entries):
    a, b = entries[1], entries[2]
    a.header_offset, b.header_offset = b.header_offset, a.header_offset


def overlapping(entries):
    entries[2].header_offset = entries[1].header_offset


EDITS = {
    "a name": renamed("flux.npy", "flax.npy"),
    "the name of the header": renamed(HEADER, "verbal.json"),
    "two names": swapped,
    "overlapping members": overlapping,
    "a method": changed("flux.npy", compress_type=zipfile.ZIP_DEFLATED),
    "the method of the header": changed(HEADER, compress_type=zipfile.ZIP_DEFLATED),
    "an unknown method": changed("flux.npy", compress_type=99),
    "encryption": changed("flux.npy", flag_bits=1),
    "sizes that come later": changed("flux.npy", flag_bits=8),
    "a checksum": changed("flux.npy", CRC=7),
    "the header's checksum": changed(HEADER, CRC=7),
    "a smaller size": changed("flux.npy", file_size=24, compress_size=24),
    "a larger size": changed("flux.npy", file_size=10**6, compress_size=10**6),
    "a huge size": changed("flux.npy", file_size=10**15, compress_size=10**15),
    "a huge header": changed(HEADER, file_size=10**15, compress_size=10**15),
    "one size of two": changed("flux.npy", file_size=10**9),
    "a far place": changed("flux.npy", header_offset=10**12),
    "a place within": changed("flux.npy", header_offset=17),
    "a later zip": changed("flux.npy", extract_version=99),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_directory_that_lies(name, content, file):
    header, members = unpacked(content)
    file.write_bytes(packed(header, members, edit=EDITS[name]))
    assert type(outcome(file)) is vn.DamagedFileError


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_are_not_as_they_should_be(content, file):
    header, members = unpacked(content)
    flux = members["flux.npy"]
    less = {name: data for name, data in members.items() if name != "flux.npy"}
    first = [*members.items()]
    cases = {
        "one twice": packed(header, [*first, ("flux.npy", flux)]),
        "another twice": packed(header, [*first, ("flux.npy", npy(np.ones(3)))]),
        "one missing": packed(header, less),
        "one more": packed(header, members | {"more.npy": flux}),
        "one that is no array": packed(header, members | {"README": b"text"}),
        "two headers": packed(header, [*first, (HEADER, json.dumps(header))]),
        "compressed": packed(header, members, zipfile.ZIP_DEFLATED),
        "compressed by bzip2": packed(header, members, zipfile.ZIP_BZIP2),
        "none": packed(header, {}),
        "a gap": b"".join(
            (packed(header, members)[:41], bytes(1), packed(header, members)[41:])
        ),
    }
    for name, data in cases.items():
        file.write_bytes(data)
        assert type(outcome(file)) is vn.DamagedFileError, name


def test_what_comes_before_makes_a_file_foreign(content, file):
    for before in (b"\x00", b"#!/bin/sh\n", bytes(1000), content):
        file.write_bytes(before + content)
        assert isinstance(outcome(file), vn.ForeignFileError | vn.DamagedFileError)


# Bombs: no more is allocated than the file has.


def bomb(header, leaf, method=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(HEADER, header, method if leaf is None else None)
        if leaf is not None:
            archive.writestr("a.npy", leaf, method)
    return stream.getvalue()


def one(shape, dtype="float64"):
    leaf = {"path": "a", "shape": shape, "dtype": dtype}
    return json.dumps({"format": 1, "written_by": "x", "leaves": [leaf]})


MANY = 50_000_000
ZEROS = lambda: described(FLOATS.replace("3", str(MANY // 8)).encode(), bytes(MANY))
BOMBS = {
    "zeros": lambda: bomb(one([MANY // 8]), ZEROS(), zipfile.ZIP_DEFLATED),
    "spaces": lambda: bomb(b" " * MANY, None, zipfile.ZIP_DEFLATED),
    "a shape": lambda: bomb(
        one([10**10]), described(FLOATS.replace("3", str(10**10)).encode())
    ),
    "a long header": lambda: bomb(
        json.dumps({"format": 1, "leaves": [{}] * 500_000}).encode(), None
    ),
    "an element": lambda: bomb(
        one([1], "<U900000000"),
        described(
            b"{'descr': '<U900000000', 'fortran_order': False, 'shape': (1,), }\n"
        ),
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_do_not_go_off(name, file):
    file.write_bytes(BOMBS[name]())
    like = {"a": jnp.ones(1)}
    tracemalloc.start()
    try:
        error = outcome(file, like)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert type(error) is vn.DamagedFileError
    assert peak < 2_000_000


def test_an_array_is_not_read_for_another_tree(tmp_path, file):
    vn.save(file, {"a": np.zeros(10**6)})
    # The first error of a kind imports what writes its words.
    with pytest.raises(vn.MismatchError):
        vn.load(file, {"a": np.zeros(1)})
    tracemalloc.start()
    try:
        with pytest.raises(vn.MismatchError):
            vn.load(file, {"a": np.zeros(10**6 + 1)})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        loaded = vn.load(file, {"a": jax.ShapeDtypeStruct((10**6,), "float64")})
        _, read = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert loaded["a"].shape == (10**6,)
    assert peak < 100_000 + 8 * (10**6 + 1)
    assert 8e6 < read < 8.2e6 + peak


def test_numpy_reads_the_file_too(content, file):
    file.write_bytes(content)
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["flux"].tolist() == [1.5, -2.5, 4.0]
        np.testing.assert_array_equal(arrays["grid"], tree()["grid"])
        assert arrays["grid"].flags.f_contiguous
        assert arrays["when"] == tree()["when"]
        numbers = arrays["half"].view(jnp.bfloat16)
        assert numbers.tolist() == [0.5, 2.0]

"""Named arrays in one file, which is read without running any code.

It is a zip archive of NumPy's `.npy` files, which `numpy.load` can read too, behind a
header in JSON.
"""

import contextlib
import errno
import json
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental.multihost_utils import process_allgather

from .._boundary import has_been_deleted, is_deleted
from .._tree import Kind, LoadError, NamedArray, as_kind, is_part
from .atomic import open_to_replace
from .npy import (
    StoredArray,
    is_extended,
    list_members,
    locate,
    numpy_view,
    read_array,
    read_bytes,
    read_header,
    write_array,
)

# In the second format a member may have another name than its leaf.
_FORMAT = 2
_HEADER = "vernal.json"

# A leaf with a longer name has a member with another name.
_LONGEST_NAME = 200

# NumPy turns a Python integer into one of these, depending on the machine.
_INTEGERS = (np.int64, np.uint64, np.int32)


class ForeignFileError(LoadError):
    """A file was not written by [`vernal.save`][]."""


class DamagedFileError(LoadError):
    """A file was written by [`vernal.save`][], and is no longer whole."""


class NewerFormatError(LoadError):
    """A file was written by a later version of vernal, in a format not known yet."""


def write_file(
    path: str | os.PathLike[str], arrays: Mapping[str, NamedArray], **more: Any
) -> None:
    """Writes a file, or leaves the one that was there as it was.

    Of several processes all must call it, and the first one writes. `more` is added to
    the header.
    """
    require_values(arrays)
    members = {name: _member(name, n) for n, name in enumerate(arrays)}
    header = _make_header(arrays, members, more)
    gather = lambda x: process_allgather(x, tiled=True) if is_part(x) else x
    whole = {name: gather(leaf.array) for name, leaf in arrays.items()}
    if jax.process_index() > 0:
        return
    with open_to_replace(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_HEADER, header)
        for name, array in whole.items():
            write_array(archive, members[name], numpy_view(np.asarray(array)))


def require_values(arrays: Mapping[str, NamedArray]) -> None:
    """Refuses leaves that are traced, deleted, or only described."""
    for name, (_, array) in arrays.items():
        if isinstance(array, jax.ShapeDtypeStruct | Tracer):
            raise ValueError(
                f"`tree`: the leaf {name!r} has no values ({array}). Save a tree of "
                "arrays, outside of `jax.jit` and the like."
            )
        if isinstance(array, jax.Array) and is_deleted(array):
            raise has_been_deleted(f"`tree`: the leaf {name!r}")


def _member(name: str, number: int) -> str:
    # Other names cannot be unpacked everywhere.
    is_plain = name.isprintable() and not set(name) & set("/\\:")
    if is_plain and len(name) <= _LONGEST_NAME:
        return f"{name}.npy"
    return f"leaves/{number}.npy"


def _make_header(
    arrays: Mapping[str, NamedArray],
    members: Mapping[str, str],
    more: Mapping[str, Any],
) -> bytes:
    """Returns the header, and checks that it can be read again."""
    leaves = []
    for name, leaf in arrays.items():
        entry = {"path": name, "shape": leaf.kind.shape, "dtype": leaf.kind.dtype}
        if members[name] != f"{name}.npy":
            entry["member"] = members[name]
        leaves.append(entry)
    header = {
        "format": _FORMAT if any("member" in entry for entry in leaves) else 1,
        "written_by": f"vernal {version('vernal')}",
        "leaves": leaves,
        **more,
    }
    text = json.dumps(header).encode()
    for entry, name in zip(json.loads(text)["leaves"], arrays, strict=True):
        if entry["path"] != name:
            raise ValueError(
                f"`tree`: the name of the leaf {name!r} is not valid Unicode and would "
                "be read as another one. Rename the key."
            )
    if len(text) > _max_header_bytes(list(members.values())):
        raise ValueError(
            f"`tree`: the names of its leaves take {len(text)} bytes together. Shorten "
            "the keys."
        )
    return text


def _max_header_bytes(members: list[str]) -> int:
    """Returns the size of a header at most: a longer one was not written by `save`."""
    return 2**20 + sum(2**12 + 12 * len(name) for name in members)


@contextlib.contextmanager
def open_file(
    path: str | os.PathLike[str],
) -> Iterator[tuple[dict[str, NamedArray], Mapping[str, Any]]]:
    """Opens a file that `write_file` wrote, and gives its arrays and its header.

    Within the block each array is read when NumPy asks for it.
    """
    target = Path(path)
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"`path`: there is no file {target}.") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(
            f"`path`: {target} is a folder. Name a file that `vernal.save` wrote. "
            "(With a directory of checkpoints `fit` goes on by itself.)"
        )
    # Opening a pipe would wait for a writer, and a device may have no end.
    if not stat.S_ISREG(mode):
        raise ForeignFileError(
            f"`path`: {target} is not a regular file, but a pipe, a socket or a device."
        )
    with target.open("rb") as file:
        if _HEADER.encode() not in file.read(64):
            raise ForeignFileError(
                f"`path`: {target} is not a file that `vernal.save` wrote. Name one "
                "that is."
            )
        with reported_damage(target):
            content = _listed(file, target)
        yield content


@contextlib.contextmanager
def reported_damage(path: Path) -> Iterator[None]:
    """Raises that a file is damaged, whatever error its bytes cause."""
    try:
        yield
    except (LoadError, MemoryError):
        raise
    except Exception as error:
        # The disk is at fault, unless the file names a place that does not exist.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DamagedFileError(
            f"`path`: {path} is damaged, or was cut short: {str(error)[:200]}. It "
            "cannot be repaired; load an earlier one."
        ) from error


def _listed(
    file: BufferedReader, path: Path
) -> tuple[dict[str, NamedArray], Mapping[str, Any]]:
    entries, ends = list_members(file)
    if not entries or entries[0].orig_filename != _HEADER or entries[0].header_offset:
        raise ValueError("its header is not at its beginning")
    names = [entry.orig_filename for entry in entries]
    first = locate(file, entries[0], ends[0])
    if first.size > _max_header_bytes(names):
        raise ValueError("its header is longer than its leaves can make it")
    header = json.loads(read_bytes(file, first))
    form, leaves = header["format"], header["leaves"]
    if type(form) is not int or form < 1:
        raise ValueError(f"its format is {form!r}")
    if form > _FORMAT:
        raise NewerFormatError(
            f"`path`: {path} was written by {header['written_by']}, in a format that "
            f"vernal {version('vernal')} does not know. Upgrade vernal."
        )
    members = {
        entry.orig_filename: locate(file, entry, end)
        for entry, end in zip(entries[1:], ends[1:], strict=True)
    }
    arrays = {}
    for leaf in leaves:
        name, kind = leaf["path"], as_kind(leaf["shape"], leaf["dtype"])
        if not isinstance(name, str):
            raise ValueError(f"its header has the path {name!r}, not a string")
        member = leaf.get("member", f"{name}.npy")
        if member not in members:
            raise ValueError(f"it has no array for {name!r}")
        array = read_header(file, members[member])
        lazy = _LazyArray(file, path, array, _checked_dtype(kind, array))
        arrays[name] = NamedArray(kind, lazy)
    if len(arrays) != len(entries) - 1 or len(arrays) != len(leaves):
        raise ValueError("its header does not list what is in it")
    return arrays, header


def _checked_dtype(kind: Kind, array: StoredArray) -> np.dtype:
    """Returns the dtype of an array, or raises if it is not that of the header."""
    dtype, shape = array.dtype, array.shape
    if kind.is_key:
        if dtype == np.uint32 and shape and shape[:-1] == kind.shape:
            return dtype
    elif shape == kind.shape:
        named = np.dtype(kind.dtype)
        if dtype == named or (kind.dtype == "int" and dtype in _INTEGERS):
            return dtype
        # Early versions wrote numbers of another byte order as integers too.
        as_integers = is_extended(named) or not named.isnative
        if as_integers and dtype == np.dtype(f"u{named.itemsize}"):
            return named
    raise ValueError(f"its header has {kind}, and an array {dtype}{shape}")


class _LazyArray:
    """An array in an open file, which NumPy reads by `__array__`."""

    def __init__(
        self, file: BufferedReader, path: Path, array: StoredArray, dtype: np.dtype
    ):
        self._file, self._path = file, path
        self._array, self._dtype = array, dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with reported_damage(self._path):
            return read_array(self._file, self._array).view(self._dtype)

"""Named arrays in one file, which is read without running any code.

It is a zip archive of NumPy's `.npy` files, which `numpy.load` can read too, behind a
header in JSON.
"""

import json
import os
import uuid
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from ._leaves import Kind, LoadError, NamedArray, is_part

_FORMAT = 1
_HEADER = "vernal.json"


class ForeignFileError(LoadError):
    """A file was not written by [`vernal.save`][]."""


class DamagedFileError(LoadError):
    """A file was written by [`vernal.save`][], and is no longer whole."""


class NewerFormatError(LoadError):
    """A file was written by a later version of vernal, in a format not known yet."""


def write_file(path: str | os.PathLike[str], arrays: Mapping[str, NamedArray]) -> None:
    """Writes a file, or leaves the one that was there as it was.

    Of several processes all must call it, and the first one writes.
    """
    arrays = {
        path: leaf._replace(array=_whole(leaf.array)) for path, leaf in arrays.items()
    }
    if jax.process_index() > 0:
        return
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"`path`: {target} is a folder. Name a file in it.")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"`path`: there is no folder {target.parent}. Make it first."
        )
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            _write(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            left = f" {target} is as it was before." if target.exists() else ""
            error.add_note(f"`path`: {target} could not be written.{left}")
        raise


def _write(file: Any, arrays: Mapping[str, NamedArray]) -> None:
    leaves = [
        {"path": path, "shape": leaf.kind.shape, "dtype": leaf.kind.dtype}
        for path, leaf in arrays.items()
    ]
    header = {
        "format": _FORMAT,
        "written_by": f"vernal {version('vernal')}",
        "leaves": leaves,
    }
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_HEADER, json.dumps(header, indent=1))
        for path, leaf in arrays.items():
            with archive.open(_member(path), "w", force_zip64=True) as member:
                array = plain(np.asarray(jax.device_get(leaf.array)))
                np.lib.format.write_array(member, array, allow_pickle=False)


def _whole(array: Any) -> Any:
    return process_allgather(array, tiled=True) if is_part(array) else array


def read_file(path: str | os.PathLike[str]) -> dict[str, NamedArray]:
    """Reads a file that `write_file` wrote."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(
            f"`path`: {target} is a folder. Name a file that `vernal.save` wrote. "
            "(With a directory of checkpoints `fit` goes on by itself.)"
        )
    if not target.exists():
        raise FileNotFoundError(f"`path`: there is no file {target}.")
    with target.open("rb") as file:
        begins_like_ours = _HEADER.encode() in file.read(64)
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                if _HEADER in archive.namelist():
                    return _read(archive, target)
        except NewerFormatError:
            raise
        except Exception as error:  # Bytes that are not as they were may mean anything.
            if begins_like_ours:
                raise DamagedFileError(
                    f"`path`: {target} is damaged, or was cut short: {error}. There is "
                    "no way to mend it; load an earlier one."
                ) from error
    raise ForeignFileError(
        f"`path`: {target} is no file that `vernal.save` wrote. Name one that is."
    )


def _read(archive: zipfile.ZipFile, path: Path) -> dict[str, NamedArray]:
    header = json.loads(archive.read(_HEADER))
    if header["format"] > _FORMAT:
        raise NewerFormatError(
            f"`path`: {path} was written by {header['written_by']}, in a format that "
            f"vernal {version('vernal')} does not know. Upgrade vernal."
        )
    arrays = {}
    for leaf in header["leaves"]:
        kind = Kind(tuple(leaf["shape"]), leaf["dtype"])
        with archive.open(_member(leaf["path"])) as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
        if array.dtype.kind == "u" and not kind.dtype.startswith(("u", "key")):
            array = array.view(jnp.dtype(kind.dtype))
        arrays[leaf["path"]] = NamedArray(kind, array)
    return arrays


def _member(path: str) -> str:
    return f"{path}.npy"


def plain(array: np.ndarray) -> np.ndarray:
    """Shows a dtype that NumPy itself does not have, such as bfloat16, as integers."""
    if array.dtype.isbuiltin == 1:
        return array
    return array.view(f"u{array.dtype.itemsize}")

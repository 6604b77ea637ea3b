"""The format of a checkpoint: arrays, and a description with checksums."""

import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._tree import Kind, NamedArray, is_part, weighted_sum, words
from .npy import is_extended

FORMAT = 2

# Arrays of fewer bytes are written together: Orbax takes longer to describe one than to
# write it.
_LARGE = 2**16


class Leaf(NamedTuple):
    """A leaf, and the array that was written for it."""

    shape: list[int]
    dtype: str
    data_shape: list[int]
    data_dtype: str

    @property
    def kind(self) -> Kind:
        return Kind(tuple(self.shape), self.dtype)


def pack(arrays: Mapping[str, NamedArray]) -> tuple[dict[str, Any], list[Any]]:
    """Returns a description of arrays, and what to write: few arrays."""
    large = {p: leaf.array for p, leaf in arrays.items() if _is_large(leaf.array)}
    others = [leaf.array for path, leaf in arrays.items() if path not in large]
    small = b"".join(np.asarray(x).tobytes() for x in jax.device_get(others))
    description = {
        "format": FORMAT,
        "leaves": [
            [path, *leaf.kind, leaf.array.shape, str(leaf.array.dtype)]
            for path, leaf in arrays.items()
        ],
        "large": list(large),
        "sums": [_checksum(array) for array in large.values()],
        "bytes": len(small),
        "crc": zlib.crc32(small),
    }
    # Orbax does not write an array without elements.
    padded = np.frombuffer(small or bytes(1), np.uint8)
    return description, [padded, *large.values()]


def leaves(description: Mapping[str, Any]) -> dict[str, Leaf]:
    return {path: Leaf(*fields) for path, *fields in description["leaves"]}


def layout(
    description: Mapping[str, Any], sharding: Callable[[str], Any]
) -> list[np.ndarray | jax.ShapeDtypeStruct]:
    """Returns the shapes of the arrays that were written, each with its sharding."""
    written = leaves(description)
    large = [
        jax.ShapeDtypeStruct(leaf.data_shape, leaf.data_dtype, sharding=sharding(path))
        for path, leaf in ((path, written[path]) for path in description["large"])
    ]
    return [np.zeros(max(description["bytes"], 1), np.uint8), *large]


def unpack(description: Mapping[str, Any], written: list[Any]) -> dict[str, NamedArray]:
    """Undoes `pack`, or raises a `ValueError` if a checksum differs."""
    padded, *large = written
    small = np.asarray(padded)[: description["bytes"]]
    if zlib.crc32(small.tobytes()) != description["crc"]:
        raise ValueError("the checksum differs")
    if [_checksum(array) for array in large] != description["sums"]:
        raise ValueError("the checksum of an array differs")
    arrays, start = dict(zip(description["large"], large, strict=True)), 0
    named = {}
    for path, leaf in leaves(description).items():
        if path not in arrays:
            dtype, shape = jnp.dtype(leaf.data_dtype), leaf.data_shape
            end = start + dtype.itemsize * math.prod(shape)
            arrays[path] = small[start:end].view(dtype).reshape(shape)
            start = end
        named[path] = NamedArray(leaf.kind, arrays[path])
    return named


def sealed(content: Any) -> str:
    """Returns something as JSON, with a checksum."""
    text = json.dumps(content)
    return json.dumps({"content": text, "crc": zlib.crc32(text.encode())})


def unsealed(text: str | bytes) -> Any:
    """Undoes `sealed`, or raises a `ValueError` if the text is damaged."""
    try:
        seal = json.loads(text)
        content, crc = seal["content"], seal["crc"]
        is_whole = zlib.crc32(content.encode()) == crc
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("its description is damaged") from error
    if not is_whole:
        raise ValueError("the checksum of its description differs")
    return json.loads(content)


def _is_large(array: Any) -> bool:
    # Orbax does not write all dtypes of one byte or less that NumPy lacks.
    is_odd = is_extended(array.dtype) and array.dtype.itemsize == 1
    return is_part(array) or (array.nbytes >= _LARGE and not is_odd)


@jax.jit
def _weighted_sum(array: Array) -> Array:
    return weighted_sum(words(array))


def _checksum(array: Any) -> int:
    return int(_weighted_sum(array))

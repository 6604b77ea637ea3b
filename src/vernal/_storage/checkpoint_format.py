"""What a checkpoint consists of: arrays, and a description with checksums."""

import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._tree import Kind, NamedArray, is_part

FORMAT = 2

# Arrays below this many bytes are written together: each one by itself takes longer to
# describe than to write.
_LARGE = 2**16


class Leaf(NamedTuple):
    """What a checkpoint says of a leaf: what it is, and what was written for it."""

    shape: list[int]
    dtype: str
    data_shape: list[int]
    data_dtype: str

    @property
    def kind(self) -> Kind:
        return Kind(tuple(self.shape), self.dtype)


def pack(arrays: Mapping[str, NamedArray]) -> tuple[dict[str, Any], list[Any]]:
    """Returns what describes arrays, and the arrays to write: few, for many small."""
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
    return description, [np.frombuffer(_padded(small), np.uint8), *large.values()]


def leaves(description: Mapping[str, Any]) -> dict[str, Leaf]:
    """Returns what was written, by path."""
    return {path: Leaf(*fields) for path, *fields in description["leaves"]}


def layout(
    description: Mapping[str, Any], sharding: Callable[[str], Any]
) -> list[np.ndarray | jax.ShapeDtypeStruct]:
    """Returns the shapes of the arrays that were written.

    **Arguments:**

    - `description`: what `pack` returned.
    - `sharding`: says of a path where its array is to be.
    """
    written = leaves(description)
    small = np.zeros(len(_padded(bytes(description["bytes"]))), np.uint8)
    return [
        small,
        *(
            jax.ShapeDtypeStruct(
                written[path].data_shape,
                written[path].data_dtype,
                sharding=sharding(path),
            )
            for path in description["large"]
        ),
    ]


def unpack(description: Mapping[str, Any], written: list[Any]) -> dict[str, NamedArray]:
    """Undoes `pack`, or raises a `ValueError` if a checksum is another."""
    padded, *large = written
    small = np.asarray(padded)[: description["bytes"]]
    if zlib.crc32(small.tobytes()) != description["crc"]:
        raise ValueError("the checksum is another")
    if [_checksum(array) for array in large] != description["sums"]:
        raise ValueError("the checksum of an array is another")
    arrays, place = dict(zip(description["large"], large, strict=True)), 0
    named = {}
    for path, leaf in leaves(description).items():
        if path not in arrays:
            dtype, shape = jnp.dtype(leaf.data_dtype), leaf.data_shape
            end = place + dtype.itemsize * math.prod(shape)
            arrays[path] = small[place:end].view(dtype).reshape(shape)
            place = end
        named[path] = NamedArray(leaf.kind, arrays[path])
    return named


def sealed(content: Any) -> str:
    """Writes something as JSON, with a checksum."""
    text = json.dumps(content)
    return json.dumps({"content": text, "crc": zlib.crc32(text.encode())})


def unsealed(text: str | bytes) -> Any:
    """Reads what `sealed` wrote, or raises a `ValueError` if it is not whole."""
    try:
        seal = json.loads(text)
        content, crc = seal["content"], seal["crc"]
        is_whole = zlib.crc32(content.encode()) == crc
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("its description is damaged") from error
    if not is_whole:
        raise ValueError("the checksum of its description is another")
    return json.loads(content)


def _padded(small: bytes) -> bytes:
    # Orbax writes no array without elements.
    return small or bytes(1)


def _is_large(array: Any) -> bool:
    # Of the dtypes of one byte or less that NumPy lacks, Orbax does not write all.
    is_odd = array.dtype.isbuiltin == 2 and array.dtype.itemsize == 1
    return is_part(array) or (array.nbytes >= _LARGE and not is_odd)


@jax.jit
def _sum(array: Array) -> Array:
    """Adds up the bits of an array, each word times its place, on its own device."""
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag])
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    word = min(array.dtype.itemsize, 4)
    words = lax.bitcast_convert_type(array, f"uint{8 * word}").ravel()
    places = 2 * lax.iota(jnp.uint32, words.size) + 1
    return jnp.sum(words.astype(jnp.uint32) * places, dtype=jnp.uint32)


def _checksum(array: Any) -> int:
    return int(_sum(array))

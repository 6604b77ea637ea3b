"""Checksums of arrays, by which equal data are known again."""

import enum
import zlib
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from .._boundary import OfObjects, PyTree
from .by_name import by_path
from .named_arrays import Kind, to_arrays

# Arrays with more bytes are summed up on their device.
_LARGE = 2**24

# Of arrays with more bytes that cannot change the sum is kept, as long as they live:
# each fit asks for that of its data and of all that is not trained.
_WORTH_KEEPING = 2**14
_kept = OfObjects[int | None]()


def is_part(leaf: Any) -> bool:
    """Whether a leaf is an array of which this process has only a part."""
    return isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )


def checksum(array: Any) -> int | None:
    """Returns a checksum of an array; `None` if this process has only a part of it."""
    if is_part(array):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = array.addressable_data(0)
    # A user's `jax.transfer_guard("disallow")` lets transfers that say so pass.
    return zlib.crc32(np.ascontiguousarray(jax.device_get(array)).tobytes())


# What has the same text in each process, and is not saved as a number.
_CONSTANTS = str | bytes | enum.Enum | Decimal | Fraction


def _text(constant: Any) -> bytes:
    match constant:
        case str():
            return constant.encode(errors="surrogatepass")
        case bytes():
            return constant
        case enum.Enum():
            return f"{type(constant).__qualname__}.{constant.name}".encode()
        case _:
            return f"{type(constant).__qualname__} {constant}".encode()


class LeafSum(NamedTuple):
    """A leaf that is known by a checksum; with rows, one for each."""

    path: str
    kind: Kind
    total: Any


def leaf_sums(tree: PyTree) -> list[LeafSum]:
    """Returns the checksum of each leaf that can be saved, and of each constant.

    All processes that have a part of an array must call this.
    """
    texts = [
        LeafSum(path, Kind((), "text"), zlib.crc32(_text(leaf)))
        for path, leaf in by_path(tree).items()
        if isinstance(leaf, _CONSTANTS)
    ]
    named = to_arrays(tree).items()
    return [LeafSum(path, kind, _sum(array)) for path, (kind, array) in named] + texts


def row_sums(tree: PyTree) -> list[LeafSum]:
    """Returns the same of arrays with rows: for each row, as if it were an array."""
    return [
        LeafSum(path, kind._replace(shape=kind.shape[1:]), _sums(array))
        for path, (kind, array) in to_arrays(tree).items()
    ]


def _sum(array: Any) -> int | None:
    is_one = isinstance(array, jax.Array) and array.nbytes >= _WORTH_KEEPING
    if not is_one or is_part(array):  # all processes compute that of a part
        return _new_sum(array)
    found = _kept.get(array)
    return _kept.put(array, _new_sum(array)) if found is None else found


def _new_sum(array: Any) -> int | None:
    is_large = isinstance(array, jax.Array) and array.nbytes > _LARGE
    if is_large or is_part(array):
        return int(jax.device_get(_mixed_sum(array)))
    return checksum(array)


def _sums(array: Any) -> UInt32[np.ndarray, " rows"]:
    rows = len(array)
    if is_part(array):
        whole = NamedSharding(array.sharding.mesh, PartitionSpec())
        return jax.device_get(jax.device_put(_mixed_sums(array), whole))
    if isinstance(array, jax.Array) and array.nbytes > _LARGE * rows:
        return jax.device_get(_mixed_sums(array))
    host = np.ascontiguousarray(jax.device_get(array)).reshape(rows, array[:1].size)
    return np.array([zlib.crc32(row.tobytes()) for row in host], np.uint32)


def words(array: Array) -> Array:
    """Returns the bits of an array as a vector of unsigned integers."""
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag])
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    info = jnp.finfo if jnp.issubdtype(array.dtype, jnp.inexact) else jnp.iinfo
    if info(array.dtype).bits < 8:
        # They have no words of their own; each is one of these numbers.
        array = array.astype(jnp.float32)
    word = min(array.dtype.itemsize, 4)
    bits = lax.bitcast_convert_type(array, f"uint{8 * word}").ravel()
    return bits.astype(jnp.uint32)


def weighted_sum(bits: UInt32[Array, " words"]) -> UInt32[Array, ""]:
    """Sums words up, each times its place."""
    places = 2 * lax.iota(jnp.uint32, bits.size) + 1
    return jnp.sum(bits * places, dtype=jnp.uint32)


@jax.jit
def _mixed_sum(array: Array) -> UInt32[Array, ""]:
    bits = words(array)
    # As in MurmurHash: the last bits of many floating-point numbers are zero.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return weighted_sum(bits)


_mixed_sums = jax.jit(jax.vmap(_mixed_sum))

"""Fingerprints, by which processes find out whether they were given the same."""

import hashlib
from typing import Any

import jax

from .._boundary import PyTree, unaddressed
from .._tree import checksum, to_arrays


def fingerprint(text: Any) -> str:
    """Hashes a text, without the addresses of objects in it."""
    return hashlib.sha256(unaddressed(str(text)).encode()).hexdigest()


def leaf_fingerprints(tree: PyTree, max_bytes: int | None = None) -> dict[str, str]:
    """Returns the kind and the checksum of each array of a tree, by path.

    There is no checksum where a process has only a part of an array, or where an array
    on devices of several processes has more than `max_bytes`.
    """
    arrays = to_arrays(tree)
    cheap = {p: leaf for p, leaf in arrays.items() if _is_cheap(leaf.array, max_bytes)}
    sums = {path: checksum(leaf.array) for path, leaf in cheap.items()}
    return {path: f"{leaf.kind} {sums.get(path)}" for path, leaf in arrays.items()}


def _is_cheap(array: Any, max_bytes: int | None) -> bool:
    is_local = not isinstance(array, jax.Array) or array.is_fully_addressable
    return is_local or max_bytes is None or array.nbytes <= max_bytes

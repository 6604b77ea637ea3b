"""Arrays in 64 bits, and what becomes of them while `jax_enable_x64` is off."""

import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .names import spelled
from .warnings import PrecisionWarning, warn_once

T = TypeVar("T")

REMEDY = '`jax.config.update("jax_enable_x64", True)` at the start of the program'

# How many numbers of an array are looked at first.
_SAMPLE = 256

# Rounding matters where it is more than this part of the spread of the data.
_FRACTION = 1e-3

# Of a time, or another coordinate in order, it matters where it is more than this part
# of the steps, too; but not where it is less than that part of the spread.
_FRACTION_OF_STEP = 1e-2
_LEAST_FRACTION = 1e-5

# Fewer numbers may be in order by accident.
_LEAST_IN_ORDER = 8

_LARGEST = np.finfo(np.float32).max


def is_x64_on() -> bool:
    """Whether JAX computes in 64 bits, here and now."""
    return bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


def is_wide(dtype: Any) -> bool:
    """Whether JAX has a dtype only while `jax_enable_x64` is on."""
    if not isinstance(dtype, np.dtype):
        return False  # Of a key.
    kind, size = dtype.kind, dtype.itemsize
    return size > 8 if kind == "c" else size > 4 and kind in "fiu"


def is_cut(leaf: Any) -> bool:
    """Whether JAX would compute with less than what an array has."""
    # In this order for speed, since it is asked at every step.
    return (
        is_wide(getattr(leaf, "dtype", None))
        and not is_x64_on()
        and isinstance(leaf, jax.Array | np.ndarray | np.generic)
        and not isinstance(leaf, Tracer)
    )


def _is_swapped(leaf: Any) -> bool:
    """Whether an array has another byte order than the machine, as in FITS files."""
    return isinstance(leaf, np.ndarray) and not leaf.dtype.isnative


def narrowed(leaf: Any, where: str) -> Any:
    """Returns an array in the precision and the byte order that JAX computes with.

    Warns, and calls it `where`, if its digits matter: if the spacing of float32 at the
    data is more than a thousandth of their spread, or a hundredth of their steps.
    """
    if _is_swapped(leaf):
        leaf = leaf.astype(leaf.dtype.newbyteorder("="))
    if not is_cut(leaf):
        return leaf
    array: Any = np.asarray(leaf)
    if array.size > 1 or array.dtype.kind in "iu":
        _warn_of_rounding(array, where)
    return _cut(leaf) if isinstance(leaf, jax.Array) else leaf


def narrowed_tree(tree: T) -> T:
    """Narrows JAX's own arrays in a tree, without a warning."""
    if is_x64_on():
        return tree
    is_one = lambda leaf: isinstance(leaf, jax.Array) and is_cut(leaf)
    return jax.tree.map(lambda leaf: _cut(leaf) if is_one(leaf) else leaf, tree)


def narrowed_leaves(tree: T, name: str) -> T:
    """Narrows the arrays of a tree; warnings name them by their paths in `name`."""
    if not any(is_cut(leaf) or _is_swapped(leaf) for leaf in jax.tree.leaves(tree)):
        return tree
    narrow = lambda keys, leaf: narrowed(leaf, spelled(name, keys))
    return jax.tree_util.tree_map_with_path(narrow, tree)


def _cut(leaf: Any) -> Any:
    # JAX would leave the dtype of its own arrays as it is, and mix the two.
    array = np.asarray(leaf)
    return jnp.asarray(array.item() if leaf.weak_type and not leaf.ndim else array)


def _warn_of_rounding(array: np.ndarray, where: str) -> None:
    if array.dtype.kind == "c":
        for part in (np.real(array), np.imag(array)):
            _warn_of_rounding(part, where)
        return
    if _is_fine(array.reshape(-1)[:: max(array.size // _SAMPLE, 1)]):
        return
    low, high = _range(array)
    largest = max(abs(low), abs(high))
    otherwise = "subtract a reference first"
    # NaN where float32 does not reach that far.
    step = spacing(largest, np.float32)
    if array.dtype.kind in "iu":
        if largest <= np.iinfo(f"{array.dtype.kind}4").max:
            return
        what = f"has numbers up to {largest}, which do not fit into 32 bits"
    elif largest > _LARGEST:
        otherwise = "use another unit"
        what = f"has numbers up to {largest:.3g}, which are infinite in float32"
    else:
        spread = high - low
        is_coarse = spread > 0 and not step <= _FRACTION * spread
        near = _step(array) if step > _LEAST_FRACTION * spread > 0 else np.nan
        if not (is_coarse or step > _FRACTION_OF_STEP * near):
            return
        shown = f"span {low:.10g} to {high:.10g}"
        shown = shown if is_coarse else f"are in steps of {near:.2g}"
        what = (
            f"is rounded to float32, whose spacing there is {step:.2g}, while the data "
            f"{shown}"
        )
        if not _is_normal(largest):
            otherwise = "use another unit"
    warn_once(
        f"{where} {what}. Turn on `jax_enable_x64`, by {REMEDY}; or {otherwise}.",
        PrecisionWarning,
        # The same leaf is a part of `data` to `fit`, and of `batch` to `step`.
        (re.sub(r"^`(data|batch)", "", where), int(np.log10(largest))),
    )


def _is_fine(few: np.ndarray) -> bool:
    """Whether a sample shows, in a few microseconds, that rounding does not matter."""
    if not few.size:
        return True
    low, high = float(few.min()), float(few.max())
    largest, spread = max(-low, high), high - low
    if few.dtype.kind in "iu":
        return largest < 2**31
    step = largest * 2.0**-23
    is_small = step <= _LEAST_FRACTION * spread or (
        step <= _FRACTION * spread and not _are_in_order(np.diff(few))
    )
    return spread == 0 or (_is_normal(largest) and is_small)


def _are_in_order(steps: np.ndarray) -> bool:
    """Whether steps go up, or down: those of a few series, which follow each other."""
    ordered = max(np.count_nonzero(steps >= 0), np.count_nonzero(steps <= 0))
    return bool(ordered >= 0.9 * steps.size)


def _step(array: np.ndarray) -> float:
    """Returns the median step between neighbours, NaN of what is not in order."""
    flat = array.reshape(-1)
    steps = np.diff(flat[np.isfinite(flat)])
    moves = abs(steps[steps != 0])
    if moves.size < _LEAST_IN_ORDER or not _are_in_order(steps):
        return np.nan
    return float(np.median(moves))


def _is_normal(largest: Any) -> bool:
    return bool(1e-30 < largest < 1e38)


def spacing(value: Any, dtype: Any) -> float:
    """Returns the distance of neighbours in a floating-point dtype; NaN at infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.abs(np.asarray(value).astype(dtype))
        if near.dtype.isbuiltin == 1:
            return float(np.spacing(near))
    # NumPy itself does not have the dtype, such as bfloat16.
    _, exponent = np.frexp(float(near))
    return float(jnp.finfo(near.dtype).eps) * 2.0 ** (int(exponent) - 1)


def _range(array: np.ndarray) -> tuple[Any, Any]:
    """Returns the lowest and the highest number of an array, if it is finite."""
    low, high = array.min(), array.max()
    if array.dtype.kind == "f" and not (np.isfinite(low) and np.isfinite(high)):
        finite = array[np.isfinite(array)]
        return (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    return low, high

"""Arrays in 64 bits, and how much it matters where JAX rounds them to 32."""

import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .frames import PrecisionWarning, warn_once
from .names import spelled
from .type_checks import PyTree

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

# All integers below it are exact in float32.
_EXACT = 2**24

# A larger array is not copied from an accelerator to be looked at.
_MOST_BYTES = 2**22


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


def warn_of_single_leaves(tree: PyTree, name: str) -> None:
    """Warns of arrays in order, such as times, that were given in float32.

    Their digits may be lost already, or are lost where the model computes with them.
    """
    if is_x64_on():
        return
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if getattr(leaf, "dtype", None) == np.float32 and _is_at_hand(leaf):
            _warn_of_single(np.asarray(leaf), spelled(name, keys))


def rounded_integers(tree: PyTree) -> list[int]:
    """Returns which leaves are integers that tell less from each other in float32."""
    if is_x64_on():
        return []
    return [i for i, x in integers_at_hand(tree).items() if _is_rounded_as_float(x)]


def integers_at_hand(tree: PyTree) -> dict[int, np.ndarray]:
    """Returns the leaves of integers that the host can look at, by their number."""
    is_one = lambda leaf: (
        getattr(getattr(leaf, "dtype", None), "kind", "") in ("i", "u")
        and _is_at_hand(leaf)
    )
    leaves = enumerate(jax.tree.leaves(tree))
    return {i: np.asarray(leaf) for i, leaf in leaves if is_one(leaf)}


def _is_at_hand(leaf: Any) -> bool:
    """Whether the host can look at an array, and soon."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return isinstance(leaf, np.ndarray)
    if leaf.is_deleted() or not leaf.is_fully_addressable:
        return False
    on_cpu = all(device.platform == "cpu" for device in leaf.devices())
    return on_cpu or leaf.nbytes <= _MOST_BYTES


def _cut(leaf: Any) -> Any:
    # JAX would leave the dtype of its own arrays as it is, and mix the two.
    array = np.asarray(leaf)
    return jnp.asarray(array.item() if leaf.weak_type and not leaf.ndim else array)


def _warn_of_rounding(array: np.ndarray, where: str) -> None:
    """Warns of an array in 64 bits whose digits matter."""
    if array.dtype.kind == "c":
        for part in (np.real(array), np.imag(array)):
            _warn_of_rounding(part, where)
        return
    if _is_fine(_sample(array)):
        return
    low, high = _range(array)
    largest = max(abs(low), abs(high))
    otherwise = "subtract a reference first"
    if array.dtype.kind in "iu":
        if largest <= np.iinfo(f"{array.dtype.kind}4").max:
            return
        what = f"has numbers up to {largest}, which do not fit into 32 bits"
    elif largest > _LARGEST:
        otherwise = "use another unit"
        what = f"has numbers up to {largest:.3g}, which are infinite in float32"
    else:
        step, shown = _coarse(array, low, high)
        if not shown:
            return
        what = (
            f"is rounded to float32, whose spacing there is {step:.2g}, while the data "
            f"{shown}"
        )
        if not _is_normal(largest):
            otherwise = "use another unit"
    warn_once(
        f"{where} {what}. Turn on `jax_enable_x64`, by {REMEDY}; or {otherwise}.",
        PrecisionWarning,
        _subject(where, largest),
    )


def _warn_of_single(array: np.ndarray, where: str) -> None:
    """Warns of coordinates in order, given in float32, whose steps are too small."""
    if _is_fine(_sample(array)) or np.isnan(_step(array)):
        return
    low, high = _range(array)
    step, shown = _coarse(array, low, high)
    if shown:
        warn_once(
            f"{where} is in float32, whose spacing there is {step:.2g}, while the data "
            f"{shown}. Subtract a reference first, in NumPy and float64; or turn on "
            f"`jax_enable_x64` before the array is made, by {REMEDY}.",
            PrecisionWarning,
            _subject(where, max(abs(low), abs(high))),
        )


def warn_of_rounded_integers(array: np.ndarray, where: str) -> None:
    """Warns of integers that a model turns into float32."""
    largest = max(abs(float(end)) for end in _range(array))
    warn_once(
        f"{where} has integers up to {largest:.0f}, which the model turns into "
        f"float32, whose spacing there is {spacing(largest, np.float32):.3g}. Subtract "
        f"a reference while they are integers; or turn on `jax_enable_x64`, by "
        f"{REMEDY}.",
        PrecisionWarning,
        _subject(where, largest),
    )


def _is_rounded_as_float(array: np.ndarray) -> bool:
    """Whether integers tell less from each other once they are in float32."""
    if array.size < 2 or float(abs(_sample(array)).max()) < _EXACT:
        return False
    return bool(_coarse(array.astype(float), *_range(array))[1])


def _coarse(array: np.ndarray, low: Any, high: Any) -> tuple[float, str]:
    """Returns the spacing of float32 at an array, and what it is too coarse for.

    The latter is empty where the spacing is fine.
    """
    # NaN where float32 does not reach that far.
    step, spread = spacing(max(abs(low), abs(high)), np.float32), high - low
    if spread > 0 and not step <= _FRACTION * spread:
        return step, f"span {low:.10g} to {high:.10g}"
    near = _step(array) if step > _LEAST_FRACTION * spread > 0 else np.nan
    if step > _FRACTION_OF_STEP * near:
        return step, f"are in steps of {near:.2g}"
    return step, ""


def _subject(where: str, largest: Any) -> tuple[str, int]:
    # The same leaf is a part of `data` to `fit`, and of `batch` to `step`.
    return re.sub(r"^`(data|batch)", "", where), int(np.log10(largest))


def _sample(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)[:: max(array.size // _SAMPLE, 1)]


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

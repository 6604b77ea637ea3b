"""What JAX cannot use, or would drop: arrays that mean more, dictionaries."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .names import spelled_leaves

_NUMBERS = jax.Array | np.ndarray | np.generic | int | float | complex


def refuse_foreign(leaf: Any, where: str) -> None:
    """Refuses an array whose meaning JAX would drop, or that it cannot compute with.

    These are masked arrays, quantities with a unit, sparse matrices, arrays of other
    libraries, arrays of objects, text, dates or records, and deleted arrays of JAX.
    What is not an array passes. An error calls the leaf `where`.
    """
    if isinstance(leaf, jax.Array):
        if is_deleted(leaf):
            raise has_been_deleted(where)
    elif isinstance(leaf, np.ndarray):
        refuse_meaning(leaf, f"{where} is", "JAX would compute with what is masked")
        if leaf.dtype.kind in "OSUMm" or leaf.dtype.type is np.void:
            raise TypeError(
                f"{where} is an array of dtype {leaf.dtype}, which JAX cannot compute "
                "with. Turn it into numbers, or leave it out."
            )
    elif isinstance(leaf, type | np.generic | jax.ShapeDtypeStruct):
        return
    elif hasattr(leaf, "__array__") or hasattr(leaf, "__dlpack__"):
        raise TypeError(
            f"{where} is a {type(leaf).__name__}, an array of another library. Turn it "
            "into one of JAX's: `jax.numpy.asarray(numpy.asarray(x))`."
        )
    elif hasattr(leaf, "toarray") and hasattr(leaf, "tocsr"):
        # NumPy takes it for an object.
        raise TypeError(
            f"{where} is a {type(leaf).__name__}, a sparse matrix of SciPy, which JAX "
            "cannot compute with. Give `x.toarray()`, or "
            "`jax.experimental.sparse.BCOO.from_scipy_sparse(x)`."
        )


def refuse_meaning(leaf: Any, where: str, loss: str) -> None:
    """Refuses an array of NumPy that means more than its numbers.

    The error begins with `where`, such as "`batch` has the leaf 'x',". `loss` says what
    would happen to a mask, such as "JAX would compute with what is masked".
    """
    if isinstance(leaf, np.ma.MaskedArray):
        remedy = (
            "Leave those data out (`y.compressed()`, and `x[~y.mask]` of all else); or "
            "fill them (`y.filled(0)`) and give the mask to a likelihood, by "
            "`where=~y.mask`."
            if np.ma.is_masked(leaf)
            else "Nothing is masked in this one: give `y.data`."
        )
        raise TypeError(f"{where} a masked array, and {loss}. {remedy}")
    if isinstance(leaf, np.ndarray) and type(leaf) not in (np.ndarray, np.memmap):
        unit = " (of a Quantity, `x.to_value(unit)`)" if hasattr(leaf, "unit") else ""
        raise TypeError(
            f"{where} a {type(leaf).__name__}, an array that means more than its "
            f"numbers, and the rest would be dropped. Give the numbers: "
            f"`numpy.asarray(x)`{unit}."
        )


def require_numbers(tree: Any, argument: str, remedy: str) -> None:
    """Checks that each leaf is an array of numbers, or a number that JAX can hold.

    An error calls the tree `argument`, and ends with `remedy`.
    """
    for where, leaf in spelled_leaves(argument, tree):
        if not isinstance(leaf, _NUMBERS):
            raise TypeError(
                f"{where} is of type `{type(leaf).__name__}`, but must be an array or "
                f"a number. {remedy}"
            )
        refuse_foreign(leaf, where)
        limits = np.iinfo(jnp.result_type(int))
        if isinstance(leaf, int) and not limits.min <= leaf <= limits.max:
            raise ValueError(
                f"{where} is {leaf}, which does not fit into the {limits.bits} bits of "
                "JAX's integers. Give a float."
            )


def is_deleted(leaf: Any) -> bool:
    """Whether the memory of an array of JAX is gone."""
    return not isinstance(leaf, Tracer) and leaf.is_deleted()


def has_been_deleted(where: str) -> ValueError:
    """Returns the error for an array whose memory is gone."""
    return ValueError(
        f"{where} is an array that has been deleted: its memory was given to another "
        "one, by `donate_argnums` or `donate=`. Make it again, or do not donate it."
    )


def unsorted(where: str, tree: Any) -> ValueError | None:
    """Returns the error for a dictionary whose keys JAX cannot sort, if there is one.

    An error calls the tree `where`.
    """
    for name, node in spelled_leaves(where, tree, _is_unsorted):
        if _is_unsorted(node):
            kinds = dict.fromkeys(f"`{type(key).__name__}`" for key in node)
            return ValueError(
                f"{name} is a dictionary with keys of type {' and '.join(kinds)}, "
                "which JAX cannot sort. Make them strings, or give a "
                "`collections.OrderedDict`."
            )
    return None


def _is_unsorted(node: Any) -> bool:
    """Whether it is a dictionary whose keys JAX would bring in order, and cannot."""
    if not isinstance(node, dict) or isinstance(node, collections.OrderedDict):
        return False
    try:
        sorted(node)
    except TypeError:
        return True
    return False

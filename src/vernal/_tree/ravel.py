"""Trees of parameters as flat vectors, in the order of `ravel_pytree`."""

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from .._boundary import Params, dotted, is_deleted, refuse_foreign, spelled
from .by_name import by_path


def as_parameters(params: Params, name: str = "params") -> Params:
    """Checks that there are leaves, all real and floating, and makes each an array."""
    leaves = jax.tree.leaves(params)
    if not leaves:
        raise ValueError(
            f"`{name}` holds no parameter: it needs at least one floating-point array."
        )
    # Asked several times in each call, so where each leaf is must not be looked up in
    # vain.
    if all(map(_is_ready, leaves)):
        return params
    convert = lambda keys, leaf: _as_parameter(leaf, keys, name)
    return jax.tree_util.tree_map_with_path(convert, params)


def _is_ready(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array) and not is_deleted(leaf)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def _as_parameter(leaf: Any, keys: tuple[Any, ...], name: str) -> Array:
    refuse_foreign(leaf, spelled(name, keys))
    if isinstance(leaf, float):
        # A dtype that is written out is strong, and stays so across a step.
        return jnp.asarray(leaf, jnp.result_type(float))
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        kind = type(leaf).__name__ if dtype is None else dtype
        raise TypeError(
            f"`{name}` may hold floating-point arrays only, with `None` elsewhere, but "
            f"its leaf {dotted(keys)!r} is {kind}. Select the trained leaves first, "
            "for instance with `eqx.filter(model, eqx.is_inexact_array)`."
        )
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"`{name}` must be real, but its leaf {dotted(keys)!r} is {dtype}. Write "
            "it as two real parameters, its real and its imaginary part."
        )
    return jnp.asarray(leaf)


def ravel_dtype(params: Params) -> np.dtype:
    """Returns the dtype that holds every leaf of `params`."""
    return widest(leaf.dtype for leaf in jax.tree.leaves(params))


def ravel(params: Params, dtype: DTypeLike | None = None) -> Float[Array, " D"]:
    """Joins the leaves of `params` into one vector of `dtype`.

    Each leaf is cast by name rather than by promotion, so that leaves of different
    precision meet under strict promotion too.
    """
    dtype = ravel_dtype(params) if dtype is None else dtype
    return jnp.concatenate(
        [jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(params)]
    )


def unravel(flat: Float[Array, " D"], like: Params) -> Params:
    """Undoes `ravel`: each leaf has the shape and the dtype that it has in `like`."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    pieces = [
        jax.lax.slice(flat, (end - leaf.size,), (end,))
        .reshape(leaf.shape)
        .astype(leaf.dtype)
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return jax.tree.unflatten(structure, pieces)


def ravel_size(params: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def element_name(params: Params, index: int) -> str:
    """Returns the name of one element of `ravel(params)`, such as `wfe[6]`."""
    for path, leaf in by_path(params).items():
        size = math.prod(leaf.shape)
        if index < size:
            position = np.unravel_index(index, leaf.shape) if leaf.shape else ()
            suffix = f"[{','.join(map(str, position))}]" if position else ""
            return path + suffix
        index -= size
    raise IndexError(f"No element {index} beyond the last.")


def at_least_single(array: Array) -> Array:
    """Casts an array of floats in half precision, or less, to float32."""
    is_half = jnp.finfo(array.dtype).bits < 32
    return array.astype(jnp.float32) if is_half else array


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Returns the dtype that holds all of these, under strict promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jnp.promote_types, dtypes)

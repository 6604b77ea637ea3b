"""Whether numbers are finite, and the two checks of gradients of zodiax."""

import functools as ft
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool

from .._boundary import PyTree, refuse_foreign, spelled_leaves
from .._tree import is_split, joinable, shape_and_dtype

T = TypeVar("T")


def _is_inexact(leaf: Any) -> bool:
    return isinstance(leaf, float | complex) or (
        hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
    )


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number in the inexact leaves of a tree is finite."""
    return ~any_non_finite(filter(_is_inexact, jax.tree.leaves(tree)))


def each_finite(leaves: Sequence[Array]) -> Bool[Array, " leaves"]:
    """Whether every number is finite, for each leaf."""
    groups = joinable(leaves, shape_and_dtype)
    flags = [
        jax.vmap(all_finite)(jnp.stack([leaves[i] for i in own])) for own in groups
    ]
    return jnp.concatenate(flags)[np.argsort(np.concatenate(groups))]


# In how many pieces an array is joined before it is reduced: XLA's code for a CPU works
# on many elements at once where it joins, and on one where it reduces.
_PIECES, _FEW = 8, 16


def any_non_finite(
    leaves: Iterable[ArrayLike], before: Iterable[ArrayLike] | None = None
) -> Bool[Array, ""]:
    """Whether any number in these arrays is NaN or infinite. Cheap in a loop on a CPU.

    With the same arrays as they were `before`: whether any has become so, or has turned
    from infinite to NaN. The bits of arrays of one size are joined before they are
    reduced; arrays that are split over devices are reduced where they lie.
    """
    new = _parts(leaves)
    marks = map(_marks, new) if before is None else map(_turned, new, _parts(before))
    joined: dict[Any, Array] = {}
    flags = [jnp.array(False)]
    for part, bits in zip(new, marks, strict=True):
        if is_split(part):
            flags.append(jnp.max(bits << 1, initial=0) != 0)
            continue
        kind = bits.dtype, bits.size
        bits = bits.ravel()
        joined[kind] = joined[kind] | bits if kind in joined else bits
    flags += [_joined(bits) != 0 for bits in joined.values()]
    return ft.reduce(operator.or_, flags)


def _parts(leaves: Iterable[ArrayLike]) -> list[Array]:
    """Joins small leaves, if there are many, and takes complex ones apart."""
    leaves = list(leaves)
    whole = [
        jnp.concatenate([jnp.ravel(leaves[i]) for i in own])
        if len(own) > 1
        else jnp.asarray(leaves[own[0]])
        for own in joinable(leaves, jnp.result_type)
    ]
    parts = ([x.real, x.imag] if jnp.iscomplexobj(x) else [x] for x in whole)
    return list(itertools.chain(*parts))


def _marks(x: Array) -> Array:
    """Bits: any beside that of the sign is set where a number is not finite."""
    # Zero times a number is zero, of either sign, if the number is finite, else NaN.
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(x * 0, unsigned)


def _turned(new: Array, old: Array) -> Array:
    """Bits: any is set where a number is not finite, in another way than before."""
    of_nan = lambda x: _marks(jnp.clip(x, -1, 1))
    turned = (_marks(new) & ~_marks(old)) | (of_nan(new) & ~of_nan(old))
    # Two NaNs may differ beside the exponent.
    exponent = jax.lax.bitcast_convert_type(
        jnp.asarray(jnp.inf, new.dtype), turned.dtype
    )
    return turned & exponent


def _joined(bits: Array) -> Array:
    """Returns zero if all bits but those of the signs are zero."""
    if (size := bits.size) == 1:
        return bits[0] << 1
    if size >= _FEW:
        width = -(-size // _PIECES)
        starts = [min(i * width, size - width) for i in range(_PIECES)]
        pieces = [jax.lax.slice(bits, (i,), (i + width,)) for i in starts]
        bits = ft.reduce(jax.lax.bitwise_or, pieces)
    # The largest, since XLA does not join bits across the devices of a CPU.
    return jnp.max(bits << 1, initial=0)


def debug_nan_check(grads: T) -> T:
    """Opens a breakpoint if there is a NaN in the gradients.

    Infinities do not open it. Leaves that are integers or `None` are ignored.

    **Arguments:**

    - `grads`: any pytree.

    **Returns:**

    `grads` itself.

    **Raises:**

    - `TypeError`: if a leaf is a masked array, a quantity with a unit, or the like.
    """
    _require_plain(grads)
    leaves = filter(_is_inexact, jax.tree.leaves(grads))
    flags = [jnp.any(jnp.isnan(leaf)) for leaf in leaves]
    eqx.debug.breakpoint_if(ft.reduce(operator.or_, flags, jnp.array(False)))
    return grads


def zero_nan_check(grads: T) -> T:
    """Replaces every NaN in the gradients by zero.

    Infinities stay, and each leaf keeps its dtype. Leaves that are integers or `None`
    are ignored. To look for infinities too, and for a loss that is not finite, give a
    `Trainer` the policy [`vernal.ZeroNans`][].

    **Arguments:**

    - `grads`: any pytree.

    **Returns:**

    A pytree of the same structure.

    **Raises:** as [`vernal.debug_nan_check`][].
    """
    _require_plain(grads)
    return jax.tree.map(lambda x: _without_nan(x) if _is_inexact(x) else x, grads)


def _without_nan(x: Any) -> Any:
    # JAX would narrow an array of NumPy while `jax_enable_x64` is off.
    if isinstance(x, np.ndarray | np.generic):
        return np.where(np.isnan(x), np.zeros_like(x), x)
    return jnp.where(jnp.isnan(x), 0, x)


def _require_plain(grads: PyTree) -> None:
    for where, leaf in spelled_leaves("grads", grads):
        refuse_foreign(leaf, where)

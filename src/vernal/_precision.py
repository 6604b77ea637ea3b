"""Dtypes that meet, and products in full precision."""

from collections.abc import Iterable
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Returns the dtype that holds all others, under strict promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jnp.promote_types, dtypes)


def matmul(left: Array, right: Array) -> Array:
    """Multiplies in full precision, which accelerators do only when asked."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)

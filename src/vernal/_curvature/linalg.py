"""Dtypes that meet, and products in full precision."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def matmul(left: Array, right: Array) -> Array:
    """Multiplies in full precision, which accelerators do only when asked."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)

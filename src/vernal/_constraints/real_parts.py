"""Complex parameters as pairs of real ones."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array

from .._boundary import PyTree
from .bijections import Bijections


class _Parts(NamedTuple):
    real: Array
    imag: Array


class RealParts(eqx.Module):
    """The map to complex parameters from their real and imaginary parts.

    Then follow the maps of free coordinates, if there are any.
    """

    bijections: Bijections | None
    structure: Any = eqx.field(static=True)
    """That of the complex parameters."""

    def forward(self, parts: PyTree) -> PyTree:
        join = lambda x: lax.complex(*x) if isinstance(x, _Parts) else x
        leaves = map(join, self.structure.flatten_up_to(parts))
        params = self.structure.unflatten(leaves)
        return params if self.bijections is None else self.bijections.forward(params)


def real_parts(params: PyTree) -> PyTree:
    """Returns parameters with two arrays, `real` and `imag`, for each complex one."""
    part = lambda x: _Parts(x.real, x.imag) if jnp.iscomplexobj(x) else x
    return jax.tree.map(part, params)

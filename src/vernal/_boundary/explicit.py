"""Arrays on a mesh whose axes are part of their type, as `jax.make_mesh` makes it."""

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding


def is_explicit(leaf: Any) -> bool:
    """Whether an array has such a type, with which few functions of JAX compute.

    Within `jax.set_mesh` they do, and take no other.
    """
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return (
        type(sharding) is NamedSharding
        and isinstance(sharding.mesh, Mesh)
        and AxisType.Explicit in sharding.mesh.axis_types
        and jax.sharding.get_abstract_mesh().empty
    )


def without_axes(leaf: Any) -> jax.Array:
    """Returns such an array where it lies, with a type that does not say where."""
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    place = NamedSharding(Mesh(mesh.devices, mesh.axis_names), spec)
    return jax.device_put(leaf, place)

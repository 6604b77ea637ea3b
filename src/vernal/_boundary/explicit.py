"""Arrays on a mesh whose axes are part of their type, as `jax.make_mesh` makes it."""

import functools as ft
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from .frames import entrance

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# The mesh that JAX has where none is set.
_NO_MESH = Mesh(np.empty((), object), ())


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


def off_mesh(trainer: T) -> T:
    """Returns a trainer that was put on such a mesh, as a whole, without its axes.

    One of its arrays tells: a step has no time to look at all of them.
    """
    if not is_explicit(getattr(trainer, "best_loss", None)):
        return trainer
    return _mapped(trainer, is_explicit, without_axes)


def outside_mesh(fn: Callable[P, R]) -> Callable[P, R]:
    """Runs a function as if no mesh of explicit axes were set around it.

    Within `jax.set_mesh` of such a mesh Equinox, Lineax and Optimistix raise errors.
    """

    @ft.wraps(fn)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        around = jax.sharding.get_abstract_mesh()
        if AxisType.Explicit not in around.axis_types:
            moved: Any = (*map(off_mesh, args[:1]), *args[1:])
            args = moved
            return fn(*args, **kwargs)
        try:
            context = jax.set_mesh(_NO_MESH)
        except ValueError:  # A program is being traced.
            return fn(*args, **kwargs)
        with context:
            args, kwargs = _mapped((args, kwargs), is_explicit, without_axes)
            result = fn(*args, **kwargs)
        is_there = ft.partial(_is_on, around)
        return _mapped(result, is_there, ft.partial(_with_axes, around))

    return outside


def unmeshed_entrance(fn: Callable[P, R]) -> Callable[P, R]:
    """An `entrance` that is `outside_mesh`."""
    return entrance(outside_mesh(fn))


def _mapped(
    tree: Any, is_meant: Callable[[Any], bool], fn: Callable[[Any], Any]
) -> Any:
    """Maps the leaves that are meant; a tree without any stays the object it is."""
    is_leaf = lambda node: isinstance(node, Iterator)
    if not any(map(is_meant, jax.tree.leaves(tree, is_leaf=is_leaf))):
        return tree
    one = lambda leaf: fn(leaf) if is_meant(leaf) else leaf
    return jax.tree.map(one, tree, is_leaf=is_leaf)


def _is_on(around: AbstractMesh, leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return (
        isinstance(leaf, jax.Array)
        and type(sharding) is NamedSharding
        and sharding.mesh.axis_names == around.axis_names
        and sharding.mesh.axis_sizes == around.axis_sizes
    )


def _with_axes(around: AbstractMesh, leaf: Any) -> jax.Array:
    """Returns an array where it lies, with the type that its mesh has around it."""
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=around.axis_types)
    return jax.device_put(leaf, NamedSharding(mesh, spec))

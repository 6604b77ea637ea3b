"""Where the arrays of a fit lie when there are several devices."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._alike import is_weak
from ._data import Source, Stream, Whole
from ._paths import dotted, named_leaves
from ._selectors import resolve
from ._typing import PyTree

WHOLE = PartitionSpec()

Sharding = Mapping[Any, PartitionSpec]


class _Split(NamedTuple):
    """An array that no device holds whole; what goes with it is split as it is."""

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec


@final
class Placement(eqx.Module):
    """The devices of a fit, and which arrays they share.

    A batch is split along the first axis of the mesh. Of all else each device holds a
    copy, but for what `split` lists: parameters, and the moments and the best of them.

    The compiler divides the work, from where the arrays lie. So the methods of a
    trainer see whole batches, and what they compute is what they compute on one device.
    """

    mesh: Mesh = eqx.field(static=True)
    split: tuple[_Split, ...] = eqx.field(static=True)

    @property
    def axis(self) -> str:
        """The axis of the mesh that batches are split along, or the members of many."""
        return self.mesh.axis_names[0]

    @property
    def size(self) -> int:
        """How many parts a batch is split into."""
        return self.mesh.shape[self.axis]

    def on(self, spec: PartitionSpec) -> NamedSharding:
        """Names a way to lie on the devices."""
        return NamedSharding(self.mesh, spec)

    # What a fit holds.

    def _shardings(self, tree: PyTree) -> PyTree:
        """Finds how each array of a trainer, or of a part of it, is to lie."""
        flat, structure = jax.tree_util.tree_flatten_with_path(tree)
        return structure.unflatten(
            [self.on(self._spec(dotted(keys), leaf)) for keys, leaf in flat]
        )

    def _spec(self, path: str, leaf: Any) -> PartitionSpec:
        # The moments and the best of a parameter end in its path.
        owners = [
            split
            for split in self.split
            if f".{path}".endswith(f".{split.path}") and split.shape == jnp.shape(leaf)
        ]
        return max(owners, key=lambda split: len(split.path)).spec if owners else WHOLE

    def put(self, tree: PyTree) -> Any:
        """Puts a trainer, or a part of it, onto the devices."""
        return jax.tree.map(put, tree, self._shardings(tree))

    def pin(self, tree: PyTree) -> Any:
        """The same within a compiled program."""
        if not jax.tree.leaves(tree):
            return tree
        return lax.with_sharding_constraint(tree, self._shardings(tree))

    def put_rows(self, tree: PyTree, flags: Sequence[bool]) -> Any:
        """Spreads the rows of the flagged leaves of a tree over the devices."""
        leaves, structure = jax.tree.flatten(tree)
        specs = [PartitionSpec(self.axis) if flag else WHOLE for flag in flags]
        return structure.unflatten(map(put, leaves, map(self.on, specs)))

    def pin_rows(self, tree: PyTree, axis: int = 0) -> Any:
        """Spreads the rows of all leaves, along this axis, within a program."""
        spec = PartitionSpec(*[None] * axis, self.axis)
        pin = lambda leaf: lax.with_sharding_constraint(leaf, self.on(spec))
        return jax.tree.map(pin, tree)

    def home(self, tree: PyTree) -> Any:
        """Brings a tree back to one device; but not where some of it is split."""
        if self.split:
            return tree
        return jax.tree.map(lambda leaf: _home(self.whole(leaf)), tree)

    def whole(self, leaf: Any) -> Any:
        """Gives every process the whole of an array."""
        is_part = isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        )
        return jax.device_put(leaf, self.on(WHOLE)) if is_part else leaf

    # What a fit is fed with.

    def source(self, source: Source) -> Source:
        """Puts what a fit is fed with onto the devices, but for a stream."""
        if isinstance(source, Stream):
            return source
        if isinstance(source, Whole):
            return Whole(self.batch(source.batch, "data"))
        if source.size % self.size:
            raise ValueError(
                f"`data`: Minibatches of size {source.size} cannot be shared evenly by "
                f"{self._told}. Make `size` a multiple of {self.size}."
            )
        return eqx.tree_at(lambda s: s.arrays, source, self.put(source.arrays))

    def batch(self, batch: PyTree, argument: str) -> Any:
        """Splits a batch, which every process has whole."""
        return self._map_batch(batch, argument, put)

    def share(self, batch: PyTree) -> Any:
        """Splits a batch of which every process has its own part."""
        return self._map_batch(batch, "data", _put_share)

    def pin_batch(self, batch: PyTree) -> Any:
        """Splits a batch that is made within a compiled program."""
        return self._map_batch(batch, "data", lax.with_sharding_constraint)

    def _map_batch(self, batch: PyTree, argument: str, fn: Any) -> Any:
        flat, structure = jax.tree_util.tree_flatten_with_path(batch)
        return structure.unflatten(
            [
                fn(leaf, self.on(self._spec_of_datum(leaf, dotted(keys), argument)))
                if isinstance(leaf, jax.Array)
                else leaf
                for keys, leaf in flat
            ]
        )

    def _spec_of_datum(self, leaf: Any, path: str, argument: str) -> PartitionSpec:
        if not isinstance(leaf, Tracer) and self._is_here(leaf):
            return leaf.sharding.spec
        if not leaf.ndim:
            return WHOLE
        if leaf.shape[0] % self.size:
            rest = leaf.shape[0] % self.size
            where = f"the leaf {path!r} of `{argument}`" if path else f"`{argument}`"
            raise ValueError(
                f"`mesh`: {where} has the shape {leaf.shape}, and {self._told} cannot "
                f"share its {leaf.shape[0]} rows evenly. Leave out {rest} of them, or "
                "pad with rows that weigh nothing. If its first axis is not one of "
                "examples, put it onto the mesh yourself, and it stays as it is: "
                "`jax.device_put(x, NamedSharding(mesh, PartitionSpec()))`."
            )
        return PartitionSpec(self.axis)

    def _is_here(self, leaf: jax.Array) -> bool:
        """Whether somebody has put an array onto the mesh already."""
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding) or not isinstance(
            sharding.mesh, Mesh
        ):
            return False
        names, devices = sharding.mesh.axis_names, sharding.mesh.devices
        is_same = names == self.mesh.axis_names
        return is_same and np.array_equal(devices, self.mesh.devices)

    @property
    def _told(self) -> str:
        return f"the {self.size} devices along the axis {self.axis!r}"


def placement(trainer: Any, mesh: Any, sharding: Any = None) -> Placement | None:
    """Makes the placement of a fit, `None` if there is no mesh.

    **Arguments:**

    - `trainer`: a trainer.
    - `mesh`, `sharding`: as a user gave them.
    """
    if mesh is None:
        if sharding is not None:
            raise ValueError("`sharding` is for a mesh: pass `mesh` too.")
        return None
    if not isinstance(mesh, Mesh) or not mesh.axis_names:
        raise TypeError(
            f"`mesh` is {mesh!r}, but must be a `jax.sharding.Mesh` with an axis: "
            '`jax.make_mesh((jax.device_count(),), ("data",))`.'
        )
    # The compiler is to divide the work, whoever makes the mesh for what.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    split = () if sharding is None else tuple(_splits(trainer, mesh, sharding))
    return Placement(mesh, split)


def _splits(trainer: Any, mesh: Mesh, sharding: Any) -> list[_Split]:
    if not isinstance(sharding, Mapping):
        raise TypeError(
            f"`sharding` is {sharding!r}, but must be a dictionary of selectors: "
            '`{"layers.*.weight": PartitionSpec(None, "model")}`.'
        )
    specs = list(sharding.values())
    for selector, spec in sharding.items():
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"`sharding`: that of {selector!r} is {spec!r}, but must be a "
                "`jax.sharding.PartitionSpec`."
            )
    model = trainer.model
    owners = resolve(model, list(sharding), argument="sharding")
    leaves = [leaf for leaf in named_leaves(model) if leaf.value is not None]
    splits, frozen = [], 0
    for leaf, kind, owner in zip(leaves, trainer._parts.kinds, owners, strict=True):
        if owner is not None:
            shape, spec = jnp.shape(leaf.value), specs[owner]
            _check_spec(leaf.path, shape, spec, mesh)
            path = f"_parts.frozen.{frozen}" if kind == "frozen" else leaf.path
            splits.append(_Split(path, shape, spec))
        frozen += kind == "frozen"
    return splits


def _check_spec(
    path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> None:
    where = f"`sharding`: {path!r}, of shape {shape}, cannot be split by {spec}"
    if len(spec) > len(shape):
        raise ValueError(f"{where}, which has more entries than there are axes.")
    for length, entry in zip(shape, spec, strict=False):
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for name in names:
            if name not in mesh.axis_names:
                known = ", ".join(map(repr, mesh.axis_names))
                raise ValueError(f"{where}: the axes of the mesh are {known}.")
        parts = int(np.prod([mesh.shape[name] for name in names], dtype=int))
        if length % parts:
            raise ValueError(
                f"{where}: {parts} devices cannot share an axis of {length} evenly."
            )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def put(leaf: Any, sharding: NamedSharding) -> Any:
    """Puts an array onto devices. Each process has the whole of it."""
    if not isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, Tracer):
        return lax.with_sharding_constraint(leaf, sharding)
    if sharding.is_fully_addressable or not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if _is_key(leaf):
        data = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if is_weak(leaf):
        # An array of NumPy's would lose that; and it is taken as it is.
        return leaf
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _put_share(leaf: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable or sharding.is_fully_replicated:
        return put(leaf, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))


def _home(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    if _is_key(leaf):
        data = _home(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # Through the host: so it belongs to no device, and goes with whatever it meets.
    host = np.asarray(leaf)
    if not is_weak(leaf):
        return jax.device_put(host)
    numbers = jax.device_put(host.ravel().tolist())
    return jnp.stack(numbers).reshape(leaf.shape) if leaf.ndim else numbers[0]

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

from .._boundary import PyTree, dotted, spelled
from .._data import Source, Stream, Whole
from .._step import AbstractTrainer, config_of, progress_of, template_of, with_progress
from .._tree import is_key, is_part, is_weak, named_leaves, resolve
from .abstract_placement import ANYWHERE, AbstractPlacement

WHOLE = PartitionSpec()

Sharding = Mapping[Any, PartitionSpec]


class Split(NamedTuple):
    """How an array that no device holds whole is split."""

    shape: tuple[int, ...]
    spec: PartitionSpec


@final
class OnMesh(AbstractPlacement):
    """The devices of a fit, and which arrays they share.

    A batch is split along the first axis of the mesh. Of everything else each device
    holds a copy, except the arrays that the user splits: frozen arrays, and parameters
    with their moments and their best.

    The compiler divides the work by where the arrays lie. So the methods of a trainer
    see whole batches, and compute what they compute on one device.
    """

    devices: Mesh = eqx.field(static=True)
    trained: tuple[tuple[str, Split | None], ...] = eqx.field(static=True, default=())
    """Each trained parameter by its path, where there is anything to be split."""
    frozen: tuple[Split | None, ...] = eqx.field(static=True, default=())
    """Each frozen array, in order."""

    @property
    def mesh(self) -> Mesh:
        return self.devices

    @property
    def axis(self) -> str:
        """The axis of the mesh that batches are split along, or the members of many."""
        return self.mesh.axis_names[0]

    @property
    def size(self) -> int:
        return self.mesh.shape[self.axis]

    @property
    def splits(self) -> bool:
        return any((*self.frozen, *(split for _, split in self.trained)))

    def on(self, spec: PartitionSpec) -> NamedSharding:
        """Returns a sharding over the devices."""
        entries = list(spec)
        # With them JAX takes it for another sharding, and compiles again.
        while entries and entries[-1] is None:
            entries.pop()
        return NamedSharding(self.mesh, PartitionSpec(*entries))

    # What a fit holds.

    def _sharding(self, path: str, leaf: Any) -> NamedSharding:
        # The paths of the moments and of the best of a parameter end in its path. The
        # longest that matches counts, as names may repeat within nodes.
        owners = [
            (len(name), split)
            for name, split in self.trained
            if not name or f".{path}".endswith(f".{name}")
        ]
        split = max(owners, key=lambda owner: owner[0])[1] if owners else None
        fits = split is not None and split.shape == jnp.shape(leaf)
        return self.on(split.spec if split and fits else WHOLE)

    def _shardings(self, tree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: self._sharding(dotted(keys), leaf), tree
        )

    def put(self, trainer: AbstractTrainer) -> Any:
        config, progress = self.put_whole(config_of(trainer)), progress_of(trainer)
        if self.frozen:
            splits = [split.spec if split else WHOLE for split in self.frozen]
            arrays = map(put, template_of(trainer).frozen, map(self.on, splits))
            config = eqx.tree_at(lambda t: template_of(t).frozen, config, tuple(arrays))
        return with_progress(config, self.put_state(progress))

    def put_state(self, state: PyTree) -> Any:
        return jax.tree.map(put, state, self._shardings(state))

    def put_whole(self, tree: PyTree) -> Any:
        return jax.tree.map(lambda leaf: put(leaf, self.on(WHOLE)), tree)

    def pin(self, state: PyTree) -> Any:
        if not jax.tree.leaves(state):
            return state
        return lax.with_sharding_constraint(state, self._shardings(state))

    def put_rows(self, tree: PyTree, flags: Sequence[bool]) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        specs = [PartitionSpec(self.axis) if flag else WHOLE for flag in flags]
        return structure.unflatten(map(put, leaves, map(self.on, specs)))

    def pin_rows(self, tree: PyTree, axis: int = 0) -> Any:
        spec = PartitionSpec(*[None] * axis, self.axis)
        pin = lambda leaf: lax.with_sharding_constraint(leaf, self.on(spec))
        return jax.tree.map(pin, tree)

    def home(self, state: PyTree) -> Any:
        if self.splits:
            return state
        return jax.tree.map(lambda leaf: _home(self.whole(leaf)), state)

    def whole(self, leaf: Any) -> Any:
        return jax.device_put(leaf, self.on(WHOLE)) if is_part(leaf) else leaf

    # What a fit is fed with.

    def source(self, source: Source) -> Source:
        if isinstance(source, Stream):
            return source
        if isinstance(source, Whole):
            return Whole(self.batch(source.batch, "data"))
        if source.size % self.size:
            raise ValueError(
                f"`data`: Minibatches of size {source.size} cannot be shared evenly by "
                f"{self._sharers}. Make `size` a multiple of {self.size}."
            )
        return eqx.tree_at(lambda s: s.arrays, source, self.put_whole(source.arrays))

    def batch(self, batch: PyTree, argument: str) -> Any:
        return self._map_batch(batch, argument, put)

    def share(self, batch: PyTree) -> Any:
        return self._map_batch(batch, "data", _put_share)

    def pin_batch(self, batch: PyTree) -> Any:
        return self._map_batch(batch, "data", lax.with_sharding_constraint)

    def _map_batch(self, batch: PyTree, argument: str, fn: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: (
                fn(leaf, self.on(self._spec_of_datum(leaf, keys, argument)))
                if isinstance(leaf, jax.Array)
                else leaf
            ),
            batch,
        )

    def _spec_of_datum(
        self, leaf: Any, keys: tuple[Any, ...], argument: str
    ) -> PartitionSpec:
        if not isinstance(leaf, Tracer) and self._is_here(leaf):
            return leaf.sharding.spec
        if not leaf.ndim:
            return WHOLE
        if leaf.shape[0] % self.size:
            rows, where = leaf.shape[0], spelled(argument, keys)
            leave = f"Leave out {rows % self.size} of them, or pad"
            raise ValueError(
                f"`mesh`: {where} has the shape {leaf.shape}, and {self._sharers} "
                f"cannot share its {rows} rows evenly. "
                f"{leave if rows > self.size else 'Pad'} with rows that weigh nothing. "
                "If its first axis is not one of "
                "examples, put it onto the mesh yourself, and it stays as it is: "
                "`jax.device_put(x, NamedSharding(mesh, PartitionSpec()))`."
            )
        return PartitionSpec(self.axis)

    def _is_here(self, leaf: jax.Array) -> bool:
        """Whether the user has put an array onto the mesh."""
        sharding = leaf.sharding
        # Within `jax.set_mesh` JAX itself makes arrays there.
        return (
            leaf.committed
            and isinstance(sharding, NamedSharding)
            and isinstance(sharding.mesh, Mesh)
            and sharding.mesh.axis_names == self.mesh.axis_names
            and np.array_equal(sharding.mesh.devices, self.mesh.devices)
        )

    @property
    def _sharers(self) -> str:
        return f"the {self.size} devices along the axis {self.axis!r}"


def placement(
    trainer: AbstractTrainer, mesh: Any, sharding: Any = None
) -> AbstractPlacement:
    """Makes the placement of a fit from what a user gave."""
    if mesh is None:
        if sharding is not None:
            raise ValueError("`sharding` is for a mesh: pass `mesh` too.")
        return ANYWHERE
    if not isinstance(mesh, Mesh) or not mesh.axis_names:
        raise TypeError(
            f"`mesh` is {mesh!r}, but must be a `jax.sharding.Mesh` with an axis: "
            '`jax.make_mesh((jax.device_count(),), ("data",))`.'
        )
    # With axes of automatic type, for which the compiler divides the work.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    if sharding is None:
        return OnMesh(mesh)
    return OnMesh(mesh, *_splits(trainer, mesh, sharding))


def _splits(
    trainer: AbstractTrainer, mesh: Mesh, sharding: Any
) -> tuple[tuple[tuple[str, Split | None], ...], tuple[Split | None, ...]]:
    """Finds what is split of the trained parameters, and of the frozen arrays."""
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
    trained, frozen = [], []
    for leaf, kind, owner in zip(
        leaves, template_of(trainer).kinds, owners, strict=True
    ):
        split = None
        if owner is not None:
            split = Split(jnp.shape(leaf.value), specs[owner])
            _check_spec(leaf.path, *split, mesh)
        if kind == "trained":
            trained.append((leaf.path, split))
        elif kind == "frozen":
            frozen.append(split)
    return tuple(trained), tuple(frozen)


def _check_spec(
    path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> None:
    where = f"`sharding`: {path!r}, of shape {shape}, cannot be split by {spec}"
    if len(spec) > len(shape):
        raise ValueError(f"{where}, which has more entries than there are axes.")
    try:
        NamedSharding(mesh, spec).shard_shape(shape)
    # That an axis is named twice is no `ValueError` of JAX.
    except Exception as error:
        raise ValueError(f"{where}: {error}") from error


def put(leaf: Any, sharding: NamedSharding) -> Any:
    """Puts an array, which each process has whole, onto devices."""
    if not isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, Tracer):
        return lax.with_sharding_constraint(leaf, sharding)
    if sharding.is_fully_addressable or not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if is_key(leaf):
        data = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if is_weak(leaf):
        # NumPy would lose the weak type; JAX accepts the array as it is.
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
    if is_key(leaf):
        data = _home(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # Through the host, so that it is committed to no device.
    return jax.device_put(np.asarray(leaf))

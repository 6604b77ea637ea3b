"""Many trainers as one, whose arrays have a row for each."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._boundary import off_mesh, spelled_leaves, warn
from .._data import Minibatches, Stream
from .._step import (
    AbstractTrainer,
    config_of,
    noted_as,
    progress_of,
    require_precision,
    require_sound,
    with_progress,
)
from .._trainer import Trainer, explain_retrace
from .._tree import by_path
from .mapped_chunk import Flags

T = TypeVar("T")

_MOST_COORDINATES = 3

_STACKED = (
    "`eqx.filter_vmap(make)(keys)`, where `make(key)` returns the trainer of one start."
)


def stacked(given: Any) -> tuple[Any, Flags, int]:
    """Makes one trainer of many.

    Returns it, which leaves of its configuration have a row for each, and their number.
    """
    if isinstance(given, Trainer):
        given = off_mesh(given)
        require_precision(given)
        parts = _as_stacked(given)
        require_sound(given)
        return parts
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(
            f"`trainers` is of type `{type(given).__name__}`, but must be a "
            f"sequence of trainers, or a stacked one: {_STACKED}"
        )
    if not given:
        raise ValueError("`trainers` is empty: there is nothing to fit.")
    given = list(map(off_mesh, given))
    leaves, structures, known = [], [], dict[int, Array]()
    for index, trainer in enumerate(given):
        if not isinstance(trainer, Trainer):
            raise TypeError(f"`trainers[{index}]` is {trainer!r}, not a Trainer.")
        require_precision(trainer)
        require_sound(trainer)
        own, structure = jax.tree.flatten((config_of(trainer), progress_of(trainer)))
        own = [_as_jax(leaf, known) for leaf in own]
        leaves.append(own)
        structures.append(structure)
        if structure != structures[0] or not all(map(_are_alike, own, leaves[0])):
            raise _not_alike(given[0], trainer, index)
    columns = list(zip(*leaves, strict=True))
    of_config = len(jax.tree.leaves(config_of(given[0])))
    # What all of them share, such as a large frozen array, needs no rows.
    flags = [_is_own(column) for column in columns[:of_config]]
    is_stacked = [*flags, *[True] * (len(columns) - of_config)]
    rows = stack([x for x, flag in zip(columns, is_stacked, strict=True) if flag])
    together = [
        next(rows) if flag else column[0]
        for column, flag in zip(columns, is_stacked, strict=True)
    ]
    config, progress = structures[0].unflatten(together)
    trainers = noted_as(with_progress(config, progress), *given)
    return trainers, tuple(flags), len(given)


def _as_jax(leaf: Any, known: dict[int, Array]) -> Any:
    """Converts an array of NumPy, such as a field of a class; a shared one once."""
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    if id(leaf) not in known:
        known[id(leaf)] = jnp.asarray(leaf)
    return known[id(leaf)]


def _is_own(column: Sequence[Any]) -> bool:
    is_array = isinstance(column[0], jax.Array)
    return is_array and any(leaf is not column[0] for leaf in column)


def stack(columns: Sequence[Sequence[Array]]) -> Iterator[Array]:
    """Yields for each column one array, whose rows are the arrays in it."""
    # Of a trainer that was never fitted, the best are its parameters.
    keys = [tuple(map(id, column)) for column in columns]
    unlike = dict(zip(keys, columns, strict=True))
    plain = [key for key, column in unlike.items() if not _is_for_jax_alone(column[0])]
    # Through NumPy, for which nothing is compiled.
    _onto_host(leaf for key in plain for leaf in unlike[key])
    arrays = [_rows(unlike[key], np) for key in plain]
    made = dict(zip(plain, jax.device_put(arrays), strict=True))
    for key in keys:
        if key not in made:
            made[key] = _rows(unlike[key], jnp)
        yield made[key]


def _rows(column: Sequence[Array], library: Any) -> Any:
    """Makes one array by NumPy or by `jax.numpy`."""
    if _is_own(column):
        return library.stack(column)
    return library.broadcast_to(column[0], (len(column), *column[0].shape))


def first_rows(tree: T) -> T:
    """Returns a tree with the first row of each of its arrays."""
    leaves, structure = jax.tree.flatten(tree)
    plain = [leaf for leaf in leaves if not _is_for_jax_alone(leaf)]
    _onto_host(plain)
    rows = iter(jax.device_put([np.asarray(leaf)[0] for leaf in plain]))
    first = [leaf[0] if _is_for_jax_alone(leaf) else next(rows) for leaf in leaves]
    return structure.unflatten(first)


def on_host(tree: T) -> T:
    """Returns a tree with arrays of NumPy, a row of which costs next to nothing."""
    is_plain = lambda x: isinstance(x, jax.Array) and not _is_for_jax_alone(x)
    _onto_host(leaf for leaf in jax.tree.leaves(tree) if is_plain(leaf))
    return jax.tree.map(lambda x: np.asarray(x) if is_plain(x) else x, tree)


def on_device(tree: T) -> T:
    """Returns a tree whose arrays of NumPy are those of JAX."""
    leaves, structure = jax.tree.flatten(tree)
    is_plain = [isinstance(leaf, np.ndarray | np.generic) for leaf in leaves]
    # One call for all of them: each takes longer than a row.
    put = iter(jax.device_put([*itertools.compress(leaves, is_plain)]))
    pairs = zip(leaves, is_plain, strict=True)
    return structure.unflatten(next(put) if own else leaf for leaf, own in pairs)


def with_rows(tree: T, rows: Mapping[int, T]) -> T:
    """Returns a tree of stacked arrays, with other rows for some members."""
    leaves, structure = jax.tree.flatten(on_host(tree))
    columns = zip(*map(jax.tree.leaves, rows.values()), strict=True)
    return on_device(
        structure.unflatten(
            _with_rows(leaf, np.array([*rows]), column)
            for leaf, column in zip(leaves, columns, strict=True)
        )
    )


def _with_rows(leaf: Any, index: np.ndarray, rows: Sequence[Any]) -> Any:
    if not isinstance(leaf, np.ndarray):
        return leaf.at[index].set(jnp.stack(rows))
    leaf = leaf.copy()
    leaf[index] = np.stack(rows)
    return leaf


def _onto_host(arrays: Iterable[Array]) -> None:
    """Asks for arrays that are about to be read, all at once: a device is far away."""
    if jax.default_backend() != "cpu":
        for array in arrays:
            array.copy_to_host_async()


def _is_for_jax_alone(leaf: Array) -> bool:
    """Whether NumPy would lose what an array is: a key, or of a weak type."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.weak_type


def _are_alike(leaf: Any, other: Any) -> bool:
    if leaf is other:
        return True
    if isinstance(leaf, jax.Array) and isinstance(other, jax.Array):
        return leaf.shape == other.shape and leaf.dtype == other.dtype
    return bool(leaf == other)


def _not_alike(first: Any, other: Any, index: int) -> ValueError:
    lines = explain_retrace(first, other).split("\n")
    more = [f"and {len(lines) - 8} more."] if len(lines) > 8 else []
    remedy = (
        "Share what is not an array. Make a number in a field an array, as "
        "`jnp.asarray(0.1)`, and those of an optimiser by `optax.inject_hyperparams`."
    )
    if all(line.startswith(("bounds:", "bounds.")) for line in lines):
        remedy = (
            "Give all of them bounds on the same sides, of the same shapes; for none, "
            "a number that is never met, such as -1e30 or 1e30."
        )
    if any(line.endswith("than before") for line in lines):
        remedy += " Define a function or a class once, outside of the loop."
    return ValueError(
        f"`trainers[{index}]` differs from `trainers[0]` in more than the values "
        f"of its arrays. {remedy}\n" + "\n".join([*lines[:8], *more])
    )


def _as_stacked(trainer: AbstractTrainer) -> tuple[Any, Flags, int]:
    if trainer.step_count.ndim != 1:
        raise TypeError(
            "`trainers` is one trainer. Give a sequence of them, or a stacked one: "
            f"{_STACKED}"
        )
    size = len(trainer.step_count)
    for path, leaf in by_path(trainer).items():
        if isinstance(leaf, jax.Array) and leaf.shape[:1] != (size,):
            raise ValueError(
                f"`trainers` is stacked, with {size} members, but the array at "
                f"{path.removeprefix('_progress.')!r} has the shape {leaf.shape}."
            )
    config = jax.tree.leaves(config_of(trainer))
    return trainer, tuple(isinstance(leaf, jax.Array) for leaf in config), size


def at_one_step(stacked: Any) -> Any:
    """Counts all that go on from the step of the last, as if the others had waited."""
    counts, stopped = map(np.asarray, (stacked.step_count, stacked.stopped))
    together = np.where(stopped, counts, counts.max())
    if np.array_equal(together, counts):
        return stacked
    progress = progress_of(stacked)
    progress = dataclasses.replace(progress, step_count=jax.device_put(together))
    return with_progress(stacked, progress)


def require_some_difference(trainers: Any, flags: Flags, data: Any, size: int) -> None:
    """Refuses equal trainers of one batch that seems to have a row for each of them.

    All of them would fit all of it, and be equal still.
    """
    if isinstance(data, Minibatches | Stream):
        return
    rows = [
        (where, leaf.shape)
        for where, leaf in spelled_leaves("data", data)
        if isinstance(leaf, jax.Array | np.ndarray) and leaf.shape[:1] == (size,)
    ]
    if not rows:
        return
    config = zip(jax.tree.leaves(config_of(trainers)), flags, strict=True)
    own = [leaf for leaf, flag in config if flag]
    if all(map(is_same, [*own, *jax.tree.leaves(progress_of(trainers))])):
        where, shape = rows[0]
        raise ValueError(
            f"`trainers` are {size} equal ones, and {where} has the shape {shape}, but "
            "there is no `data_axis`: each would fit all of the data, and all would "
            "end alike. For a row for each give `data_axis=0`, or a tree of axes such "
            "as `data_axis=(None, 0)`; to fit all of the data, `fit` one trainer."
        )
    # Of several arrays with as many rows each row may be a datum, few rows may be
    # coordinates, and an array alone an image.
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(data)}
    is_one_each = len(rows) == 1 and rows[0][1][1:] in shapes - {()}
    if is_one_each and size > _MOST_COORDINATES:
        where, shape = rows[0]
        warn(
            f"{where} has the shape {shape}, with a row for each of the {size} "
            "trainers, but there is no `data_axis`: each fits all rows. For a row for "
            "each give `data_axis=0`, or a tree of axes such as `data_axis=(None, 0)`."
        )


def is_same(rows: Array) -> bool:
    """Whether all rows of an array are alike; a NaN is like another."""
    if not isinstance(rows, jax.Array):
        return True
    if jnp.issubdtype(rows.dtype, jax.dtypes.prng_key):
        rows = jax.random.key_data(rows)
    # By NumPy, for which nothing is compiled.
    values = np.asarray(rows)
    first = values[:1]
    return bool(((values == first) | ((values != values) & (first != first))).all())

"""The leaves of a tree as plain arrays with names, and back again."""

import enum
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import PyTree, is_wide, is_x64_on, refuse_meaning
from .by_name import by_path
from .paths import LONG_DOUBLES
from .structure import disagreements

# In this order: a boolean is an integer too.
_NUMBERS = {kind.__name__: kind for kind in (bool, int, float, complex)}
_Number = bool | int | float | complex


class LoadError(ValueError):
    """A file or a checkpoint cannot be loaded; the subclass says why."""


class MismatchError(LoadError):
    """A saved tree does not fit into the tree that it is loaded into."""


class Kind(NamedTuple):
    """The properties that one leaf needs to take the place of another."""

    shape: tuple[int, ...]
    dtype: str
    """An array's dtype, `key<...>` for PRNG keys, or the type of a Python number."""

    @property
    def is_key(self) -> bool:
        return self.dtype.startswith("key<")

    @property
    def is_number(self) -> bool:
        """Whether it is the kind of a Python number, or of an array of one boolean."""
        return self.dtype in _NUMBERS and not self.shape

    def __str__(self) -> str:
        if self.is_number:
            return f"a Python {self.dtype}"
        return f"{self.dtype}{list(self.shape)}"


def as_kind(shape: Any, dtype: Any) -> Kind:
    """Returns the kind that a file names, which may be anything."""
    is_shape = isinstance(shape, list) and all(
        type(side) is int and side >= 0 for side in shape
    )
    if is_shape and isinstance(dtype, str):
        kind = Kind(tuple(shape), dtype)
        if kind.is_key or kind.is_number:
            return kind
        named = np.dtype(dtype)
        if str(named) == dtype and _is_kept(named):
            return kind
    raise ValueError(f"there is no array of shape {shape!r} and dtype {dtype!r}")


class NamedArray(NamedTuple):
    """A leaf as it is saved."""

    kind: Kind
    array: Any
    """An array of JAX or NumPy; for PRNG keys, their data."""


def to_arrays(tree: PyTree) -> dict[str, NamedArray]:
    """Returns the leaves of a tree that can be saved: arrays, PRNG keys and numbers.

    Functions, strings and the like are left out: they are the program, not its data.
    So is whatever `require_keepable` refuses.
    """
    return {
        path: NamedArray(_kind(leaf), _data(leaf))
        for path, leaf in _named(tree)
        if _can_be_kept(leaf)
    }


def from_arrays(kept: Mapping[str, NamedArray], like: PyTree, source: str) -> PyTree:
    """Puts what `to_arrays` returned into a tree of the same structure.

    Leaves that cannot be saved stay as they are in `like`. If the two are not alike, a
    `MismatchError` names the leaves that differ; it calls the place of the file
    `source`.
    """
    own = dict(_named(like))
    expected = {
        path: _kind(leaf)
        for path, leaf in own.items()
        if _can_be_kept(leaf) and (path in kept or not _was_left_out(leaf))
    }
    require_alike_kinds({p: k.kind for p, k in kept.items()}, expected, source)
    wide = [p for p, leaf in own.items() if _is_of_jax(leaf) and is_wide(leaf.dtype)]
    if wide and not is_x64_on():
        raise MismatchError(
            f"{source} holds {wide[0]!r} as {expected[wide[0]]}, and so does the tree "
            "that it is to be loaded into, but `jax_enable_x64` is off. Turn it on."
        )
    leaves = [
        _as_before(path, kept[path].array, leaf, source) if path in expected else leaf
        for path, leaf in own.items()
    ]
    return jax.tree.structure(like).unflatten(leaves)


def require_keepable(tree: PyTree) -> None:
    """Refuses a `tree` with data that could not be saved, or only as something else."""
    for path, leaf in _named(tree):
        where = f"`tree` has the leaf {path!r}," if path else "`tree` is"
        refuse_meaning(leaf, where, "its mask would be lost")
        if isinstance(leaf, np.ndarray | np.generic):
            if not _is_kept(leaf.dtype) or leaf.dtype.type in LONG_DOUBLES:
                raise TypeError(
                    f"{where} an array of dtype {leaf.dtype}, which a file cannot hold "
                    "for every machine. Turn it into arrays of numbers (of a "
                    "structured one, a dictionary with one for each field), or leave "
                    "it out."
                )
        elif isinstance(leaf, _Number):
            _require_plain(leaf, where)
        elif not isinstance(leaf, jax.Array | type) and (
            hasattr(leaf, "__array__") or isinstance(leaf, numbers.Number)
        ):
            raise TypeError(
                f"{where} a {type(leaf).__name__}, which is data that a file cannot "
                "hold. Turn it into an array of NumPy or a Python number, or leave it "
                "out."
            )


def _require_plain(number: _Number, where: str) -> None:
    if isinstance(number, int) and not -(2**63) <= number < 2**64:
        raise ValueError(
            f"{where} an integer of {number.bit_length()} bits, and a file holds 64. "
            "Give a float, or leave it out."
        )
    if not isinstance(number, enum.Enum) and getattr(number, "__dict__", None):
        raise TypeError(
            f"{where} a {type(number).__name__}, a number with attributes "
            f"({', '.join(vars(number))}), and these would be lost. Give the plain "
            "number."
        )


def require_alike_kinds(
    kept: Mapping[str, Kind], expected: Mapping[str, Kind], source: str
) -> None:
    """Checks the kinds of saved leaves, and names those that differ."""
    if odd := disagreements(kept, expected):
        named = [
            f"{path!r} is {there or 'absent'} there and {here or 'absent'} here"
            for path, there, here in odd[:5]
        ]
        more = f"; and {len(odd) - 5} more" if len(odd) > 5 else ""
        # Some may differ in the number of bits alone.
        name = lambda kind: kind and kind.dtype.rstrip("0123456789")
        is_cut = any(name(there) == name(here) for _, there, here in odd)
        with_x64 = ", with `jax_enable_x64` as it was" if is_cut else ""
        raise MismatchError(
            f"{source} holds another tree than the one that it is to be loaded into: "
            f"{'; '.join(named)}{more}. Make the model and its optimiser as they "
            f"were{with_x64}."
        )


def _named(tree: PyTree) -> Iterable[tuple[str, Any]]:
    """Yields every leaf with a path that no other leaf has."""
    named = by_path(tree)
    taken, counts = set(named.names), dict[str, int]()
    for path, leaf in named.items():
        count = counts.get(path, 0) + 1
        # A key may look like the name that would be given to another leaf.
        while count > 1 and f"{path}#{count}" in taken:
            count += 1
        counts[path] = count
        yield (path if count == 1 else f"{path}#{count}"), leaf


def _is_of_jax(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _is_kept(dtype: np.dtype) -> bool:
    """Whether arrays of a dtype of NumPy can be saved, as all those of JAX can."""
    return dtype.kind in "biufcmMSU" or dtype.isbuiltin == 2


def _can_be_kept(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return _is_kept(leaf.dtype) and not isinstance(leaf, str | bytes)
    return _is_of_jax(leaf) or isinstance(leaf, _Number)


def _was_left_out(leaf: Any) -> bool:
    """Whether files of the first versions lack such a leaf."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "SUMm"
    return isinstance(leaf, _Number) and type(leaf) not in _NUMBERS.values()


def is_key(leaf: Any) -> bool:
    return _is_of_jax(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kind(leaf: Any) -> Kind:
    if hasattr(leaf, "dtype"):
        return Kind(tuple(leaf.shape), str(leaf.dtype))
    name = next(name for name, kind in _NUMBERS.items() if isinstance(leaf, kind))
    return Kind((), name)


def _data(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _as_before(path: str, array: Any, like: Any, source: str) -> Any:
    """Turns an array into the kind of leaf that `like` is."""
    if is_key(like):
        return _as_key(path, array, like, source)
    if isinstance(array, jax.Array) and isinstance(like, jax.Array):
        return array  # Processes may have parts of it.
    array = np.asarray(array)
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.device_put(array, like.sharding)
    if isinstance(like, jax.Array):
        # Unlike `jnp.asarray`, which may copy, this takes over the memory if it can.
        return jax.device_put(array)
    if isinstance(like, np.ndarray):
        where = f"`like` has the leaf {path!r}," if path else "`like` is"
        refuse_meaning(like, where, "its mask would be lost")
        return array
    if isinstance(like, np.generic):
        return array[()]
    number = array.item()
    try:
        return type(like)(number)
    except (TypeError, ValueError) as error:
        raise MismatchError(
            f"{source} holds {path!r} as {number}, not a {type(like).__name__}: {error}"
        ) from error


def _as_key(path: str, array: Any, like: Any, source: str) -> Any:
    data = array if isinstance(array, jax.Array) else jax.device_put(np.asarray(array))
    one = like if isinstance(like, jax.Array) else jnp.empty((), like.dtype)
    if data.shape[-1:] != jax.random.key_data(one).shape[-1:]:
        raise MismatchError(
            f"{source} holds {path!r} as a key of {data.shape[-1]} words, which no "
            f"{like.dtype} has."
        )
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(one))

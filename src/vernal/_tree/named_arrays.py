"""The leaves of a tree as plain arrays with names, and back again."""

import enum
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import PyTree, dotted, is_on, is_wide, refuse_meaning
from .paths import LONG_DOUBLES

# In this order: a boolean is an integer too.
_NUMBERS = {kind.__name__: kind for kind in (bool, int, float, complex)}
_Number = bool | int | float | complex


class LoadError(ValueError):
    """A file, or a checkpoint, cannot be loaded. What is wrong is in the subclass."""


class MismatchError(LoadError):
    """What was saved does not fit into the tree that it is loaded into."""


class Kind(NamedTuple):
    """What must be alike for one leaf to take the place of another."""

    shape: tuple[int, ...]
    dtype: str
    """That of an array, `key<...>` of a PRNG key, or the name of a Python number."""

    @property
    def is_key(self) -> bool:
        """Whether it is that of PRNG keys."""
        return self.dtype.startswith("key<")

    @property
    def is_number(self) -> bool:
        """Whether it is that of a Python number. (An array of one boolean looks so.)"""
        return self.dtype in _NUMBERS and not self.shape

    def __str__(self) -> str:
        if self.is_number:
            return f"a Python {self.dtype}"
        return f"{self.dtype}{list(self.shape)}"


def as_kind(shape: Any, dtype: Any) -> Kind:
    """Makes a kind of what a file says, which may be anything."""
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
    """A leaf as it is kept."""

    kind: Kind
    array: Any
    """An array of JAX or NumPy; of a PRNG key, its data."""


def to_arrays(tree: PyTree) -> dict[str, NamedArray]:
    """Lists what can be kept of a tree by path: arrays, PRNG keys and numbers.

    Functions, strings and the like are left out: they are the program, not its data.
    So is what `require_keepable` refuses.
    """
    return {
        path: NamedArray(_kind(leaf), _data(leaf))
        for path, leaf in _named(tree)
        if _can_be_kept(leaf)
    }


def from_arrays(kept: Mapping[str, NamedArray], like: PyTree, source: str) -> PyTree:
    """Puts what was kept of one tree into another like it.

    **Arguments:**

    - `kept`: what `to_arrays` returned.
    - `like`: a tree of the same structure. Leaves that cannot be kept stay its own.
    - `source`: what an error calls the place where it was kept.

    **Raises:**

    - `MismatchError`: if the two are not alike; it names the leaves that differ.
    """
    own = dict(_named(like))
    expected = {
        path: _kind(leaf)
        for path, leaf in own.items()
        if _can_be_kept(leaf) and (path in kept or not _was_left_out(leaf))
    }
    require_alike_kinds({p: k.kind for p, k in kept.items()}, expected, source)
    wide = [p for p, leaf in own.items() if _is_cut(leaf)]
    if wide:
        raise MismatchError(
            f"{source} holds {wide[0]!r} as {expected[wide[0]]}, and so does the tree "
            "that it is to be loaded into, but `jax_enable_x64` is off. Turn it on."
        )
    leaves = [
        _as_before(path, kept[path].array, leaf, source) if path in expected else leaf
        for path, leaf in own.items()
    ]
    return jax.tree.structure(like).unflatten(leaves)


def require_keepable(tree: PyTree, argument: str) -> None:
    """Refuses a tree with data that could not be kept, or not as what they are."""
    for path, leaf in _named(tree):
        where = f"`{argument}` has the leaf {path!r}," if path else f"`{argument}` is"
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
    """Names the leaves in which what was kept differs from what is expected."""
    pairs = {path: (kept.get(path), expected.get(path)) for path in (*kept, *expected)}
    odd = [
        f"{path!r} is {_described(there)} there and {_described(here)} here"
        for path, (there, here) in pairs.items()
        if there != here
    ]
    if odd:
        with_x64 = ", with `jax_enable_x64` as it was" if _by_precision(pairs) else ""
        more = f"; and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise MismatchError(
            f"{source} holds another tree than the one that it is to be loaded into: "
            f"{'; '.join(odd[:5])}{more}. Make the model and its optimiser as they "
            f"were{with_x64}."
        )


def _by_precision(pairs: Mapping[str, tuple[Kind | None, Kind | None]]) -> bool:
    """Whether what differs may do so in the number of bits alone."""
    name = lambda kind: kind and kind.dtype.rstrip("0123456789")
    return any(a != b and name(a) == name(b) for a, b in pairs.values())


def _described(kind: Kind | None) -> str:
    return "absent" if kind is None else str(kind)


def _named(tree: PyTree) -> Iterable[tuple[str, Any]]:
    """Yields every leaf with a path that no other leaf has."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    dotted_paths = [dotted(keys) for keys, _ in flat]
    taken, counts = set(dotted_paths), dict[str, int]()
    for path, (_, leaf) in zip(dotted_paths, flat, strict=True):
        count = counts.get(path, 0) + 1
        # A key may look like the name that would be given to another leaf.
        while count > 1 and f"{path}#{count}" in taken:
            count += 1
        counts[path] = count
        yield (path if count == 1 else f"{path}#{count}"), leaf


def _is_of_jax(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _is_array(leaf: Any) -> bool:
    return _is_of_jax(leaf) or isinstance(leaf, np.ndarray | np.generic)


def _is_kept(dtype: np.dtype) -> bool:
    """Whether arrays of a dtype of NumPy are kept. Those of JAX all have a name."""
    return dtype.kind in "biufcmMSU" or dtype.isbuiltin == 2


def _can_be_kept(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return _is_kept(leaf.dtype) and not isinstance(leaf, str | bytes)
    return _is_of_jax(leaf) or isinstance(leaf, _Number)


def _was_left_out(leaf: Any) -> bool:
    """Whether files of the first versions, which left some leaves out, lack this."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "SUMm"
    return isinstance(leaf, _Number) and type(leaf) not in _NUMBERS.values()


def _is_cut(leaf: Any) -> bool:
    return _is_of_jax(leaf) and not is_key(leaf) and is_wide(leaf.dtype) and not is_on()


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of PRNG keys."""
    return _is_of_jax(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kind(leaf: Any) -> Kind:
    if _is_array(leaf):
        return Kind(tuple(leaf.shape), str(leaf.dtype))
    name = next(name for name, kind in _NUMBERS.items() if isinstance(leaf, kind))
    return Kind((), name)


def _data(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if _is_array(leaf) else np.asarray(leaf)


def _as_before(path: str, array: Any, like: Any, source: str) -> Any:
    """Makes of an array the kind of leaf that `like` is."""
    is_placed = isinstance(array, jax.Array)  # It may be spread over processes.
    array = array if is_placed else np.asarray(array)
    if is_key(like):
        return _as_key(path, array, like, source)
    if is_placed and isinstance(like, jax.Array):
        return array
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
            f"{source} holds {path!r} as {number}, which is no {type(like).__name__}: "
            f"{error}"
        ) from error


def _as_key(path: str, data: np.ndarray | jax.Array, like: Any, source: str) -> Any:
    one = like if isinstance(like, jax.Array) else jnp.empty((), like.dtype)
    if data.shape[-1:] != jax.random.key_data(one).shape[-1:]:
        raise MismatchError(
            f"{source} holds {path!r} as a key of {data.shape[-1]} words, which no "
            f"{like.dtype} has."
        )
    placed = data if isinstance(data, jax.Array) else jax.device_put(data)
    return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(one))


def is_part(leaf: Any) -> bool:
    """Whether a leaf is an array of which other processes have what this has not."""
    return isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )

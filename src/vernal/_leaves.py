"""The leaves of a tree as plain arrays with names, and back again."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._paths import dotted
from ._typing import PyTree
from ._x64 import is_on, is_wide

_NUMBERS = {kind.__name__: kind for kind in (bool, int, float, complex)}


class LoadError(ValueError):
    """A file, or a checkpoint, cannot be loaded. What is wrong is in the subclass."""


class MismatchError(LoadError):
    """What was saved does not fit into the tree that it is loaded into."""


class Kind(NamedTuple):
    """What must be alike for one leaf to take the place of another."""

    shape: tuple[int, ...]
    dtype: str
    """That of an array, `key<...>` of a PRNG key, or the name of a Python number."""

    def __str__(self) -> str:
        if self.dtype in _NUMBERS:
            return f"a Python {self.dtype}"
        return f"{self.dtype}{list(self.shape)}"


class NamedArray(NamedTuple):
    """A leaf as it is kept."""

    kind: Kind
    array: Any
    """An array of JAX or NumPy; of a PRNG key, its data."""


def to_arrays(tree: PyTree) -> dict[str, NamedArray]:
    """Lists what can be kept of a tree by path: arrays, PRNG keys and numbers.

    Functions, strings and the like are left out: they are the program, not its data.
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
    expected = {path: _kind(leaf) for path, leaf in own.items() if _can_be_kept(leaf)}
    require_alike_kinds({p: k.kind for p, k in kept.items()}, expected, source)
    wide = [p for p, leaf in own.items() if _is_cut(leaf)]
    if wide:
        raise MismatchError(
            f"{source} holds {wide[0]!r} as {expected[wide[0]]}, and so does the tree "
            "that it is to be loaded into, but `jax_enable_x64` is off. Turn it on."
        )
    leaves = [
        _as_before(kept[path].array, leaf) if path in expected else leaf
        for path, leaf in own.items()
    ]
    return jax.tree.structure(like).unflatten(leaves)


def require_alike_kinds(
    kept: Mapping[str, Kind], expected: Mapping[str, Kind], source: str
) -> None:
    """Names the leaves in which what was kept differs from what is expected."""
    pairs = {path: (kept.get(path), expected.get(path)) for path in (*kept, *expected)}
    odd = [
        f"{path!r} is {_told(there)} there and {_told(here)} here"
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


def _told(kind: Kind | None) -> str:
    return "absent" if kind is None else str(kind)


def _named(tree: PyTree) -> Iterable[tuple[str, Any]]:
    """Yields every leaf with a path that no other leaf has."""
    seen: dict[str, int] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = dotted(keys)
        seen[path] = seen.get(path, 0) + 1
        yield (path if seen[path] == 1 else f"{path}#{seen[path]}"), leaf


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _can_be_kept(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, jax.Array) or type(leaf).__name__ in _NUMBERS


def _is_cut(leaf: Any) -> bool:
    is_number = isinstance(leaf, jax.Array) and not is_key(leaf)
    return is_number and is_wide(leaf.dtype) and not is_on()


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _kind(leaf: Any) -> Kind:
    if _is_array(leaf):
        return Kind(tuple(leaf.shape), str(leaf.dtype))
    return Kind((), type(leaf).__name__)


def _data(leaf: Any) -> Any:
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if _is_array(leaf) else np.asarray(leaf)


def _as_before(array: Any, like: Any) -> Any:
    """Makes of an array the kind of leaf that `like` is."""
    if is_key(like):
        data = jnp.asarray(array)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array):
        return jnp.asarray(array)
    if isinstance(like, np.ndarray):
        return np.asarray(array)
    return type(like)(np.asarray(array)[()])


def is_part(leaf: Any) -> bool:
    """Whether a leaf is an array of which other processes have what this has not."""
    return isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )

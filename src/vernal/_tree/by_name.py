"""Trees taken apart into leaves with names, and dictionaries by such names."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax.tree_util as jtu

from .._boundary import dotted, nearest_names
from .paths import UnknownPathError

T = TypeVar("T")


class NamedTree(NamedTuple):
    """The leaves of a tree in order, their names, and its structure."""

    names: tuple[str, ...]
    leaves: list[Any]
    structure: Any

    def items(self) -> Iterator[tuple[str, Any]]:
        return zip(self.names, self.leaves, strict=True)

    def by_name(self) -> dict[str, Any]:
        return dict(self.items())

    def within(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Makes a function of some leaves, by name, from one of the whole tree.

        All other leaves are held.
        """

        # A line search passes on the arguments that it finds in the signature.
        @functools.wraps(fn)
        def within(own: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            leaves = [own.get(name, leaf) for name, leaf in self.items()]
            whole = self.structure.unflatten(leaves)
            return fn(whole, *args, **kwargs)

        return within


def by_path(tree: Any) -> NamedTree:
    """Names each leaf by its dotted path."""
    return _named(tree, dotted)


def uniquely_named(tree: Any) -> NamedTree:
    """Names each leaf by its dotted path, or by JAX's key path if two were the same."""
    named = by_path(tree)
    is_unique = len(set(named.names)) == len(named.names)
    return named if is_unique else _named(tree, jtu.keystr)


def _named(tree: Any, name: Callable[[tuple[Any, ...]], str]) -> NamedTree:
    flat, structure = jtu.tree_flatten_with_path(tree)
    names = tuple(name(keys) for keys, _ in flat)
    return NamedTree(names, [leaf for _, leaf in flat], structure)


class ByName(dict[str, T]):
    """A dictionary whose error, where a name is missing, says which are like it.

    JAX maps it like any dictionary.
    """

    def __missing__(self, name: Any) -> NoReturn:
        raise unknown_name("There is no", name, self)


def unknown_name(told: str, name: Any, known: Iterable[str]) -> UnknownPathError:
    """Returns the error for a name that is not among those that are known."""
    near = nearest_names(str(name), list(known))
    return UnknownPathError(f"{told} {name!r}. {near}")


def _flatten_with_keys(tree: ByName[Any]) -> tuple[Any, tuple[str, ...]]:
    names = tuple(sorted(tree))
    return [(jtu.DictKey(name), tree[name]) for name in names], names


jtu.register_pytree_with_keys(
    ByName,
    _flatten_with_keys,
    lambda names, values: ByName(zip(names, values, strict=True)),
)

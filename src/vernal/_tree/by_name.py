"""Dictionaries by the names of parameters and of their elements."""

from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar

import jax

from .._boundary import nearest_names
from .paths import UnknownPathError

T = TypeVar("T")


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
    return [(jax.tree_util.DictKey(name), tree[name]) for name in names], names


jax.tree_util.register_pytree_with_keys(
    ByName,
    _flatten_with_keys,
    lambda names, values: ByName(zip(names, values, strict=True)),
)

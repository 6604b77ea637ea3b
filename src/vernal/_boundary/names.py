"""Names of leaves: as dotted paths, as Python writes them, and the nearest ones."""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.tree_util import keystr, tree_leaves_with_path


def dotted(keys: tuple[Any, ...]) -> str:
    """Returns the dotted path of one of JAX's key paths."""
    return keystr(keys, simple=True, separator=".")


def spelled(name: str, keys: tuple[Any, ...]) -> str:
    """Writes where a leaf is as Python does: `` `data['x'][0]` ``, in backticks."""
    return f"`{name}{keystr(keys)}`"


def spelled_leaves(
    name: str, tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yields each leaf of a tree beside where it is, as `spelled` writes it."""
    for keys, leaf in tree_leaves_with_path(tree, is_leaf=is_leaf):
        yield spelled(name, keys), leaf


def unaddressed(text: str) -> str:
    """Leaves out the addresses of objects, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def nearest_names(name: str, candidates: Sequence[str]) -> str:
    """Returns a sentence with the candidates that look most like `name`."""
    close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    return f"There is {first_names(candidates) or 'nothing'}."


def first_names(names: Sequence[Any], written: Callable[[Any], str] = repr) -> str:
    """Lists the first of some names, and says how many more there are."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(written, names[:8])) + more


def in_few_words(value: Any) -> str:
    """Writes a value that a user gave, by its type if it would be long."""
    text = f"of type `{type(value).__name__}`"
    if value is None:
        return "None"
    leaves = jax.tree.leaves(value)
    if len(leaves) != 1 or leaves[0] is not value or hasattr(value, "shape"):
        return text
    line = repr(value)
    return line if len(line) <= 60 and "\n" not in line else text

"""Mappings from selectors of parameters, given by a user."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from .._boundary import PyTree
from .._tree import by_path, require_atoms, resolve


def owned(
    given: Any, argument: str, model: PyTree, known: Callable[[str], str | None]
) -> dict[str, Any]:
    """Returns what a mapping from selectors says of each leaf of a model, by path.

    The most specific selector wins. `known` says why a leaf cannot have such an entry,
    or nothing; or it is `None`, and that of the leaf is left out. A selector that finds
    leaves that cannot have one alone is refused.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"`{argument}` is of type `{type(given).__name__}`, but must be a "
            "dictionary, from selectors of parameters such as `'power'` or "
            "`'**.flux'`."
        )
    selectors, values = list(given), list(given.values())
    require_atoms(selectors, argument)
    owners = resolve(model, selectors, argument=argument)
    found: dict[int, list[str]] = {rule: [] for rule in range(len(selectors))}
    for path, owner in zip(by_path(model).names, owners, strict=True):
        if owner is not None:
            found[owner].append(path)
    chosen: dict[str, Any] = {}
    for rule, paths in found.items():
        reasons = {path: known(path) for path in paths}
        if paths and all(reasons.values()):
            raise ValueError(f"`{argument}`: {paths[0]!r} is {reasons[paths[0]]}")
        fit = [path for path, reason in reasons.items() if reason == ""]
        chosen |= dict.fromkeys(fit, values[rule])
    return chosen


def replaced(tree: PyTree, new: Mapping[str, Array]) -> PyTree:
    """Returns a tree with other leaves, by path."""
    named = by_path(tree)
    return named.structure.unflatten([new.get(path, x) for path, x in named.items()])


def shape_of(fn: Callable[[Any], Any], like: Any, what: str) -> Any:
    """Returns the shape and the dtype of what a user's function, `what`, returns."""
    try:
        return jax.eval_shape(fn, like)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{what} cannot be evaluated for shape {like.shape}: {error}"
        ) from error


def require_wide(shape: tuple[int, ...], path: str, like: Array, what: str) -> None:
    """Refuses a shape that does not broadcast to that of the parameter at `path`."""
    try:
        fits = np.broadcast_shapes(shape, like.shape) == like.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{what} of {path!r} has shape {shape}, which does not broadcast to that "
            f"of the parameter, {like.shape}."
        )

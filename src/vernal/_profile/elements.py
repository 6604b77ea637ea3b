"""Elements of the parameters, by the names that they have in reports.

And the values of the model's own elements, where a trainer has free coordinates.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._boundary import nearest_names
from .._constraints import tolerance_of
from .._program import program
from .._step import (
    AbstractTrainer,
    in_free_coordinates,
    stripped,
    template_of,
    tied_words,
)
from .._tree import (
    UnknownPathError,
    by_path,
    element_name,
    ravel_size,
    resolve,
)


def places(trainer: AbstractTrainer) -> list[tuple[str, int]]:
    """Lists the path of each element, and its place in that parameter."""
    leaves = by_path(trainer.params).items()
    return [(path, place) for path, x in leaves for place in range(x.size)]


def coupled(trainer: AbstractTrainer) -> set[str]:
    """Returns the parameters whose elements have no coordinate of their own."""
    if template_of(trainer).bijections is None:
        return set()
    found = jax.device_get(run_coupled(stripped(trainer)))
    return {path for path, is_coupled in found.items() if is_coupled}


def values_of(
    trainer: AbstractTrainer, index: int, free: Float[np.ndarray, " K"]
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Returns an element at values of its free coordinate, and the derivatives."""
    path, place = places(trainer)[index]
    if path not in _maps(trainer):
        return free, np.ones_like(free)
    bare = stripped(trainer)
    value, slope = jax.device_get(run_values(bare, path, np.int32(place), free))
    return value.astype(float), slope


def coordinates_of(
    trainer: AbstractTrainer, index: int, values: Float[np.ndarray, " K"]
) -> Float[np.ndarray, " K"]:
    """Returns the free coordinate of an element at its values; NaN if it has none."""
    path, place = places(trainer)[index]
    if path not in _maps(trainer):
        return values
    args = stripped(trainer), path, np.int32(place), values
    free = np.asarray(run_coordinates(*args), float)
    return np.where(np.isfinite(free), free, np.nan)


def _maps(trainer: AbstractTrainer) -> dict[str, Any]:
    bijections = template_of(trainer).bijections
    return {} if bijections is None else bijections.maps


@program
def run_coupled(trainer: AbstractTrainer) -> dict[str, Bool[Array, ""]]:
    """Finds out for each bijection whether it couples elements."""
    bijections: Any = template_of(trainer).bijections
    leaves, found = by_path(trainer.params).by_name(), {}
    for path in bijections.maps:
        x, forward = leaves[path], bijections.flat_map(path, leaves[path])
        if jax.eval_shape(forward, x.ravel()).size != x.size:
            found[path] = jnp.array(True)
            continue
        # What is coupled is so almost everywhere.
        draws = np.random.default_rng(0).normal(size=(3, x.size))
        points = x.ravel()[None, :] + jnp.asarray(draws, x.dtype)
        jacobian = jax.vmap(jax.jacfwd(forward))(points)
        others = ~np.eye(x.size, dtype=bool)[None]
        found[path] = jnp.any(others & (jacobian != 0))
    return found


@program
def run_values(
    trainer: AbstractTrainer, path: str, place: Int[Any, ""], free: Float[Any, " K"]
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    leaf = by_path(trainer.params).by_name()[path]
    bijections: Any = template_of(trainer).bijections
    forward, _ = bijections.of_element(path, leaf, place)
    at = jnp.asarray(free, leaf.dtype)
    value, slope = jax.vmap(jax.value_and_grad(forward))(at)
    # A map may be NaN at infinity, where it has a limit or grows without one.
    far = float(jnp.finfo(leaf.dtype).max) ** 0.5 / 4
    limit = jax.vmap(forward)(jnp.clip(at, -far, far))
    way = jnp.sign(jax.grad(forward)(leaf.ravel()[place]))
    limit = jnp.where(jnp.abs(limit) < far**0.5, limit, way * at)
    return jnp.where(jnp.isinf(at) & jnp.isnan(value), limit, value), slope


@program
def run_coordinates(
    trainer: AbstractTrainer, path: str, place: Int[Any, ""], values: Float[Any, " K"]
) -> Float[Array, " K"]:
    leaf = by_path(trainer.params).by_name()[path]
    bijections: Any = template_of(trainer).bijections
    forward, inverse = bijections.of_element(path, leaf, place)

    def one(value: Array) -> Array:
        free = inverse(value)
        again, slope = jax.value_and_grad(forward)(free)
        # Of a value near zero the rounding is that of the coordinate.
        size = jnp.abs(value) + jnp.abs(slope) * (1 + jnp.abs(free))
        is_same = jnp.abs(again - value) <= tolerance_of(value) * size
        return jnp.where(is_same, free, jnp.nan)

    return jax.vmap(one)(jnp.asarray(values, leaf.dtype))


def names_of(trainer: AbstractTrainer) -> list[str]:
    params = trainer.params
    return [element_name(params, index) for index in range(ravel_size(params))]


def find_elements(
    trainer: AbstractTrainer, given: Any, argument: str
) -> dict[str, int]:
    """Finds the elements that names or selectors choose, in the order of these.

    **Raises:**

    - `UnknownPathError`: if a name finds nothing.
    - `ValueError`: if it finds nothing that is free, or what a bijection couples.
    """
    trainer = in_free_coordinates(trainer)
    every, names = names_of(trainer), coupled(trainer)
    mapped = {i for i, (path, _) in enumerate(places(trainer)) if path in names}
    if given is None and len(mapped) < len(every):
        return {n: index for index, n in enumerate(every) if index not in mapped}
    given = every if given is None else given
    if not isinstance(given, Sequence) or (not given and given != ""):
        raise TypeError(
            f"`{argument}` is {given!r}, but must be a sequence of the names of "
            'parameters, such as `("power", "wfe[6]")`.'
        )
    found: dict[str, int] = {}
    for name in [given] if isinstance(given, str) else given:
        is_element = isinstance(name, str) and name in every
        own = [every.index(name)] if is_element else _selected(trainer, name, argument)
        if mapped.intersection(own):
            raise ValueError(
                f"`{argument}`: the bijection of {name!r} couples its elements, and a "
                "profile holds one of them. Give the parameter a pair `(low, high)` "
                "instead; or use `trainer.propagate` or `trainer.draw`."
            )
        found |= {every[index]: index for index in own}
    return found


def find_element(trainer: AbstractTrainer, name: str, argument: str) -> tuple[str, int]:
    found = find_elements(trainer, name, argument)
    if len(found) > 1:
        raise ValueError(
            f"`{argument}`: {name!r} names {len(found)} elements, and a profile is of "
            f"one: {', '.join(map(repr, list(found)[:4]))}, ..."
        )
    ((own, index),) = found.items()
    return own, index


def _selected(trainer: AbstractTrainer, selector: Any, argument: str) -> list[int]:
    every, model = names_of(trainer), trainer.model
    if isinstance(selector, str) and (path := selector.partition("[")[0]) != selector:
        same = [name for name in every if name.partition("[")[0] == path]
        raise UnknownPathError(
            f"`{argument}`: there is no element {selector!r}. "
            f"{nearest_names(selector, same or every)}"
        )
    owners = resolve(model, [selector], argument=argument)
    chosen = {
        path
        for path, owner in zip(by_path(model).names, owners, strict=True)
        if owner is not None
    }
    index = [i for i, (path, _) in enumerate(places(trainer)) if path in chosen]
    if not index:
        path = min(chosen)
        tied, why = tied_words(trainer), "is frozen: name one that is fitted"
        if path in tied:
            why = f"is {tied[path]}, and moves with that: name what it follows"
        elif path in by_path(trainer.params).names:
            why = "has no elements: name a parameter that has some"
        raise ValueError(f"`{argument}`: {path!r} {why}.")
    return index

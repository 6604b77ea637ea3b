"""Elements of the parameters, by the names that they have in reports."""

from collections.abc import Sequence
from typing import Any

from .._boundary import nearest_names
from .._step import AbstractTrainer, in_free_coordinates, tied_words
from .._tree import (
    UnknownPathError,
    by_path,
    element_name,
    ravel_size,
    resolve,
)
from .own_values import coupled, places


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

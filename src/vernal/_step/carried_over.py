"""The state with which another optimiser goes on."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._boundary import PyTree
from .._optimiser import ParamOptimiser, other_maker, state_makers
from .._tree import is_alike
from .abstract_trainer import AbstractTrainer
from .construct import initial_opt_state
from .hyperparams import computed, settled, user_set


def carried_over(
    trainer: AbstractTrainer,
    optimiser: Any,
    params: PyTree,
    latent: PyTree,
) -> PyTree:
    """Returns the state with which a new optimiser continues, at the given point.

    That is the state of the trainer's optimiser, with what the user has changed, if its
    structure, shapes and dtypes are those of the first state of the new optimiser, and
    it has the same meaning; otherwise it is that first state. Each rule of a
    `ParamOptimiser` has a state of its own.
    """
    first = lambda tx: initial_opt_state(tx, params, latent)
    old, new = trainer.optimiser, optimiser
    before = functools.cache(lambda: first(old))
    if not (isinstance(old, ParamOptimiser) and isinstance(new, ParamOptimiser)):
        return _continued((old, trainer.opt_state, before), (new, first(new)))
    states, fresh = trainer.opt_state, first(new)
    places = {own: place for place, own in enumerate(_members(states))}
    groups = []
    for index, (own, state) in enumerate(
        zip(_members(fresh), fresh.groups, strict=True)
    ):
        if (place := places.get(own)) is not None:
            begun = lambda place=place: before().groups[place]
            was = _rule(old, place), states.groups[place], begun
            state = _continued(was, (_rule(new, index), state))
        groups.append(state)
    was = old.first, states.first, lambda: before().first
    joint = _continued(was, (new.first, fresh.first))
    return dataclasses.replace(fresh, first=joint, groups=tuple(groups))


def _members(state: Any) -> list[tuple[Any, ...]]:
    """Lists the parameters of each rule, with their shapes."""
    found: list[list[Any]] = [[] for _ in state.groups]
    for *member, owner in zip(state.paths, state.shapes, state.owners, strict=True):
        found[owner] += member
    return list(map(tuple, found))


def _rule(optimiser: ParamOptimiser, index: int) -> Any:
    return (*optimiser.transforms, optimiser.default)[index]


def _continued(
    old: tuple[Any, PyTree, Callable[[], PyTree]], new: tuple[Any, PyTree]
) -> PyTree:
    """Returns the state of an old transformation, if a new one can go on with it.

    The old one is given with its state now, and with a function to its first state; the
    new one with its first state, which is returned otherwise.
    """
    (was, state, before), (tx, fresh) = old, new
    if not _fits(state, fresh) or other_maker(state_makers(was), state_makers(tx)):
        return fresh
    now = user_set(fresh)
    return settled(state, user_set(before()), now) if jax.tree.leaves(now) else state


def _fits(old: PyTree, new: PyTree) -> bool:
    # What a user sets may be an integer at first, and a float later.
    return is_alike(old, new, np.shape) and is_alike(computed(old), computed(new))

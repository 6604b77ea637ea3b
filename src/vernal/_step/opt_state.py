"""The state of an optimiser: what a user sets in it, and with what another goes on."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.core import Tracer
from jaxtyping import Array

from .._boundary import PyTree
from .._optimiser import ParamOptimiser, other_maker, state_makers
from .._tree import cast_like, is_alike, is_inexact
from .abstract_trainer import AbstractTrainer, member_axes, precision_of
from .construct import initial_opt_state

# The fields of Optax's states that a user gives the first value of. All else in a state
# is computed from the parameters and the gradients.
_USER_SET: dict[type, str] = {
    optax.InjectHyperparamsState: "hyperparams",
    optax.InjectStatefulHyperparamsState: "hyperparams",
    optax.AddNoiseState: "rng_key",
    optax.contrib.DifferentiallyPrivateAggregateState: "rng_key",
    optax.contrib.ScheduleFreeState: "b1",
    optax.contrib.MomoState: "lb",
    optax.contrib.MomoAdamState: "lb",
    optax.contrib.DAdaptAdamWState: "estim_lr",
    optax.contrib.ProdigyState: "estim_lr",
}


def _user_set(state: PyTree) -> PyTree:
    """Picks what a user sets out of an optimiser's state, with `None` elsewhere.

    A hyperparameter with a schedule is left out: every step sets it.
    """
    return eqx.filter(state, _flags(state, False))


def _computed(state: PyTree) -> PyTree:
    """Picks all else out of it, with `None` elsewhere."""
    return eqx.filter(state, _flags(state, False), inverse=True)


def _flags(state: PyTree, is_set: bool) -> PyTree:
    is_known = lambda node: type(node) in _USER_SET
    return jax.tree.map(
        lambda node: _flags_of(node) if is_known(node) else is_set,
        state,
        is_leaf=is_known,
    )


def _flags_of(node: Any) -> Any:
    name = _USER_SET[type(node)]
    fields = {
        field: _flags(getattr(node, field), field == name) for field in node._fields
    }
    for scheduled in getattr(node, "hyperparams_states", ()):
        fields[name][scheduled] = False
    return type(node)(**fields)


def beginning(trainer: AbstractTrainer) -> PyTree:
    """Returns what the user set of a trainer's optimiser, as in its first state."""
    if not jax.tree.leaves(_user_set(trainer.opt_state)):
        return None
    first = lambda of: _user_set(initial_opt_state(of.optimiser, of.params, of.latent))
    if trainer.step_count.ndim:
        first = eqx.filter_vmap(first, in_axes=(member_axes(trainer.step_count),))
    with precision_of(trainer):
        return first(trainer)


def settled(state: PyTree, before: PyTree, now: PyTree) -> PyTree:
    """Puts into an optimiser's state what a user has changed since its first state.

    `before` and `now` are what `_user_set` picks of the first states of the optimiser
    whose state it is, and of the one to continue with.
    """
    return jax.tree.map(_settled, state, before, now)


def _settled(old: Any, before: Any, now: Any) -> Any:
    if before is None or now is None:
        return old
    is_other = _differs(before, now)
    if not isinstance(is_other, Tracer) and not is_other.any():
        return old
    # The dtype stays if it can, so that nothing is compiled again.
    now = cast_like(now, old) if is_inexact(old) or not is_inexact(now) else now
    if not isinstance(is_other, Tracer) and is_other.all() and now.shape == old.shape:
        return now
    return jnp.where(is_other, now, old)


def _differs(a: Array, b: Array) -> Any:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
        return (a != b).any(-1)
    if a.dtype == jnp.uint32:
        # A raw key: its words belong together.
        return (a != b).any(-1, keepdims=True)
    return (a != b) & ~((a != a) & (b != b))


def carried_over(
    trainer: AbstractTrainer, optimiser: Any, params: PyTree, latent: PyTree
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
    both = isinstance(old, ParamOptimiser) and isinstance(new, ParamOptimiser)
    if not both or trainer.opt_state.rules.key != old.rules.key:
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
    if not fits(state, fresh) or other_maker(state_makers(was), state_makers(tx)):
        return fresh
    now = _user_set(fresh)
    return settled(state, _user_set(before()), now) if jax.tree.leaves(now) else state


def fits(old: PyTree, new: PyTree) -> bool:
    """Whether the state of an optimiser is like another one: all but what users set."""
    # What a user sets may be an integer at first, and a float later.
    return is_alike(old, new, np.shape) and is_alike(_computed(old), _computed(new))

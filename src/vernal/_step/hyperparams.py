"""What a user sets in the state of an optimiser."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.core import Tracer
from jaxtyping import Array

from .._boundary import PyTree
from .._tree import cast_like, is_inexact
from .abstract_trainer import AbstractTrainer
from .construct import initial_opt_state
from .precision import precision_of

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


def user_set(state: PyTree) -> PyTree:
    """Picks what a user sets out of an optimiser's state, with `None` elsewhere.

    A hyperparameter with a schedule is left out: every step sets it.
    """
    return eqx.filter(state, _flags(state, False))


def computed(state: PyTree) -> PyTree:
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
    if not jax.tree.leaves(user_set(trainer.opt_state)):
        return None
    with precision_of(trainer):
        return user_set(
            initial_opt_state(trainer.optimiser, trainer.params, trainer.latent)
        )


def settled(state: PyTree, before: PyTree, now: PyTree) -> PyTree:
    """Puts into an optimiser's state what a user has changed since its first state.

    `before` and `now` are what `user_set` picks of the first states of the optimiser
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

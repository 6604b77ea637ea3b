"""The loss of a trainer as equations, to be looked at."""

from typing import Any

import jax
from jax.extend.core import Jaxpr

from .abstract_trainer import AbstractTrainer
from .objective import live, score, step_key


def loss_at(params: Any, trainer: AbstractTrainer, batch: Any, key: Any = None) -> Any:
    """Returns the loss of a step; without a random key, of the next one."""
    key = step_key(trainer) if key is None else key
    return score(live(trainer, params), batch, key).loss


def places_of_arrays(batch: Any) -> list[int]:
    """Returns which leaves of a batch are inputs of a function that is traced."""
    is_array = lambda leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    return [i for i, leaf in enumerate(jax.tree.leaves(batch)) if is_array(leaf)]


def inputs_of(jaxpr: Jaxpr, places: list[int]) -> list[Any]:
    """Returns the inputs that are the arrays of a batch, which comes last."""
    return jaxpr.invars[len(jaxpr.invars) - len(places) :]

"""Elements that are held at their bounds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._boundary import PyTree
from .._curvature import Subject, choose_mode, gradient, traced
from .._tree import ravel, unravel
from .abstract_trainer import AbstractTrainer, bounds_of


def pushed(
    trainer: AbstractTrainer, value: Callable[[PyTree], Float[Array, ""]]
) -> dict[str, Bool[Array, "..."]]:
    """Finds the elements at a bound beyond which a function is lower, by path.

    `value` is a function of the parameters. Each parameter with bounds is there.
    """
    bounds, params = bounds_of(trainer), trainer.params
    if bounds is None:
        return {}
    fn, flat = lambda flat: value(unravel(flat, params)), ravel(params)
    subject = Subject(f"What `{type(trainer).__name__}` minimises", is_quiet=True)
    try:
        mode = choose_mode(traced(fn, flat), flat, subject, ("bwd", "fwd"))
    except TypeError:
        # Without derivatives nothing is known to be pushed.
        return bounds.pushed(params, jax.tree.map(jnp.zeros_like, params))
    return bounds.pushed(params, unravel(gradient(fn, flat, mode), params))

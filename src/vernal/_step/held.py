"""Elements that are held at their bounds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._boundary import PyTree
from .._curvature import Subject, gradient, traced
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
    flat = ravel(params)
    fn = traced(lambda flat: value(unravel(flat, params)), flat)
    subject = Subject(f"What `{type(trainer).__name__}` minimises", is_quiet=True)
    try:
        slopes = unravel(gradient(fn, flat, subject), params)
    except TypeError:
        # Without derivatives nothing is known to be pushed.
        slopes = jax.tree.map(jnp.zeros_like, params)
    return bounds.pushed(params, slopes)

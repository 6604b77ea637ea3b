"""What a fit leaves of the gradient, and the curvature that comes with it.

A fit ends a little beside the minimum. Where a model is degenerate, such as in the
product of two parameters, equal losses lie on a curve. Beside it the loss curves
upwards or downwards along it, by about as much as the gradient that is left, and only
at the minimum not at all.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._step import AbstractTrainer, bounds_of, live
from .._tree import as_parameters, ravel, unravel
from .edm import TOLERANCE
from .local import Curved, noise_of_zero

# How many steps a look at the minimum takes: each squares what is left.
MOST_STEPS = 4


class Leftover(NamedTuple):
    """The step to the minimum, as far as curvature is clear.

    - `step`: in the units of the slope.
    - `is_unclear`: whether there is curvature that the gradient may account for, close
        to a minimum in all other directions.
    """

    step: Any
    is_unclear: Bool[Array | np.ndarray, ""]


def leftover(
    values: Float[Any, " L"],
    along: Float[Any, " L"],
    vectors: Float[Any, "L L"],
    noise: float,
    of: Any,
) -> Leftover:
    r"""Finds which curvature of an `nll` is clear of its gradient.

    Curvature $\lambda$, in units of the diagonal of the Hessian, is clear if it is
    above $\sqrt{2\,\mathrm{edm}}$ of the directions that are more curved: in error
    bars, the length of the step to their minimum. So much may come of it, if the model
    is not linear within an error bar.

    `values` are the eigenvalues, `along` is the slope in the space of the eigenvectors,
    and `noise` the rounding of the largest. `of` is `numpy` or `jax.numpy`.
    """
    order = of.argsort(-of.abs(values))
    values, along, vectors = values[order], along[order], vectors[:, order]
    sizes, rounding = of.abs(values), noise * of.max(of.abs(values), initial=0)
    units = of.where(sizes > rounding, sizes, 1)
    falls = of.square(of.where(sizes > rounding, along, 0)) / units
    before = of.sqrt(of.cumsum(falls) - falls)
    is_clear = of.cumsum(sizes <= of.maximum(before, rounding)) == 0
    # What is zero has no clear direction until the rest is at its minimum.
    is_hidden = ~is_clear & (before > rounding)
    edm = 0.5 * of.sum(of.where(is_clear, falls, 0))
    is_rising = ~of.any(is_clear & (values < 0))
    is_unclear = of.any(is_hidden) & is_rising & (edm <= TOLERANCE)
    return Leftover(-vectors @ of.where(is_clear, along / units, 0), is_unclear)


def step_to_minimum(here: Curved) -> Float[np.ndarray, " D"] | None:
    """Returns the step to the minimum, on the host, if there is unclear curvature."""
    if here.turn is not None or not np.isfinite(here.loss):
        return None
    slope, hessian = here.slope.astype(float), here.hessian.astype(float)
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    noise = noise_of_zero(len(values), here.hessian.dtype)
    found = leftover(values, vectors.T @ slope, vectors, noise, np)
    return found.step / here.scale if found.is_unclear else None


def moved(trainer: AbstractTrainer, step: Float[Any, " D"]) -> AbstractTrainer:
    """Returns the trainer a step further, within its bounds."""
    params, bounds = as_parameters(trainer.params), bounds_of(trainer)
    flat = ravel(params)
    there = unravel(flat + jnp.asarray(step, flat.dtype), params)
    return live(trainer, there if bounds is None else bounds.clip(there))

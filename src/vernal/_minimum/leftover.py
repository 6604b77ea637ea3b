"""What a fit leaves of the gradient, and the curvature that comes with it.

A fit ends a little beside the minimum. Where a model is degenerate, such as in the
product of two parameters, equal losses lie on a curve. Beside it the loss curves
upwards or downwards along it, by about as much as the gradient that is left, and only
at the minimum not at all.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from .._curvature import matmul
from .._step import AbstractTrainer, bounds_of, live
from .._tree import as_parameters, ravel, unravel
from .edm import TOLERANCE
from .local import Curved, Local, noise_of_zero, rounding_of

# How many steps a look at the minimum takes: each squares what is left.
MOST_STEPS = 6

# Curvature is clear if it is above so many times what may come of the gradient.
_MARGIN = 30


class Leftover(NamedTuple):
    """What there is between a point and the minimum.

    - `step`: the step there along clear curvature, in the units of the slope.
    - `length`: its length in error bars.
    - `is_unclear`: whether the gradient may account for some of the curvature, close to
        the minimum.
    - `loss`: the loss here.
    """

    step: Any
    length: Float[Any, ""]
    is_unclear: Bool[Any, ""]
    loss: Float[Any, ""]

    def is_closer_than(self, other: "Leftover") -> Bool[Any, ""]:
        """Whether the loss is no higher, and the next step shorter or not needed."""
        is_lower = self.loss <= other.loss + rounding_of(other.loss)
        return is_lower & (~self.is_unclear | (self.length < other.length))


def leftover(
    values: Float[Any, " L"],
    along: Float[Any, " L"],
    vectors: Float[Any, "L L"],
    loss: Float[Any, ""],
    noise: float,
    bar: Any,
) -> Leftover:
    r"""Finds which curvature of a likelihood is clear of its gradient.

    A step of length $\sqrt{2\,\mathrm{edm}}$, in error bars, changes the curvature in
    any direction, in units of the diagonal of the Hessian, by about as much, and by
    more if the model is far from linear within an error bar. Curvature is clear if it
    is well above that, for the step along all directions that are more curved.

    `values` are the eigenvalues, `along` is the slope in the space of the eigenvectors,
    and `noise` the rounding of the largest. `bar` is the size of the data's error bars,
    1 if they are known. Arrays of NumPy stay on the host, where nothing is compiled.
    """
    is_known = isinstance(values, np.ndarray)
    of, multiply = (np, np.matmul) if is_known else (jnp, matmul)
    sizes = of.abs(values)
    rounding = noise * of.max(sizes, initial=0)
    is_seen = sizes > rounding
    units = of.where(is_seen, sizes, 1)
    falls = of.square(of.where(is_seen, along, 0)) / units
    # A row is of one direction, with a column for each other.
    own, others = sizes[:, None], sizes[None, :]
    before = of.sqrt(of.sum(of.where(others > own, falls[None, :], 0), axis=1)) / bar
    is_in_doubt = sizes <= of.maximum(_MARGIN * before, rounding)
    is_clear = ~of.any(is_in_doubt[None, :] & (others >= own), axis=1)
    length = of.sqrt(of.sum(of.where(is_clear, falls, 0)))
    # What is held, or does nothing, is exactly zero. Rounding leaves more of a zero, of
    # which the direction is not clear until the rest is at its minimum.
    is_unclear = of.any(~is_clear & (sizes > 0) & (before > rounding))
    is_minimum = ~of.any(is_clear & (values < 0)) & (length**2 <= 2 * TOLERANCE)
    step = multiply(-vectors, of.where(is_clear, along / units, 0))
    return Leftover(step, length, is_unclear & is_minimum, loss)


def _leftover_at(here: Curved, bar: float) -> Leftover:
    """Finds what is left at a point, on the host, in the units of the parameters."""
    slope, hessian = here.slope.astype(float), here.hessian.astype(float)
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    noise = noise_of_zero(len(values), here.hessian.dtype)
    found = leftover(values, vectors.T @ slope, vectors, here.loss, noise, bar)
    return found._replace(step=found.step / here.scale)


def closer(
    trainer: AbstractTrainer,
    here: Curved,
    look: Callable[[AbstractTrainer], Local],
    bar: float = 1.0,
) -> Iterator[tuple[AbstractTrainer, Curved]]:
    """Yields trainers closer to the minimum, while curvature is not clear there.

    Each comes with its surroundings, at which it has a `look`; `here` are those of the
    first. It ends where the model has an error.
    """
    left, held = _leftover_at(here, bar), here.held
    for _ in range(MOST_STEPS):
        if not left.is_unclear:
            return
        trainer = moved(trainer, left.step)
        try:
            here = jax.device_get(look(trainer))
        except (RuntimeError, ValueError):  # an error of the model, or one of its units
            return
        # A model may be of another kind there, without second derivatives.
        is_known = isinstance(here, Curved) and np.isfinite(here.loss)
        if not (is_known and np.array_equal(here.held, held)):
            return
        before, left = left, _leftover_at(here, bar)
        if not left.is_closer_than(before):
            return
        yield trainer, here


def moved(trainer: AbstractTrainer, step: Float[Any, " D"]) -> AbstractTrainer:
    """Returns the trainer a step further, within its bounds."""
    params, bounds = as_parameters(trainer.params), bounds_of(trainer)
    flat = ravel(params)
    there = unravel(flat + jnp.asarray(step, flat.dtype), params)
    return live(trainer, there if bounds is None else bounds.clip(there))

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

# So many spacings of a parameter away, numbers are rounded in another way. Those of
# powers of two would have the same digits.
_SPACINGS = (-211, -131, -97, -61, 67, 103, 137, 223)


class Leftover(NamedTuple):
    """What there is between a point and the minimum.

    - `step`: the step there along clear curvature, in the units of the slope.
    - `length`: its length in error bars.
    - `is_unclear`: whether the gradient may account for some of the curvature, close to
        the minimum.
    - `loss`: the loss here.
    - `noise`: the largest change of the loss that means nothing.
    - `far`: how many steps it is to as far from the minimum as a fit may end.
    """

    step: Any
    length: Float[Any, ""]
    is_unclear: Bool[Any, ""]
    loss: Float[Any, ""]
    noise: Float[Any, ""]
    far: Float[Any, ""]

    def is_closer_than(self, other: "Leftover") -> Bool[Any, ""]:
        """Whether the loss is no higher, and the next step shorter or not needed.

        Where large numbers cancel, the loss is rounded by more than its size says.
        """
        is_lower = self.loss <= other.loss + other.noise
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
    least = of.asarray(TOLERANCE * bar**2, loss.dtype)
    meaningless = of.maximum(least, rounding_of(loss))
    far = (2 * TOLERANCE) ** 0.5 * bar / of.where(length > 0, length, 1)
    ends = loss, meaningless, of.maximum(far, 1)
    return Leftover(step, length, is_unclear & is_minimum, *ends)


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
    first. It ends where the model has an error. If it comes no closer, the last is of
    the same trainer, without the curvature that is not `confirmed`.
    """
    left, look_at = _leftover_at(here, bar), lambda there: _seen(there, look, here.held)
    for _ in range(MOST_STEPS):
        if not left.is_unclear:
            return
        there = moved(trainer, left.step)
        if (found := look_at(there)) is None:
            return
        if not (new := _leftover_at(found, bar)).is_closer_than(left):
            break
        trainer, here, left = there, found, new
        yield trainer, here
    if not left.is_unclear:
        return
    if (far := look_at(moved(trainer, left.far * left.step))) is not None:
        units = far.scale / here.scale
        other = far.hessian * units[:, None] * units[None, :]
        yield trainer, here._replace(hessian=confirmed(here.hessian, other, left.far))


def _seen(
    there: AbstractTrainer, look: Callable[[AbstractTrainer], Local], held: Any
) -> Curved | None:
    """Returns the surroundings of a trainer, `None` if the model has none like these.

    Its elements at a bound are those that are `held`.
    """
    try:
        found = jax.device_get(look(there))
    except (RuntimeError, ValueError):  # an error of the model, or one of its units
        return None
    # A model may be of another kind there, without second derivatives.
    is_known = isinstance(found, Curved) and np.isfinite(found.loss)
    return found if is_known and np.array_equal(found.held, held) else None


def unrounded(
    trainer: AbstractTrainer, here: Curved, look: Callable[[AbstractTrainer], Local]
) -> Curved:
    """Returns the surroundings without what rounding alone curves downwards.

    Where large numbers cancel, as far out in the tail of a likelihood, rounding decides
    the sign of a second derivative. It is then another a few spacings away.
    """
    hessian, diagonal = here.hessian, np.diagonal(here.hessian)
    is_bad = (diagonal <= 0) & np.any(hessian != 0, axis=1)
    if here.turn is not None or not is_bad.any():
        return here
    params = as_parameters(trainer.params)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params))
    step = np.where(here.held, 0, eps * np.asarray(ravel(params)))
    diagonals = [diagonal]
    for count in _SPACINGS:
        if found := _seen(moved(trainer, count * step), look, here.held):
            units = np.square(found.scale / here.scale)
            diagonals.append(units * np.diagonal(found.hessian))
    size, spread = np.max(np.abs(diagonals), axis=0), np.ptp(diagonals, axis=0)
    # What it has with others is a curvature of its own: that of a product is no noise.
    is_alone = np.all(hessian**2 <= size[:, None] * size[None, :], axis=1)
    is_zero = is_bad & is_alone & (spread > abs(diagonal) / 2)
    if not is_zero.any():
        return here
    return here._replace(hessian=np.where(is_zero | is_zero[:, None], 0, hessian))


def confirmed(hessian: Float[Any, "D D"], far: Float[Any, "D D"], steps: Any) -> Any:
    """Returns a Hessian without the curvature that comes of the gradient alone.

    A gradient of rounding errors cannot be made smaller. So the other Hessian is so
    many `steps` away: by how much it differs for each, it does at the minimum. What is
    nearly degenerate, and linear, does not differ.
    """
    is_known = isinstance(hessian, np.ndarray)
    of, multiply = (np, np.matmul) if is_known else (jnp, matmul)
    units = of.sqrt(of.abs(of.diagonal(hessian)))
    units = of.where(units > 0, units, 1)
    scaled = lambda matrix: matrix / units[:, None] / units[None, :]
    values, vectors = of.linalg.eigh(scaled((hessian + hessian.T) / 2))
    sizes, change = of.abs(values), multiply(scaled(far - hessian), vectors) / steps
    there = values + of.sum(vectors * change, axis=0)
    # Rounding makes less than this of a zero.
    least = float(jnp.finfo(hessian.dtype).eps ** 0.5) * of.max(sizes, initial=0)
    is_zero = (of.abs(there) < 0.5 * sizes) & (sizes <= least)
    rest = multiply(vectors * of.where(is_zero, 0, values)[None, :], vectors.T)
    rest = rest * units[:, None] * units[None, :]
    return of.where(of.any(is_zero), rest, hessian).astype(hessian.dtype)


def moved(trainer: AbstractTrainer, step: Float[Any, " D"]) -> AbstractTrainer:
    """Returns the trainer a step further, within its bounds."""
    params, bounds = as_parameters(trainer.params), bounds_of(trainer)
    flat = ravel(params)
    there = unravel(flat + jnp.asarray(step, flat.dtype), params)
    return live(trainer, there if bounds is None else bounds.clip(there))

"""The second derivatives of a likelihood, at the minimum if that is close."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._boundary import Params, is_traced
from .._curvature import Expansion, equilibrated_eigh, matmul, on_device
from .._minimum import (
    MOST_STEPS,
    Curved,
    Leftover,
    closer,
    confirmed,
    leftover,
    moved,
    noise_of_zero,
    surroundings,
    unrounded,
)
from .._policy import all_finite
from .._step import AbstractTrainer, defined, live
from .._tree import as_parameters, choose, widest
from .derivatives import Derived, Passes, derive, require_finite

Look = Callable[[AbstractTrainer], Derived]
"""Differentiates at the current point of a trainer."""


def observed(
    trainer: AbstractTrainer, batch: Any, passes: Passes, holds: bool, bar: Any = 1.0
) -> tuple[Derived, str]:
    """Computes the second derivatives of the likelihood, with its name in messages.

    Where the gradient may account for some of the curvature, the Hessian is that closer
    to the minimum: see `leftover`, which has `bar`. All else is of the current point.
    """
    look = lambda trainer: derive(trainer, batch, "nll", None, passes, holds)
    name = "`nll`" if "nll" in defined(trainer) else "the squared `residuals`"
    is_within = is_traced(trainer, batch)
    derived = eqx.filter_eval_shape(look, trainer) if is_within else look(trainer)
    # A class may have traced values, too.
    if is_within or is_traced(derived):
        return _traced(trainer, look, derived, bar), name
    (here,) = derived.found
    what = f"The curvature of {name}"
    require_finite((here.hessian,), derived.is_finite, what, trainer, batch)
    return _with_hessian(derived, _closest(trainer, look, derived, bar)), name


def _with_hessian(derived: Derived, hessian: Float[Array, "D D"]) -> Derived:
    expansion = Expansion(hessian, derived.found[0].gradient)
    return derived._replace(found=(expansion,))


def _closest(
    trainer: AbstractTrainer, look: Look, derived: Derived, bar: Any
) -> Float[Array, "D D"]:
    """Returns the Hessian at the minimum, if curvature is not clear here.

    What rounding alone curves downwards has none.
    """
    params, hessian = as_parameters(trainer.params), derived.found[0].hessian

    def around(derived: Derived) -> Curved:
        hessian, gradient = derived.found[0]
        return surroundings(derived.value, gradient, hessian, derived.held, params)

    look_around = lambda there: around(look(there))
    first = here = around(derived)
    for nearer in closer(trainer, first, look_around, float(bar)):
        trainer, here = nearer
    if (here := unrounded(trainer, here, look_around)) is first:
        return hessian
    units = np.asarray(here.scale, float)
    found = here.hessian * units[:, None] * units[None, :]
    return on_device(found.astype(hessian.dtype))


class _Point(NamedTuple):
    params: Params
    first: Derived
    best: tuple[Params, Float[Array, "D D"], Leftover]
    far: Float[Array, "D D"]
    steps: Int[Array, ""]
    goes_on: Bool[Array, ""]
    is_far: Bool[Array, ""]


def _traced(trainer: AbstractTrainer, look: Look, like: Derived, bar: Any) -> Derived:
    """Does the same within a program, where an error of the model is raised.

    `like` has the shapes of the answer. The derivatives have one place in the program.
    """

    def further(point: _Point) -> _Point:
        here, is_first = live(trainer, point.params), point.steps == 0
        derived = look(here)
        hessian, left, is_finite = _left_at(derived, bar)
        first = choose(is_first, derived, point.first)
        is_known = is_finite & jnp.all(derived.held == first.held)
        is_better = left.is_closer_than(point.best[2]) & is_known & ~point.is_far
        best = choose(is_first | is_better, (point.params, hessian, left), point.best)
        far = jnp.where(point.is_far & is_known, hessian, best[1])
        is_next = is_better & left.is_unclear & (point.steps < MOST_STEPS)
        is_far = ~is_next & best[2].is_unclear & is_known & ~point.is_far
        goes_on = is_next | is_far
        # Of many, those that are done stay where the model has no error.
        step = jnp.where(is_far, best[2].far, 1) * best[2].step
        there = moved(live(trainer, best[0]), jnp.where(goes_on, step, 0))
        params = choose(goes_on, as_parameters(there.params), point.params)
        return _Point(params, first, best, far, point.steps + 1, goes_on, is_far)

    hessian, left, _ = eqx.filter_eval_shape(_left_at, like, bar)
    most = jax.tree.map(lambda x: jnp.full(x.shape, jnp.inf, x.dtype), left)
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    first, hessian = jax.tree.map(zeros, (like, hessian))
    params, steps = as_parameters(trainer.params), jnp.zeros((), "int32")
    yes, best = jnp.ones((), bool), (params, hessian, most)
    start = _Point(params, first, best, hessian, steps, yes, ~yes)
    end = jax.lax.while_loop(lambda point: point.goes_on, further, start)
    _, hessian, left = end.best
    return _with_hessian(end.first, _confirmed(hessian, end.far, left.far))


def _confirmed(
    hessian: Float[Array, "D D"], far: Float[Array, "D D"], steps: Any
) -> Float[Array, "D D"]:
    is_finite, (known, other) = _cleared((hessian, far))
    found = confirmed(known, other, steps.astype(known.dtype))
    return jnp.where(is_finite, found.astype(hessian.dtype), hessian)


def _left_at(
    derived: Derived, bar: Any
) -> tuple[Float[Array, "D D"], Leftover, Bool[Array, ""]]:
    """Finds what is left, in the units of the parameters, and whether all is finite."""
    hessian, gradient = derived.found[0]
    is_finite, (known, slope) = _cleared((hessian, gradient))
    scale, values, vectors = equilibrated_eigh(known)
    along = matmul(vectors.T, slope / scale)
    noise = noise_of_zero(len(hessian), hessian.dtype)
    own = jnp.asarray(bar, known.dtype)
    left = leftover(values, along, vectors, derived.value, noise, own)
    return hessian, left._replace(step=left.step / scale), is_finite


def _cleared(arrays: tuple[Array, Array]) -> tuple[Bool[Array, ""], list[Array]]:
    """Says whether arrays are finite, and puts zeros there if they are not.

    LAPACK may not return if there is a NaN, and has no half precision.
    """
    is_finite = all_finite(arrays)
    dtype = widest((arrays[0].dtype, jnp.dtype("float32")))
    return is_finite, [jnp.where(is_finite, x, 0).astype(dtype) for x in arrays]


def error_bar(derived: Derived, size: int) -> Float[Array, ""]:
    """Returns the size of the data's error bars, which is 1 if they are known.

    `residuals` may be without: their scatter, beside a model with so many elements as
    `size`, is smaller then.
    """
    degrees = max(derived.deviances.size - size, 1)
    scatter = jnp.sqrt(jnp.sum(jnp.square(derived.deviances)) / degrees)
    least = jnp.finfo(scatter.dtype).tiny ** 0.5
    return jnp.where(derived.data.has_scale, 1, jnp.clip(scatter, least, 1))

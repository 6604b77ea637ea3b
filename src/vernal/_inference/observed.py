"""The second derivatives of a likelihood, at the minimum if that is close."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._boundary import Params, is_traced
from .._curvature import Expansion, equilibrated_eigh, matmul
from .._minimum import (
    MOST_STEPS,
    Leftover,
    leftover,
    leftover_at,
    moved,
    noise_of_zero,
    surroundings,
)
from .._policy import all_finite
from .._step import AbstractTrainer, defined, live
from .._tree import as_parameters, widest
from .derivatives import Derived, Passes, derive, require_finite

Look = Callable[[AbstractTrainer], Derived]
"""Differentiates at the current point of a trainer."""


def observed(
    trainer: AbstractTrainer,
    batch: Any,
    passes: Passes,
    holds: bool,
    bar: Any = 1.0,
) -> tuple[Derived, str]:
    """Computes the second derivatives of the likelihood, with its name in messages.

    Where the gradient may account for some of the curvature, the Hessian is that closer
    to the minimum: see `leftover`, which has `bar`. All else is of the current point.
    """
    look = lambda trainer: derive(trainer, batch, "nll", None, passes, holds)
    derived = look(trainer)
    (here,) = derived.found
    name = "`nll`" if "nll" in defined(trainer) else "the squared `residuals`"
    what = f"The curvature of {name}"
    require_finite((here.hessian,), derived.is_finite, what, trainer, batch)
    closer = _traced if is_traced(derived, trainer) else _on_host
    hessian = closer(trainer, look, derived, bar)
    return derived._replace(found=(Expansion(hessian, here.gradient),)), name


def _on_host(
    trainer: AbstractTrainer, look: Look, derived: Derived, bar: Any
) -> Float[Array, "D D"]:
    """Returns the Hessian closer to the minimum, by the program of `derive`."""

    def left_at(derived: Derived) -> Leftover:
        hessian, gradient = derived.found[0]
        params = as_parameters(trainer.params)
        here = surroundings(derived.value, gradient, hessian, params)
        return leftover_at(here, float(bar))

    left, (hessian, _) = left_at(derived), derived.found[0]
    for _ in range(MOST_STEPS):
        if not left.is_unclear:
            break
        trainer = moved(trainer, left.step)
        try:
            found = look(trainer)
        except (RuntimeError, ValueError):  # an error of the model, or one of its units
            break
        is_held_alike = np.array_equal(found.held, derived.held)
        if not (is_held_alike and np.isfinite(found.found[0].hessian).all()):
            break
        before, left = left, left_at(found)
        if not left.is_closer_than(before):
            break
        hessian = found.found[0].hessian
    return hessian


class _Point(NamedTuple):
    params: Params
    hessian: Float[Array, "D D"]
    left: Leftover
    steps: Int[Array, ""]
    goes_on: Bool[Array, ""]


def _traced(
    trainer: AbstractTrainer, look: Look, derived: Derived, bar: Any
) -> Float[Array, "D D"]:
    """Does the same within a program, where an error of the model is raised."""

    def at(params: Params, derived: Derived, steps: Any) -> _Point:
        hessian, gradient = derived.found[0]
        is_finite = all_finite((hessian, gradient))
        # LAPACK may not return if there is a NaN, and has no half precision.
        dtype = widest((hessian.dtype, jnp.dtype("float32")))
        clear = lambda x: jnp.where(is_finite, x, 0).astype(dtype)
        scale, values, vectors = equilibrated_eigh(clear(hessian))
        along = matmul(vectors.T, clear(gradient) / scale)
        noise = noise_of_zero(len(hessian), hessian.dtype)
        own = jnp.asarray(bar, dtype)
        left = leftover(values, along, vectors, derived.value, noise, own)
        left = left._replace(step=left.step / scale)
        goes_on = left.is_unclear & is_finite & (steps < MOST_STEPS)
        return _Point(params, hessian, left, steps, goes_on)

    def further(point: _Point) -> _Point:
        # Of many, those that are done stay where the model has no error.
        step = jnp.where(point.goes_on, point.left.step, 0)
        there = moved(live(trainer, point.params), step)
        found = look(there)
        now = at(as_parameters(there.params), found, point.steps + 1)
        is_better = now.left.is_closer_than(point.left) & all_finite(now.hessian)
        is_better &= jnp.all(found.held == derived.held)
        stay = point._replace(goes_on=jnp.zeros((), bool))
        return jax.tree.map(lambda a, b: jnp.where(is_better, a, b), now, stay)

    start = at(as_parameters(trainer.params), derived, jnp.zeros((), "int32"))
    return jax.lax.while_loop(lambda point: point.goes_on, further, start).hessian


def error_bar(derived: Derived, size: int) -> Float[Array, ""]:
    """Returns the size of the data's error bars, which is 1 if they are known.

    `residuals` may be without: their scatter, beside a model with so many elements as
    `size`, is smaller then.
    """
    assert derived.deviances is not None
    assert derived.data is not None
    degrees = max(derived.deviances.size - size, 1)
    scatter = jnp.sqrt(jnp.sum(jnp.square(derived.deviances)) / degrees)
    least = jnp.finfo(scatter.dtype).tiny ** 0.5
    return jnp.where(derived.data.has_scale, 1, jnp.clip(scatter, least, 1))

"""The second derivatives of a likelihood, at the minimum if that is close."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._boundary import Params, is_traced
from .._curvature import Expansion, equilibrated_eigh, matmul
from .._minimum import (
    MOST_STEPS,
    Curved,
    Leftover,
    closer,
    leftover,
    moved,
    noise_of_zero,
    surroundings,
)
from .._policy import all_finite
from .._step import AbstractTrainer, defined, live
from .._tree import as_parameters, choose, widest
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
    name = "`nll`" if "nll" in defined(trainer) else "the squared `residuals`"
    is_within = is_traced(trainer, batch)
    derived = eqx.filter_eval_shape(look, trainer) if is_within else look(trainer)
    # A class may have traced values, too.
    if is_within or is_traced(derived):
        return _traced(trainer, look, derived, bar), name
    (here,) = derived.found
    what = f"The curvature of {name}"
    require_finite((here.hessian,), derived.is_finite, what, trainer, batch)
    there = _closest(trainer, look, derived, bar)
    hessian = here.hessian if there is trainer else look(there).found[0].hessian
    return _with_hessian(derived, hessian), name


def _with_hessian(derived: Derived, hessian: Float[Array, "D D"]) -> Derived:
    expansion = Expansion(hessian, derived.found[0].gradient)
    return derived._replace(found=(expansion,))


def _closest(
    trainer: AbstractTrainer, look: Look, derived: Derived, bar: Any
) -> AbstractTrainer:
    """Returns the trainer at the minimum, if curvature is not clear here."""
    params = as_parameters(trainer.params)

    def around(derived: Derived) -> Curved:
        hessian, gradient = derived.found[0]
        return surroundings(derived.value, gradient, hessian, derived.held, params)

    look_around = lambda there: around(look(there))
    for there, _ in closer(trainer, around(derived), look_around, float(bar)):
        trainer = there
    return trainer


class _Point(NamedTuple):
    params: Params
    first: Derived
    hessian: Float[Array, "D D"]
    left: Leftover
    steps: Int[Array, ""]
    goes_on: Bool[Array, ""]


def _traced(trainer: AbstractTrainer, look: Look, like: Derived, bar: Any) -> Derived:
    """Does the same within a program, where an error of the model is raised.

    `like` has the shapes of the answer. The derivatives have one place in the program.
    """

    def further(point: _Point) -> _Point:
        here, is_first = live(trainer, point.params), point.steps == 0
        derived = look(here)
        hessian, left, is_finite = _left_at(derived, bar)
        first = choose(is_first, derived, point.first)
        is_better = left.is_closer_than(point.left) & is_finite
        is_better &= jnp.all(derived.held == first.held)
        hessian = jnp.where(is_first | is_better, hessian, point.hessian)
        goes_on = is_better & left.is_unclear & (point.steps < MOST_STEPS)
        # Of many, those that are done stay where the model has no error.
        there = moved(here, jnp.where(goes_on, left.step, 0))
        params = choose(goes_on, as_parameters(there.params), point.params)
        return _Point(params, first, hessian, left, point.steps + 1, goes_on)

    hessian, left, _ = eqx.filter_eval_shape(_left_at, like, bar)
    far = jax.tree.map(lambda x: jnp.full(x.shape, jnp.inf, x.dtype), left)
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    first, hessian = jax.tree.map(zeros, (like, hessian))
    params, steps = as_parameters(trainer.params), jnp.zeros((), "int32")
    start = _Point(params, first, hessian, far, steps, jnp.ones((), bool))
    end = jax.lax.while_loop(lambda point: point.goes_on, further, start)
    return _with_hessian(end.first, end.hessian)


def _left_at(
    derived: Derived, bar: Any
) -> tuple[Float[Array, "D D"], Leftover, Bool[Array, ""]]:
    """Finds what is left, in the units of the parameters, and whether all is finite."""
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
    return hessian, left._replace(step=left.step / scale), is_finite


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

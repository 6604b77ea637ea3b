"""What a callback returns: whether to end, or a trainer to go on with."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._step import (
    AbstractTrainer,
    Progress,
    is_made,
    noted_as,
    progress_of,
    refuse_strays,
    with_progress,
)
from .._tree import cast_alike, choose, require_alike

T = TypeVar("T")


def is_boolean(answer: Any) -> bool:
    """Whether an answer says only if the fit is to end."""
    # A comparison often returns a boolean of NumPy or of JAX.
    is_one = isinstance(answer, bool | np.bool_ | jax.Array)
    return is_one and np.shape(answer) == () and np.asarray(answer).dtype == bool


def checked_answer(answer: Any, given: AbstractTrainer) -> Any:
    """Returns the trainer that a callback returned; refuses one of another program."""
    if type(answer) is not type(given):
        raise TypeError(
            f"`callback` returned an object of type `{type(answer).__name__}`. It "
            "may return `None`, `True` to end the fit, or a trainer to go on with."
        )
    for name in "optimiser", "nan_policy", "projector":
        new, old = (jax.tree.structure(getattr(x, name)) for x in (answer, given))
        if new != old:
            raise ValueError(
                f"`callback` returned a trainer with another `{name}`. It may "
                "change the numbers of a fit, but not its program. To go on with "
                "that trainer, return `True`, which ends the fit, and fit it then."
            )
    what, whose = "the trainer that `callback` returned", "the one it was given"
    require_alike(answer, given, what, whose)
    progress = cast_alike(
        progress_of(answer), progress_of(given), what, whose, "Keep the dtypes."
    )
    was_made = is_made(answer)
    answer = with_progress(answer, progress)
    if not was_made:
        refuse_strays(answer)
    return answer


def still_stopped(answer: Any, given: AbstractTrainer) -> Any:
    """Returns an answer that has stopped if the one before has, and stands there.

    `replace` lets a trainer go on. In a callback, which may lower a rate after each
    chunk, it overrides the NaN policy only where it begins from another point.
    """
    now, before = progress_of(answer), progress_of(given)
    own, old = ((x.params, x.stopped) for x in (now, before))
    flags = _beside(_have_stopped(_beside(own, old), old), now.stopped)
    return with_progress(answer, dataclasses.replace(now, stopped=flags))


@jax.jit
def _have_stopped(now: tuple[Any, Array], before: tuple[Any, Array]) -> Array:
    (params, flags), (old, was_stopped) = now, before
    inner = lambda x: tuple(range(flags.ndim, x.ndim))
    moved = jax.tree.map(lambda x, y: jnp.any(~_is_same(x, y), inner(x)), params, old)
    is_moved = jnp.any(jnp.stack(jax.tree.leaves(moved)), axis=0)
    return flags | (was_stopped & ~is_moved)


def have_one_loss(progress: Progress, other: Progress) -> bool:
    """Whether two have the same parameters, and are scored on the same."""
    seen = lambda progress: jax.tree.leaves((progress.params, progress.scored_on))
    now, then = seen(progress), seen(other)
    if all(one is two for one, two in zip(now, then, strict=True)):
        return True
    pairs = zip(_beside(now, then), then, strict=True)
    return bool(_are_equal(list(pairs)))


@jax.jit
def _are_equal(pairs: list[tuple[Any, Any]]) -> Any:
    return jnp.all(jnp.stack([jnp.all(_is_same(*pair)) for pair in pairs]))


def _is_same(one: Array, two: Array) -> Array:
    return (one == two) | ((one != one) & (two != two))


def with_best_of(answer: Any, given: AbstractTrainer) -> Any:
    """Returns an answer with the best of the trainer before, where that is lower."""
    now, before = (_best_in(progress_of(trainer)) for trainer in (answer, given))
    # Computed where the fit is, and kept where the callback has put it.
    best = _beside(_lower(_beside(now, before), before), now)
    progress = dataclasses.replace(progress_of(answer), **best)
    return noted_as(with_progress(answer, progress), given)


def _best_in(progress: Progress) -> dict[str, Any]:
    names = "best", "best_state", "best_loss", "is_validated", "scored_on"
    return {name: getattr(progress, name) for name in names}


@jax.jit
def _lower(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return choose(before["best_loss"] < now["best_loss"], before, now)


def _beside(tree: T, others: T) -> T:
    """Moves arrays to where others are: a callback may have moved them elsewhere.

    What several processes share stays.
    """

    def moved(one: jax.Array, two: jax.Array) -> jax.Array:
        stays = one.devices() == two.devices() or not one.is_fully_addressable
        return one if stays else jax.device_put(one, two.sharding)

    return jax.tree.map(moved, tree, others)

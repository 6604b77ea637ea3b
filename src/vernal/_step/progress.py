"""What a fit changes of a trainer."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from .._boundary import PyTree
from .._pickling import PlainMethods
from .._program import chosen

UNKNOWN = 0
"""The mark of data before the first step, and in files of earlier versions."""


class Progress(PlainMethods, eqx.Module):
    """All that a fit changes of a trainer. The rest of a trainer is configuration.

    With a projector the optimiser moves `latent`; without one it moves `params`, and
    `latent` is `None`. The rows of `nan_counts` are the totals, the first steps and the
    last steps (-1 for none); its columns are the loss, each leaf, and the update.
    `is_validated`: whether `best_loss` is the score of a validation. `scored_on`: the
    mark of the data that it is a score of. Within a fit that keeps no best, `best` and
    `best_state` are `None`.
    """

    params: PyTree
    latent: PyTree
    opt_state: PyTree
    policy_state: PyTree
    state: PyTree
    best: PyTree
    best_state: PyTree
    best_loss: Float[Array, "*members"]
    is_validated: Bool[Array, "*members"]
    nan_counts: Int[Array, "*members 3 columns"]
    step_count: Int[Array, "*members"]
    stopped: Bool[Array, "*members"]
    scored_on: UInt32[Array, "*members"]


def without_best(progress: Progress) -> Progress:
    """Returns the progress for a fit that keeps no best."""
    none_yet = jax.device_put(
        np.full(progress.best_loss.shape, np.inf, progress.best_loss.dtype)
    )
    no = jax.device_put(np.zeros(progress.is_validated.shape, bool))
    return dataclasses.replace(
        progress, best=None, best_state=None, best_loss=none_yet, is_validated=no
    )


def with_some_best(progress: Progress) -> Progress:
    """Returns a progress whose best, if none is kept, is its own parameters."""
    if progress.best is not None:
        return progress
    return dataclasses.replace(
        progress, best=progress.params, best_state=progress.state
    )


class Best(NamedTuple):
    """The part of a progress that a lower score changes."""

    best: PyTree
    best_state: PyTree
    best_loss: Float[Array, ""]


def held_best(progress: Progress) -> Best:
    return Best(progress.best, progress.best_state, progress.best_loss)


def ranked(
    progress: Progress, score: Float[Array, ""], copies: Bool[Array, ""] | None = None
) -> Best:
    """Returns the best, given the score of the current parameters, if any is kept.

    Unless it `copies`, a lower score is all that is kept of it.
    """
    if progress.best is None:
        return held_best(progress)
    is_lower = jnp.isfinite(score) & (score < progress.best_loss)
    best = chosen(
        is_lower if copies is None else is_lower & copies,
        lambda: Best(progress.params, progress.state, score),
        lambda: held_best(progress),
        reads=held_best(progress),
    )
    if copies is None:
        return best
    best_loss = lax.select(is_lower, score, progress.best_loss)
    return best._replace(best_loss=best_loss)


def count_non_finite(
    counts: Int[Array, "3 columns"], bad: Bool[Array, " columns"], step: Int[Array, ""]
) -> Int[Array, "3 columns"]:
    totals, first, last = counts
    return jnp.stack(
        [
            totals + bad.astype(totals.dtype),
            jnp.where(bad & (first < 0), step, first),
            jnp.where(bad, step, last),
        ]
    )

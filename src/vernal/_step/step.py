"""One step of a fit, pure: the order of things, the last guard, best, counts."""

import dataclasses
import functools as ft
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from .._boundary import PyTree
from .._curvature import in_reverse
from .._policy import all_finite, is_finite, judged
from .._projection import EigenProjector
from .._tree import cast_alike, cast_like, require_alike, widest
from .constrain import clip_of, coupled, project
from .objective import live, score, step_key

# Steps are counted in 32 bits.
MOST_STEPS = 2**31 - 1

_INPUT = "what it was given"
_LIKE_INPUT = "Return gradients of the dtypes that it is given."
_MOVED = ("the parameters", " A learning rate must be one number.")


class Progress(eqx.Module):
    """All that changes while a trainer fits. The rest of a trainer is configuration.

    `latent` is what the optimiser moves if there is a projector, and `None` if it
    moves the parameters themselves. The rows of `nan_counts` are totals, first steps
    and last steps, -1 for none; the columns are the loss, each leaf, and the update.
    `is_validated` tells whether it is a validation that `best_loss` is a score of.
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


class Outcome(NamedTuple):
    """What can be told of one step."""

    loss: Float[Array, ""]
    grads: PyTree
    accepted: Bool[Array, ""]
    metrics: dict[str, Any]


class _Moved(NamedTuple):
    """The part of the progress that a step which is not taken leaves alone."""

    params: PyTree
    latent: PyTree
    opt_state: PyTree
    state: PyTree


def initial_progress(
    params: PyTree,
    latent: PyTree,
    opt_state: PyTree,
    policy_state: PyTree,
    state: PyTree,
) -> Progress:
    """Returns the progress of a trainer that has not taken a step."""
    # NumPy makes these arrays, for which JAX would compile a program each.
    columns = len(jax.tree.leaves(params)) + 2
    no_counts = np.array([[0], [-1], [-1]], np.int32)
    return Progress(
        params=params,
        latent=latent,
        opt_state=opt_state,
        policy_state=policy_state,
        state=state,
        best=params,
        best_state=state,
        best_loss=jnp.asarray(np.asarray(np.inf, jnp.result_type(float))),
        is_validated=jnp.asarray(np.bool_(False)),
        nan_counts=jnp.asarray(np.repeat(no_counts, columns, axis=1)),
        step_count=jnp.asarray(np.int32(0)),
        stopped=jnp.asarray(np.bool_(False)),
    )


def scored_anew(progress: Progress, by_validation: bool) -> Progress:
    """Forgets the best if it was scored otherwise: the two do not compare."""
    is_other = progress.is_validated != by_validation
    pick = lambda x, y: jnp.where(is_other, x, y)
    return dataclasses.replace(
        progress,
        best=jax.tree.map(pick, progress.params, progress.best),
        best_state=jax.tree.map(pick, progress.state, progress.best_state),
        best_loss=pick(jnp.full_like(progress.best_loss, jnp.inf), progress.best_loss),
        is_validated=jnp.asarray(by_validation),
    )


class Best(NamedTuple):
    """The parameters of the lowest score, and the score."""

    params: PyTree
    state: PyTree
    loss: Float[Array, ""]


def held_best(progress: Progress) -> Best:
    """Returns the best so far."""
    return Best(progress.best, progress.best_state, progress.best_loss)


def ranked(progress: Progress, score: Float[Array, ""]) -> Best:
    """Returns the best, given the score of the current parameters."""
    return lax.cond(
        jnp.isfinite(score) & (score < progress.best_loss),
        lambda: Best(progress.params, progress.state, score),
        lambda: held_best(progress),
    )


def advance(
    trainer: Any, batch: Any, *, by_validation: bool = False
) -> tuple[Progress, Outcome]:
    """Takes one step of a trainer that has not stopped.

    The order: key; loss and gradients at the current parameters; best; policy;
    `transform_grads`; pull back; optimiser; last guard; `constrain`; counter.

    **Arguments:**

    - `trainer`: a `Trainer` with an optimiser.
    - `batch`: what its `loss` is given.
    - `by_validation`: whether the best is left to a validation.

    **Returns:**

    The progress after the step, and what can be told of the step.
    """
    old: Progress = trainer._progress
    key = step_key(trainer)

    def scored(params: PyTree) -> tuple[Array, tuple[dict[str, Any], PyTree]]:
        loss, metrics, state = score(live(trainer, params), batch, key)
        return loss, (metrics, state)

    value_and_grad = jax.value_and_grad(scored, has_aux=True)
    with in_reverse(f"The loss of `{type(trainer).__name__}`"):
        (loss, (metrics, state)), grads = value_and_grad(old.params)
    grads = jax.tree.map(_descending, grads)
    measured = loss.astype(old.best_loss.dtype)
    best = held_best(old) if by_validation else ranked(old, measured)

    policy = trainer.nan_policy
    heeded, verdict, policy_state = judged(policy, loss, grads, old.policy_state)
    held = _Moved(old.params, old.latent, old.opt_state, old.state)

    def take() -> tuple[_Moved, Bool[Array, ""]]:
        value = lambda params: scored(params)[0]
        moved = _move(trainer, heeded, loss, state, value)
        sound = all_finite((moved.params, moved.latent)) & ~_any_poisoned(
            (moved.opt_state, state), (old.opt_state, old.state)
        )
        return lax.cond(sound, lambda: moved, lambda: held), sound

    moved, sound = lax.cond(verdict.accept, take, lambda: (held, jnp.array(True)))

    def undisturbed() -> tuple[Array, Bool[Array, ""], PyTree]:
        return old.nan_counts, jnp.asarray(verdict.stop), policy_state

    def disturbed() -> tuple[Array, Bool[Array, ""], PyTree]:
        bad = [~all_finite(x) for x in (loss, *jax.tree.leaves(grads))]
        counts = count_non_finite(
            old.nan_counts, jnp.stack([*bad, ~sound]), old.step_count
        )

        # The policy has no say on the update, which it does not see. Shown the step
        # as one whose loss is not finite, it decides whether the fit goes on.
        def judge_again() -> tuple[Bool[Array, ""], PyTree]:
            # Under `vmap` both sides of a condition run: a sound step is shown as one.
            shown = jnp.where(sound, jnp.zeros_like(loss), jnp.nan)
            blank = jax.tree.map(lambda g: jnp.where(sound, 0, g), grads)
            _, again, state = judged(policy, shown, blank, old.policy_state)
            return jnp.asarray(again.stop), state

        stop, state = lax.cond(
            sound, lambda: (jnp.asarray(verdict.stop), policy_state), judge_again
        )
        return counts, stop, state

    nan_counts, stop, policy_state = lax.cond(
        sound & all_finite((loss, grads)), undisturbed, disturbed
    )
    new = Progress(
        params=moved.params,
        latent=moved.latent,
        opt_state=moved.opt_state,
        policy_state=policy_state,
        state=moved.state,
        best=best.params,
        best_state=best.state,
        best_loss=best.loss,
        is_validated=old.is_validated,
        nan_counts=nan_counts,
        step_count=old.step_count + 1,
        stopped=stop,
    )
    return new, Outcome(measured, grads, verdict.accept & sound, metrics)


def _any_poisoned(new: PyTree, old: PyTree) -> Bool[Array, ""]:
    """Whether an optimiser's state turned bad in this step.

    Some hold an infinity by design, such as the best value before there is one.
    """
    flags = [
        ~is_finite(jnp.where(jnp.isnan(o) | (jnp.isinf(o) & jnp.isinf(n)), 0, n))
        for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        if jnp.issubdtype(n.dtype, jnp.inexact)
    ]
    return ft.reduce(operator.or_, flags, jnp.array(False))


def tree_norm(tree: PyTree) -> Float[Array, ""]:
    """Returns the norm of a tree, all leaves together."""
    # The squares of a small dtype would overflow long before the norm does.
    default = jnp.result_type(float)
    wide = lambda leaf: leaf.astype(widest((leaf.dtype, default)))
    return optax.tree.norm(jax.tree.map(wide, tree)).astype(default)


def _descending(grad: Array) -> Array:
    # JAX's gradient of a complex parameter is the conjugate of the ascent direction.
    return jnp.conj(grad) if jnp.iscomplexobj(grad) else grad


def _move(
    trainer: Any,
    grads: PyTree,
    loss: Array,
    state: PyTree,
    value: Callable[[PyTree], Array],
) -> _Moved:
    """Applies the optimiser, in the latent space if there is one."""
    old: Progress = trainer._progress
    projector = trainer.projector
    if trainer._overrides("transform_grads"):
        changed = trainer.transform_grads(grads, trainer.model)
        what = "what `transform_grads` returns"
        grads = cast_alike(changed, grads, what, _INPUT, _LIKE_INPUT)
    is_constrained = trainer._overrides("constrain")
    clip = clip_of(trainer, _INPUT) if is_constrained else None
    metric = None if clip is None else coupled(trainer, clip)
    if projector is None:
        point, value_fn = old.params, value
    else:
        point, grads = old.latent, projector.pull_back(grads)
        value_fn = lambda latent: value(projector.to_params(latent))
    if clip is not None and metric is not None:
        grads = _within(clip, metric, point, grads)
    updates, opt_state = trainer.optimiser.update(
        grads, old.opt_state, point, value=loss, grad=grads, value_fn=value_fn
    )
    moved = optax.apply_updates(point, updates)
    require_alike(moved, point, "what `optimiser` makes of the parameters", *_MOVED)
    point = cast_like(moved, point)
    params = point if projector is None else projector.to_params(point)
    latent = None if projector is None else point
    if clip is not None:
        # Mending what is not finite is no business of a constraint.
        finite = all_finite((params, latent))
        params, _ = project(clip, metric, params)
        if projector is not None:
            # What comes back is clipped once more, against rounding.
            latent = projector.to_latent(params)
            params = clip(projector.to_params(latent))
        params = jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), params)
    return _Moved(params, latent, cast_like(opt_state, old.opt_state), state)


def _within(
    clip: Callable[[PyTree], PyTree],
    metric: EigenProjector,
    latent: PyTree,
    grads: PyTree,
) -> PyTree:
    """Takes from a latent gradient what a constraint does not let go.

    It is the way to the point of a full step, projected. Where that is zero the
    parameters are the best ones that the constraint allows, whatever the optimiser
    makes of it element by element.
    """
    goal = jax.tree.map(jnp.subtract, latent, grads)
    there, is_clipped = project(clip, metric, metric.to_params(goal))
    within = jax.tree.map(jnp.subtract, latent, metric.to_latent(there))
    pick = lambda new, old: jnp.where(is_clipped, new, old).astype(old.dtype)
    return jax.tree.map(pick, within, grads)


def count_non_finite(
    counts: Int[Array, "3 columns"],
    bad: Bool[Array, " columns"],
    step: Int[Array, ""],
) -> Int[Array, "3 columns"]:
    totals, first, last = counts
    return jnp.stack(
        [
            totals + bad.astype(totals.dtype),
            jnp.where(bad & (first < 0), step, first),
            jnp.where(bad, step, last),
        ]
    )

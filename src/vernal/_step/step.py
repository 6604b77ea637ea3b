"""One step of a fit, as a pure function."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._boundary import PyTree
from .._curvature import in_reverse
from .._policy import all_finite, any_non_finite, each_finite, judged
from .._program import chosen
from .._projection import EigenProjector
from .._tree import cast_alike, cast_like, choose, is_inexact, require_alike, widest
from .abstract_trainer import (
    AbstractTrainer,
    bijections_of,
    bounds_of,
    from_free_coordinates,
    in_free_coordinates,
    is_constrained,
    overrides,
    progress_of,
)
from .constrain import clip_of, coupled, project, refuse_mixing
from .objective import Scored, live, score, step_key
from .progress import Best, Progress, count_non_finite, held_best, ranked

T = TypeVar("T")

_INPUT = "what it was given"
_LIKE_INPUT = "Return gradients of the dtypes that it is given."
_MOVED = ("the parameters", " A learning rate must be one number.")


class Outcome(NamedTuple):
    """What one step returns beside the progress."""

    loss: Float[Array, ""]
    grads: PyTree
    accepted: Bool[Array, ""]
    metrics: dict[str, Any]


class _Moved(NamedTuple):
    """The part of the progress that only an accepted step changes."""

    params: PyTree
    latent: PyTree
    opt_state: PyTree
    state: PyTree


def _scored(
    trainer: AbstractTrainer, batch: Any
) -> tuple[Scored, PyTree, Callable[[PyTree], Array]]:
    """Scores the current parameters.

    Returns the score, its gradients, and the loss as a function of other parameters, of
    the same batch and key.
    """
    key = step_key(trainer)

    def scored(params: PyTree) -> tuple[Array, Scored]:
        found = score(live(trainer, params), batch, key)
        return found.loss, found

    value_and_grad = jax.value_and_grad(scored, has_aux=True)
    with in_reverse(f"The loss of `{type(trainer).__name__}`"):
        (_, found), grads = value_and_grad(progress_of(trainer).params)
    # JAX's gradient of a complex parameter is the conjugate of the ascent direction.
    grads = jax.tree.map(jnp.conj, grads)

    def value(params: PyTree) -> Array:
        if bounds_of(trainer) is not None:
            raise ValueError(
                "`optimiser` has a line search, which looks beyond `bounds`, and would "
                "stop short of them. Use a solver, `trainer.solve(optx.BFGS(1e-8, "
                "1e-8), batch)`; or an optimiser without a line search, such as Adam."
            )
        return scored(params)[0]

    return found, grads, value


def advance(
    trainer: AbstractTrainer,
    batch: Any,
    *,
    ranks: bool = True,
    members: str | None = None,
) -> tuple[Progress, Outcome]:
    """Takes one step of a trainer that has an optimiser, unless it has stopped.

    In this order: the key; loss and gradients at the current parameters; the best,
    if it `ranks` them by the loss; the NaN policy; `transform_grads`; the projector;
    the optimiser; `constrain`; the check that the new values are finite; the counter.

    All of it is computed even if it is not taken: XLA's code for a CPU is for one
    thread within a branch. An update that is not taken is that of zeros.

    Many trainers that are mapped along the axis `members` share their branches: if one
    of them is bad, each is looked at.
    """
    old = progress_of(trainer)
    is_on = ~old.stopped
    (loss, metrics, state), grads, value = _scored(trainer, batch)
    measured = _if(is_on, loss.astype(old.best_loss.dtype), jnp.nan)
    best = ranked(old, measured) if ranks else held_best(old)

    policy = trainer.nan_policy
    judged_grads, verdict, policy_state = judged(policy, loss, grads, old.policy_state)
    is_taken = _once(verdict.accept & is_on)
    if_taken = lambda x: _if(is_taken, x, 0.0)
    moved = _move(
        live_if(is_taken, trainer),
        jax.tree.map(if_taken, judged_grads),
        if_taken(loss),
        state,
        lambda params: if_taken(value(live_if(is_taken, params))),
    )
    held = _Moved(old.params, old.latent, old.opt_state, old.state)

    # Whether it is accepted and whether to stop, the counts, the state of the policy.
    def as_it_is() -> tuple[Any, ...]:
        return jnp.array(True), verdict.stop, old.nan_counts, policy_state

    def looked_at() -> tuple[Any, ...]:
        # Some states have infinities from the start, such as a best value.
        is_good = ~is_taken | (
            all_finite((moved.params, moved.latent))
            & ~_turned_bad((moved.opt_state, state), (old.opt_state, old.state))
        )
        bad = ~jnp.append(each_finite([loss, *jax.tree.leaves(grads)]), is_good)
        counts = count_non_finite(old.nan_counts, bad & is_on, old.step_count)

        # The policy does not see the update. If that is bad, the policy is shown a step
        # with a non-finite loss instead, and decides whether the fit continues.
        def judge_again() -> tuple[Any, PyTree]:
            # Under `vmap` both branches run: a good step is shown as a good one.
            shown = jnp.where(is_good, jnp.zeros_like(loss), jnp.nan)
            blank = jax.tree.map(lambda g: jnp.where(is_good, 0, g), grads)
            _, again, state = judged(policy, shown, blank, old.policy_state)
            return again.stop, state

        as_judged = lambda: (verdict.stop, policy_state)
        stop, new_state = chosen(is_good, as_judged, judge_again, reads=grads)
        keep = lambda new, old: lax.select(is_on, new, old)
        new_state = jax.tree.map(keep, new_state, old.policy_state)
        return is_taken & is_good, stop, counts, new_state

    is_fine = is_taken & all_finite((loss, grads, moved))
    is_as_it_is = _of_all(is_fine, members)
    settled = chosen(is_as_it_is, as_it_is, looked_at, reads=moved)
    accepted, stop, nan_counts, new_policy_state = settled
    accepted = _once(accepted)
    moved = _chosen(accepted, moved, held, members)
    count = is_on.astype(old.step_count.dtype)
    new = dataclasses.replace(
        _after(old, moved, best, new_policy_state, count),
        nan_counts=nan_counts,
        stopped=old.stopped | stop,
    )
    return new, Outcome(measured, grads, accepted, metrics)


def _once(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Returns a flag that is computed once, also where `vmap` makes it an array.

    XLA's code for a CPU computes it again for each array that it chooses between, with
    the checks of all the others. It does not if the flag comes from a product.
    """
    if jax.default_backend() != "cpu":
        return flag
    pair = jnp.stack([flag, flag]).astype(jnp.float32)
    return pair @ jnp.ones_like(pair) > 1


def _of_all(flag: Bool[Array, ""], members: str | None) -> Bool[Array, ""]:
    """Whether a flag is true; along the axis `members`, whether each is."""
    return flag if members is None else lax.pmin(flag.astype(int), members) > 0


# From what size on XLA's code for a CPU shares an array among threads.
_LARGE = 2**14


def _chosen(
    accepted: Bool[Array, ""], moved: _Moved, held: _Moved, members: str | None
) -> _Moved:
    """Returns what an accepted step has moved, and else what it was.

    On a CPU small arrays are chosen by a branch: to copy them takes one thread, but
    nothing has to be compiled for each.
    """
    pick = lambda new, old: lax.select(accepted, new, old)
    if jax.default_backend() != "cpu":
        return jax.tree.map(pick, moved, held)
    count = 1 if members is None else lax.axis_size(members)
    is_large = lambda leaf: leaf.size * count >= _LARGE
    large, small = eqx.partition(moved, is_large)
    large_held, small_held = eqx.partition(held, is_large)
    each = lambda: lax.cond(accepted, lambda: small, lambda: small_held)
    if members is None:
        picked = each()
    else:  # one branch for all, where a selection is an operation for each array
        picked = lax.cond(_of_all(accepted, members), lambda: small, each)
    return eqx.combine(jax.tree.map(pick, large, large_held), picked)


def _if(condition: Bool[Array, ""], x: Array, other: float) -> Array:
    return lax.select(condition, x, jnp.full_like(x, other))


def live_if(is_live: Bool[Array, ""] | bool, tree: T) -> T:
    """Returns a tree, through which derivatives flow if `is_live`.

    The derivatives of what is not taken would be zero times numbers that need not be
    finite.
    """
    inexact, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(_live_if(is_live, inexact), rest)


@jax.custom_jvp
def _live_if(is_live: Any, arrays: PyTree) -> PyTree:
    return arrays


@_live_if.defjvp
def _(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
    (is_live, arrays), (_, tangent) = primals, tangents
    blank = lambda x: jnp.where(is_live, x, jnp.zeros_like(x))
    return _live_if(is_live, arrays), jax.tree.map(blank, tangent)


def _after(
    old: Progress,
    moved: _Moved,
    best: Best,
    policy_state: PyTree,
    count: Int[ArrayLike, ""],
) -> Progress:
    """Returns the progress after a step; what only a bad step changes is as it was."""
    return dataclasses.replace(
        old,
        **moved._asdict(),
        **best._asdict(),
        policy_state=policy_state,
        step_count=old.step_count + count,
    )


# Up to how many numbers of a leaf of the optimiser's state are checked at each step.
_FEW = 64


def advance_bare(
    trainer: AbstractTrainer,
    batch: Any,
    begin: Progress,
    *,
    ranks: bool = True,
    copies: Bool[Array, ""] | None = None,
) -> tuple[Progress, Outcome, Bool[Array, ""]]:
    """Takes a step as `advance` does, if all is finite, without a guard around it.

    Also returns whether anything is not finite that was at the beginning of a block of
    such steps: then nothing else that it returns counts. It does not look at the
    parameters, and at large arrays in the state of the optimiser. What is not finite
    there stays so: `has_turned_bad` finds it after some steps. `copies` is as for
    `ranked`.
    """
    old = progress_of(trainer)
    (loss, metrics, state), grads, value = _scored(trainer, batch)
    measured = loss.astype(old.best_loss.dtype)
    best = ranked(old, measured, copies) if ranks else held_best(old)
    moved = _move(trainer, grads, loss, state, value)
    # The policy is shown a step that is finite, whose gradients it leaves alone.
    shown = jax.tree.map(lambda g: jnp.zeros((), g.dtype), grads)
    _, _, policy_state = judged(
        trainer.nan_policy, jnp.zeros_like(loss), shown, old.policy_state
    )
    few = lambda tree: [x for x in _inexact(tree) if x.size <= _FEW]
    # A projector or a bijection may overflow for coordinates that are finite.
    others = () if old.latent is None else jax.tree.leaves(moved.params)
    is_bad = any_non_finite((loss, *jax.tree.leaves(grads), *others))
    is_bad |= any_non_finite(few(moved.opt_state)) & ~any_non_finite(
        few(begin.opt_state)
    )
    is_bad |= _turned_bad(state, begin.state)
    new = _after(old, moved, best, policy_state, 1)
    return new, Outcome(measured, grads, jnp.array(True), metrics), is_bad


def has_turned_bad(new: Progress, old: Progress) -> Bool[Array, ""]:
    """Whether something has become non-finite in the bare steps between the two."""
    parts = lambda progress: (progress.params, progress.latent, progress.opt_state)
    return _turned_bad(parts(new), parts(old))


def _inexact(tree: PyTree) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]


def _turned_bad(new: PyTree, old: PyTree) -> Bool[Array, ""]:
    """Whether a state has become non-finite in this step.

    Some states have infinities from the start, such as a best value.
    """
    return any_non_finite(_inexact(new), _inexact(old))


def tree_norm(tree: PyTree) -> Float[Array, ""]:
    """Returns the norm of all leaves together."""
    # In a small dtype the squares overflow before the norm does.
    default = jnp.result_type(float)
    wide = lambda leaf: leaf.astype(widest((leaf.dtype, default)))
    return optax.tree.norm(jax.tree.map(wide, tree)).astype(default)


def _move(
    trainer: AbstractTrainer,
    grads: PyTree,
    loss: Array,
    state: PyTree,
    value: Callable[[PyTree], Array],
) -> _Moved:
    """Applies the optimiser, in the latent space if there is one."""
    if overrides(trainer, "transform_grads"):
        changed = trainer.transform_grads(grads, trainer.model)
        what = "what `transform_grads` returns"
        grads = cast_alike(changed, grads, what, _INPUT, _LIKE_INPUT)
    bijections = bijections_of(trainer)
    if bijections is None:
        return _update(trainer, grads, loss, state, value)
    inner = in_free_coordinates(trainer)
    own, pull = jax.vjp(bijections.forward, inner.params)
    (grads,) = pull(cast_like(grads, own))
    value_fn = lambda free: value(bijections.forward(free))
    moved = _update(inner, grads, loss, state, value_fn)
    params, latent = from_free_coordinates(trainer, moved.params, moved.latent)
    return moved._replace(params=params, latent=latent)


def _update(
    trainer: AbstractTrainer,
    grads: PyTree,
    loss: Array,
    state: PyTree,
    value: Callable[[PyTree], Array],
) -> _Moved:
    """Applies the optimiser to the coordinates that it moves."""
    old, projector = progress_of(trainer), trainer.projector
    goal = None
    refuse_mixing(trainer)
    clip = clip_of(trainer, _INPUT) if is_constrained(trainer) else None
    metric = None if clip is None else coupled(trainer, clip)
    if projector is None:
        point, value_fn = old.params, value
    else:
        point, grads = old.latent, projector.pull_back(grads)
        value_fn = lambda latent: value(projector.to_params(latent))
    if clip is not None and metric is not None:
        goal, grads = _within(clip, metric, point, grads)
    updates, opt_state = trainer.optimiser.update(
        grads, old.opt_state, point, value=loss, grad=grads, value_fn=value_fn
    )
    moved = optax.apply_updates(point, updates)
    require_alike(moved, point, "what `optimiser` makes of the parameters", *_MOVED)
    point = cast_like(moved, point)
    params = point if projector is None else projector.to_params(point)
    latent = None if projector is None else point
    if clip is not None:
        # A constraint must not hide non-finite values.
        finite = all_finite((params, latent))
        params, is_moved = project(clip, metric, params)
        bounds = bounds_of(trainer)
        if bounds is not None and metric is not None:
            snapped = bounds.snap(params, goal, metric.standard_errors())
            moves = jax.tree.map(jnp.not_equal, snapped, params)
            params = snapped
            is_moved |= jnp.any(jnp.stack([jnp.any(x) for x in jax.tree.leaves(moves)]))
        if projector is not None:
            # The parameters stay on their bounds, where rounding would move them.
            latent = choose(is_moved, projector.to_latent(params), latent)
        params = jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), params)
    return _Moved(params, latent, cast_like(opt_state, old.opt_state), state)


def _within(
    clip: Callable[[PyTree], PyTree],
    metric: EigenProjector,
    latent: PyTree,
    grads: PyTree,
) -> tuple[PyTree, PyTree]:
    """Projects a latent gradient onto what a constraint allows.

    Returns the projection of a full gradient step, as parameters, and the step from
    the point to it. Where that is zero, the point is the best one that the constraint
    allows, and the optimiser stays there.
    """
    goal = jax.tree.map(jnp.subtract, latent, grads)
    allowed, is_clipped = project(clip, metric, metric.to_params(goal))
    within = jax.tree.map(jnp.subtract, latent, metric.to_latent(allowed))
    pick = lambda new, old: jnp.where(is_clipped, new, old).astype(old.dtype)
    return allowed, jax.tree.map(pick, within, grads)

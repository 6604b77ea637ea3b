"""The rounds of solves of many, between which others are held at their bounds."""

import dataclasses
import functools as ft
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from .._boundary import PyTree, warn
from .._fit import ProgressBar
from .._minimum import Distance, settled, what_falls
from .._policy import StopReason
from .._program import program, words_of
from .._solve import (
    IS_OVER,
    REASONS,
    End,
    Problem,
    Start,
    can_whiten,
    in_parameters,
    is_least_squares,
    is_lost,
    progress_at,
    run,
    run_solver,
)
from .._step import (
    AbstractTrainer,
    bounds_of,
    config_of,
    in_free_coordinates,
    initial_opt_state,
    progress_of,
    stripped,
    with_progress,
)
from .._tree import cast_like, choose, ravel_size
from .arrival import distances_of
from .mapped_chunk import member
from .members import Members
from .stack import stack

# About how many multiplications of a step take as long as its other work: the rows of a
# Jacobian, times the square of the number of parameters.
_MOST_TOGETHER = 2**19

_BEST = "best", "best_state", "best_loss"

Ends = tuple[End, PyTree]
"""How the solvers ended, and the first states of the optimisers."""

Arrival = tuple[StopReason, Distance]
"""Why one ended, and how near its minimum."""


def _solve_one(
    problem: Problem,
    solve: Callable[..., End],
    is_bare: bool,
    trainer: AbstractTrainer,
    goal: Int[Array, ""],
) -> Ends:
    """Solves for one in its space or, if it `is_bare`, in the parameters themselves."""
    inner = in_free_coordinates(trainer)
    space, held = inner.projector, Start.of(inner)
    if is_bare:
        held = held._replace(latent=None)
    end = solve(stripped(inner), None if is_bare else space, held, problem, goal)
    if is_bare:
        latent = cast_like(space.to_latent(end.params), inner.latent)
        end = end._replace(latent=latent)
    end = in_parameters(end, trainer)
    return end, initial_opt_state(trainer.optimiser, end.params, end.latent)


@program
def _run(
    members: Members, problem: Problem, goals: Int[Array, " members"], is_bare: bool
) -> Ends:
    def of_one(trainer: AbstractTrainer, batch: Any, goal: Array) -> Ends:
        alone = problem._replace(batch=batch)
        return _solve_one(alone, run_solver, is_bare, trainer, goal)

    return members.place.pin_rows(members.map(of_one, problem.batch, goals))


def _settle(
    members: Members,
    problem: Problem,
    goals: Int[np.ndarray, " members"],
    is_bare: bool,
    bar: ProgressBar,
) -> tuple[Ends, list[int]]:
    """Solves until it is known what is held; returns also who met an error.

    Each takes at most as many steps as its goal: of 0, it stays where it is.
    """
    if _is_apart(members, problem.batch):
        return _solve_each(members, problem, goals, is_bare, bar)
    place = members.place

    def run_all(trainers: AbstractTrainer, goals: Int[Array, " members"]) -> Ends:
        now = members._replace(trainers=trainers)
        placed = place.put_rows(goals, (True,))
        return jax.block_until_ready(_run(now, problem, placed, is_bare))

    try:
        return _in_rounds(run_all, members.trainers, goals, bar, place.whole), []
    except RuntimeError:
        if place.mesh is not None:
            raise
        return _solve_each(members, problem, goals, is_bare, bar)


def _is_apart(members: Members, batch: Any) -> bool:
    """Whether members are so large that each is solved for by itself.

    Together they all take as many steps as the slowest of them.
    """
    if members.place.mesh is not None or jax.default_backend() != "cpu":
        return False
    count = members.trainers.step_count.shape[0]
    leaves = jax.tree.leaves(batch)
    has_rows = members.flags[len(members.flags) - len(leaves) :]
    pairs = zip(leaves, has_rows, strict=True)
    data = sum(np.size(leaf) // (count if own else 1) for leaf, own in pairs)
    size = ravel_size(members.trainers.params) // count
    return (data + size) * size**2 > _MOST_TOGETHER


def _in_rounds(
    run_round: Callable[[AbstractTrainer, Any], Ends],
    trainers: AbstractTrainer,
    goals: Int[np.ndarray, "*members"],
    bar: ProgressBar,
    whole: Callable[[Any], Any],
) -> Ends:
    """Solves, for one or for many, until it is known what is held at its bounds."""

    def run(trainers: AbstractTrainer, goals: np.ndarray) -> tuple[Ends, Any]:
        ends = run_round(trainers, jax.device_put(goals.astype(np.int32)))
        number, is_over = np.asarray(whole(ends[0].reason)), map(REASONS.index, IS_OVER)
        is_settled = np.asarray(whole(ends[0].is_settled))
        return ends, ~is_settled & ~np.isin(number, [*is_over])

    old, is_left = progress_of(trainers), np.ones(goals.shape, bool)
    ends, is_open = run(trainers, goals)
    while True:
        end, opt_state = ends
        left = np.where(is_open, goals - np.asarray(whole(end.steps)), 0)
        bar.update(int((is_left & (left <= 0)).sum()), dict)
        is_left = left > 0
        if not is_left.any():
            return ends
        # Other elements are held at their bounds in the next round.
        progress = progress_at(end, old, opt_state, old.nan_counts)
        again, is_still_open = run(with_progress(trainers, progress), left)
        falls = np.asarray(whole(again[0].last) < whole(end.last))
        ends = _joined(ends, again, jnp.asarray(is_left), int(goals.max()))
        is_open = is_left & falls & is_still_open


def _solve_each(
    members: Members,
    problem: Problem,
    goals: Int[np.ndarray, " members"],
    is_bare: bool,
    bar: ProgressBar,
) -> tuple[Ends, list[int]]:
    """Solves for each by itself. Under `jax.vmap` an `eqx.error_if` ends all of them.

    Returns also the members that met an error.
    """
    ends, errors = list[Ends](), dict[int, RuntimeError]()

    def run_or_stay(*args: Any) -> End:
        try:
            return jax.block_until_ready(run(*args))
        except RuntimeError as error:
            errors[len(ends)] = error
            return _unmoved(*args)

    for index, goal in enumerate(goals):
        trainer, batch = members.one(problem.batch, index)
        alone = problem._replace(batch=batch)
        solve = ft.partial(_solve_one, alone, run_or_stay, is_bare)
        own = trainer, np.array(goal)
        ends.append(_in_rounds(solve, *own, bar, members.place.whole))
    if errors and not is_bare:
        first, error = next(iter(errors.items()))
        warn(
            f"{len(errors)} of {len(ends)} members met an error, and are where they "
            f"began. That of member {first}: {words_of(error)}"
        )
    columns = zip(*map(jax.tree.leaves, ends), strict=True)
    together = jax.tree.structure(ends[0]).unflatten(stack([*columns]))
    return together, list(errors)


def _unmoved(
    trainer: AbstractTrainer, projector: Any, held: Start, problem: Problem, goal: Any
) -> End:
    """The end of a solver that has not taken a step."""
    shapes = eqx.filter_eval_shape(run_solver, trainer, projector, held, problem, goal)
    end: End = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return end._replace(
        params=trainer.params,
        latent=held.latent,
        best=held.best,
        best_state=held.state,
        best_loss=jnp.asarray(held.loss, end.best_loss.dtype),
        step_count=trainer.step_count,
        reason=jnp.full_like(end.reason, REASONS.index(StopReason.FAILED)),
        stumble=trainer.params,
        is_settled=jnp.ones_like(end.is_settled),
        local=jax.tree.map(
            lambda x: jnp.full_like(x, jnp.nan if eqx.is_inexact_array(x) else 0),
            end.local,
        ),
    )


@jax.jit
def _joined(
    old: Ends,
    new: Ends,
    is_new: Bool[Array, "*members"],
    most: Int[Array, ""],
    has_run: Bool[Array, "*members"] | None = None,
) -> Ends:
    """Joins another round to `most` of the steps that its members took before.

    Of those that have run, if they are not all that are new, the best is kept, too.
    """

    def one(old: Ends, new: Ends, is_new: Array, has_run: Array) -> Ends:
        (end, before), (again, opt_state) = old, new
        row, steps = jnp.arange(len(end.losses), dtype=end.steps.dtype), end.steps
        steps = jnp.minimum(steps, most)
        later = again.losses[jnp.maximum(row - steps, 0)]
        joined = again._replace(
            losses=jnp.where(row < steps, end.losses, later),
            steps=steps + again.steps,
            first=end.first,
        )
        best = {name: getattr(again, name) for name in _BEST}
        kept = choose(has_run, end._replace(**best), end)
        return choose(is_new, (joined, opt_state), (kept, before))

    has_run = is_new if has_run is None else has_run
    return (jax.vmap(one) if is_new.ndim else one)(old, new, is_new, has_run)


def _arrived(
    members: Members, problem: Problem, ends: Ends, indices: Iterable[int]
) -> dict[int, Arrival]:
    """Finds why the members with these indices ended, and how near their minima."""
    trainers, whole = members.trainers, members.place.whole
    (end, opt_state), old = ends, progress_of(trainers)
    progress = progress_at(end, old, opt_state, old.nan_counts)
    ended = members._replace(trainers=with_progress(trainers, progress))
    kind = what_falls(trainers, is_least_squares(problem.encoded.decode()))
    local, numbers = jax.tree.map(whole, (end.local, end.reason))
    distances = distances_of(ended, problem.batch, kind, local, indices)
    why = [REASONS[number] for number in np.asarray(numbers)]
    pairs = zip(indices, distances, strict=True)
    return {i: (settled(why[i], distance), distance) for i, distance in pairs}


def _lost(
    members: Members, problem: Problem, end: End, reasons: list[StopReason]
) -> Bool[np.ndarray, " members"]:
    """Finds the members that ended badly in whitened spaces within bounds."""
    config, bounds = config_of(members.trainers), bounds_of(members.trainers)
    one = eqx.filter_eval_shape(lambda: members.one(problem.batch, 0)[0])
    if bounds is None or not can_whiten(one):
        return np.zeros(len(reasons), bool)
    flags = members.flags[: len(jax.tree.leaves(config))]
    own = jax.tree.leaves(bounds_of(jax.tree.structure(config).unflatten(flags)))
    rows = progress_of(members.trainers).params, end.params, end.local
    rows = jax.device_get(jax.tree.map(members.place.whole, rows))

    def is_one(index: int) -> bool:
        near = member(bounds, own, index)
        return is_lost(near, *jax.tree.map(lambda x: x[index], rows))

    well = StopReason.CONVERGED, StopReason.NO_MINIMUM
    pairs = enumerate(reasons)
    return np.array([reason not in well or is_one(i) for i, reason in pairs])


def _at_start(members: Members, ends: Ends) -> Members:
    """Returns the members where they began, with the best that they have found."""
    (end, opt_state), old = ends, progress_of(members.trainers)
    progress = dataclasses.replace(
        progress_at(end, old, opt_state, old.nan_counts),
        params=old.params,
        latent=old.latent,
        step_count=old.step_count,
    )
    return members._replace(trainers=with_progress(members.trainers, progress))


def settle_twice(
    members: Members, problem: Problem, max_steps: int, bar: ProgressBar
) -> tuple[Ends, list[int], dict[int, Arrival]]:
    """Solves, and again from the start what ends badly in a whitened space.

    Returns how all ended, which members met an error, and why and how near each ended.
    """
    whole = members.place.whole
    goals = np.full(members.trainers.step_count.shape, max_steps)
    ends, broken = _settle(members, problem, goals, False, bar)
    found = _arrived(members, problem, ends, range(len(goals)))
    lost = _lost(members, problem, ends[0], [why for why, _ in found.values()])
    lost[broken] = False
    # As in `solve`, one that took all steps has half of them again.
    most = max_steps - max_steps // 2
    left = max_steps - np.minimum(np.asarray(whole(ends[0].steps)), most)
    lost &= left > 0
    if not lost.any():
        return ends, broken, found
    goals = np.where(lost, left, 0)
    # The bar has counted them.
    silent = ProgressBar(0, 0, shown=False)
    try:
        again, errors = _settle(_at_start(members, ends), problem, goals, True, silent)
    except RuntimeError:
        # On a mesh: that way led where the model has an error.
        return ends, broken, found
    lost[errors] = False
    new = _arrived(members, problem, again, np.flatnonzero(lost).tolist())
    noise = np.full(len(lost), np.inf)
    # One that led to where nothing is finite does not count.
    noise[lost] = [
        np.inf if why is StopReason.NON_FINITE else distance.noise
        for why, distance in new.values()
    ]
    lasts, lowest = (np.asarray(whole(x[0].last)) for x in (ends, again))
    is_lower = lowest + noise < lasts
    for index, (why, distance) in new.items():
        before, known = found[index]
        if is_lower[index]:
            found[index] = why, distance
        elif (before, why) == (StopReason.CONVERGED, StopReason.MAX_STEPS):
            # More steps from the start may lead lower.
            found[index] = why, known
    is_new, has_run = map(jnp.asarray, (is_lower, lost))
    return _joined(ends, again, is_new, most, has_run), broken, found

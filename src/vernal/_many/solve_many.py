"""A solver of Optimistix on many trainers at once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from .._boundary import PyTree, outside_mesh, warn
from .._curvature import Mode, checked_mode
from .._data import Whole
from .._devices import same_inputs
from .._minimum import Distance, settled, what_falls
from .._policy import StopReason
from .._program import program, words_of
from .._solve import (
    IS_OVER,
    REASONS,
    End,
    Problem,
    Start,
    checked_solver,
    find_bad,
    in_parameters,
    is_least_squares,
    is_suspect,
    progress_at,
    run,
    run_solver,
)
from .._step import (
    AbstractTrainer,
    count_non_finite,
    diagnosed,
    in_free_coordinates,
    initial_opt_state,
    progress_of,
    scorer_of,
    stripped,
    warn_of_no_data,
    warn_of_suspect_data,
    with_progress,
)
from .._storage import History
from .._tree import choose
from .arrival import distances_of
from .many_trainers import ManyTrainers
from .members import Members
from .result import ManyResult, measured

_Ends = tuple[End, PyTree]
"""How the solvers ended, and the first states of the optimisers."""


def _solve_one(
    trainer: AbstractTrainer,
    problem: Problem,
    goal: Int[Array, ""],
    solve: Callable[..., End],
) -> _Ends:
    inner = in_free_coordinates(trainer)
    end = solve(stripped(inner), inner.projector, Start.of(inner), problem, goal)
    end = in_parameters(end, trainer)
    return end, initial_opt_state(trainer.optimiser, end.params, end.latent)


@program
def _run(members: Members, problem: Problem, goal: Int[Array, ""]) -> _Ends:
    def of_one(trainer: AbstractTrainer, batch: Any) -> _Ends:
        return _solve_one(trainer, problem._replace(batch=batch), goal, run_solver)

    return members.place.pin_rows(members.map(of_one, problem.batch))


@program
def _find_bad(
    members: Members, params: PyTree, batch: Any
) -> Bool[Array, "members columns"]:
    of_one = lambda trainer, batch, params: find_bad(stripped(trainer), params, batch)
    return members.map(of_one, batch, params)


@outside_mesh
def solve_many(
    subject: ManyTrainers,
    trainer: AbstractTrainer,
    data: Any,
    solver: Any,
    steps: int,
    jac: Mode | None,
) -> ManyResult[Any]:
    """Implements `fit_many` with a solver."""
    place, group = subject.place, subject.group
    with same_inputs(subject.entrance, place) as require_same, place.context():
        encoded, rows = checked_solver(solver, steps, "steps")
        batch = subject.prepare(data)
        options: dict[str, Any] = {"steps": steps, "jac": jac, "group": group}
        options |= {"solver": (solver, encoded), "data_axis": subject.data_axis}
        like = subject.template(trainer), subject.row(batch)
        require_same(trainer, batch, like, **options)
        whole = Whole(batch)
        warn_of_suspect_data(whole, "data", trainer, lambda: like)
        scorer = scorer_of(trainer, whole)
        trainer = subject.begun(trainer, whole, scorer, is_solved=True)
        flags = (*subject.config, *subject.flags(batch))
        members = Members(subject.placed(trainer), flags, group, place)
        problem = Problem(batch, encoded, rows, checked_mode(jac))
        solved, history, reasons, distances = _solve(members, problem, steps)
    result = measured(subject.result(solved, history, reasons), distances)
    if (end := subject.bad_end(result)) is not None:
        diagnosis = diagnosed(end.trainer, subject.seen(Whole(batch), end.index))
        end.raise_if_asked(result, diagnosis.advised_on_data)
        warn(f"{end.warning} {diagnosis}")
    ended = lambda i: (subject.picked(result, i), subject.seen(Whole(batch), i))
    with subject.place.context():
        lacking = warn_of_no_data(subject.entrance, history.loss, ended)
    return dataclasses.replace(result, _without_data=tuple(lacking))


def _run_round(
    members: Members, problem: Problem, steps: int
) -> tuple[_Ends, list[int]]:
    """Runs the solver once; returns also the members that met an error."""
    goal = jax.device_put(np.int32(steps))
    try:
        return jax.block_until_ready(_run(members, problem, goal)), []
    except RuntimeError:
        if members.place.mesh is not None:
            raise
        return _solve_each(members, problem, goal)


def _solve_each(
    members: Members, problem: Problem, goal: Int[Array, ""]
) -> tuple[_Ends, list[int]]:
    """Solves for each by itself. Under `jax.vmap` an `eqx.error_if` ends all of them.

    Returns also the members that met an error.
    """
    ends, errors = list[_Ends](), dict[int, RuntimeError]()

    def run_or_stay(*args: Any) -> End:
        try:
            return jax.block_until_ready(run(*args))
        except RuntimeError as error:
            errors[len(ends)] = error
            return _unmoved(*args)

    for index in range(members.trainers.step_count.shape[0]):
        trainer, batch = members.one(problem.batch, index)
        alone = problem._replace(batch=batch)
        ends.append(_solve_one(trainer, alone, goal, run_or_stay))
    if errors:
        first, error = next(iter(errors.items()))
        warn(
            f"{len(errors)} of {len(ends)} members met an error, and are where they "
            f"began. That of member {first}: {words_of(error)}"
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *ends), list(errors)


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
        local=jax.tree.map(
            lambda x: jnp.full_like(x, jnp.nan if eqx.is_inexact_array(x) else 0),
            end.local,
        ),
    )


def _open(end: End, broken: list[int], whole: Any) -> np.ndarray:
    """Finds the members for which it is not known what is held at its bounds."""
    settled, numbers = np.array(whole(end.is_settled)), np.asarray(whole(end.reason))
    settled[broken] = True
    return ~settled & ~np.isin(numbers, [REASONS.index(reason) for reason in IS_OVER])


@jax.jit
def _joined(old: _Ends, new: _Ends, is_open: Bool[Array, " members"]) -> _Ends:
    """Joins another round to what the open members did before."""

    def one(old: _Ends, new: _Ends, is_open: Array) -> _Ends:
        (end, _), (again, opt_state) = old, new
        row = jnp.arange(len(end.losses), dtype=end.steps.dtype)
        later = again.losses[jnp.maximum(row - end.steps, 0)]
        joined = again._replace(
            losses=jnp.where(row < end.steps, end.losses, later),
            steps=end.steps + again.steps,
            first=end.first,
        )
        return choose(is_open, (joined, opt_state), old)

    return jax.vmap(one)(old, new, is_open)


def _solve(
    members: Members, problem: Problem, max_steps: int
) -> tuple[AbstractTrainer, History, list[StopReason], list[Distance]]:
    """Solves; returns the trainers, a history, and why and how near each ended."""
    trainers, _, _, place = members
    whole, old = place.whole, progress_of(trainers)
    (end, opt_state), broken = _run_round(members, problem, max_steps)
    open_ = _open(end, broken, whole)
    while open_.any():
        left = max_steps - int(np.max(np.asarray(whole(end.steps))[open_]))
        if left <= 0:
            break
        # Other elements are held at their bounds in the next round.
        progress = progress_at(end, old, opt_state, old.nan_counts)
        next_ = members._replace(trainers=with_progress(trainers, progress))
        again, newly_broken = _run_round(next_, problem, left)
        has_fallen = open_ & np.asarray(whole(again[0].last) < whole(end.last))
        end, opt_state = _joined((end, opt_state), again, jnp.asarray(open_))
        broken = sorted({*broken, *newly_broken})
        open_ = has_fallen & _open(end, broken, whole)
    starts, losses, steps, numbers, in_vain = jax.device_get(
        jax.tree.map(
            whole, (old.step_count, end.losses, end.steps, end.reason, end.in_vain)
        )
    )
    progress = progress_at(end, old, opt_state, old.nan_counts)
    ended = members._replace(trainers=with_progress(trainers, progress))
    local = jax.tree.map(whole, end.local)
    kind = what_falls(trainers, is_least_squares(problem.encoded.decode()))
    every = range(len(numbers))
    distances = distances_of(ended, problem.batch, kind, local, every)
    reasons = [settled(REASONS[i], d) for i, d in zip(numbers, distances, strict=True)]
    suspect = np.array(
        [is_suspect(*pair) for pair in zip(reasons, in_vain, strict=True)]
    )
    counts = old.nan_counts
    # These met an error, not a non-finite value.
    suspect[broken] = False
    if suspect.any():
        looked_at, params, batch = members, end.stumble, problem.batch
        if broken:
            # There the model would raise its error again: another stands in for them.
            rows = np.arange(len(suspect))
            rows[broken] = suspect.argmax()
            rest, batch = members.one(batch, rows)
            looked_at = members._replace(trainers=rest)
            params = jax.tree.map(lambda x: x[rows], params)
        bad = np.asarray(whole(_find_bad(looked_at, params, batch)))
        bad = bad & suspect[:, None]
        is_named = bad.any(axis=1)
        for index in np.flatnonzero(is_named):
            reasons[index] = StopReason.NON_FINITE
        lost = [reason is StopReason.NON_FINITE for reason in reasons]
        bad = np.column_stack([bad, np.array(lost) & ~is_named])
        lasts = jnp.asarray(starts + np.maximum(steps - 1, 0))
        counts = jax.vmap(count_non_finite)(counts, jnp.asarray(bad), lasts)
    progress = dataclasses.replace(progress, nan_counts=counts)
    row = np.arange(int(steps.max()))
    # A member that has ended has no more losses.
    kept = np.where(row[:, None] < steps, losses.T[: len(row)], np.nan)
    history = History(row, kept)
    return with_progress(trainers, progress), history, reasons, distances

"""A solver of Optimistix on many trainers at once."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._boundary import PyTree, outside_mesh, warn
from .._curvature import Mode, checked_mode
from .._data import Whole
from .._devices import Peers, same_inputs
from .._fit import ProgressBar
from .._minimum import Distance
from .._policy import StopReason
from .._program import program
from .._solve import (
    Problem,
    checked_solver,
    find_bad,
    is_suspect,
    progress_at,
)
from .._step import (
    AbstractTrainer,
    count_non_finite,
    diagnosed,
    progress_of,
    scorer_of,
    stripped,
    warn_of_no_data,
    warn_of_suspect_data,
    with_progress,
)
from .._storage import History
from .many_trainers import ManyTrainers
from .members import Members
from .result import ManyResult, measured
from .rounds import settle


@program
def _find_bad(
    members: Members, params: PyTree, batch: Any
) -> Bool[Array, "members columns"]:
    of_one = lambda trainer, batch, params: find_bad(stripped(trainer), params, batch)
    return members.map(of_one, batch, params)


class ManySolve(NamedTuple):
    """The solver of `fit_many`, and its options; `shows` asks for a progress bar."""

    solver: Any
    steps: int
    jac: Mode | None
    shows: bool


@outside_mesh
def solve_many(
    subject: ManyTrainers, trainer: AbstractTrainer, data: Any, asked: ManySolve
) -> ManyResult[Any]:
    """Implements `fit_many` with a solver."""
    solver, steps, jac, shows = asked
    place, group = subject.place, subject.group
    with same_inputs(subject.entrance, place) as require_same, place.context():
        encoded, rows = checked_solver(solver, steps, "steps")
        batch = subject.prepare(data)
        options: dict[str, Any] = {"steps": steps, "jac": jac, "group": group}
        options |= {"solver": (solver, encoded), "data_axis": subject.data_axis}
        like = subject.template(trainer), subject.row(batch)
        require_same(trainer, batch, like, **options)
        whole = Whole(batch)
        warn_of_suspect_data(whole, "data", lambda: like)
        scorer = scorer_of(trainer, whole)
        trainer = subject.begun(trainer, whole, scorer, is_solved=True)
        flags = (*subject.config, *subject.flags(batch))
        members = Members(subject.placed(trainer), flags, group, place)
        problem = Problem(batch, encoded, rows, checked_mode(jac))
        shown = shows and Peers(place.mesh, subject.entrance).is_first
        with ProgressBar(subject.size, 0, shown=shown, unit=" members") as bar:
            solved, history, reasons, distances = _solve(members, problem, steps, bar)
    result = measured(subject.result(solved, history, reasons), distances)
    if (end := subject.bad_end(result)) is not None:
        diagnosis = diagnosed(end.trainer, subject.seen(Whole(batch), end.index))
        end.raise_if_asked(result, diagnosis.advised_on_data)
        warn(f"{end.warning} {diagnosis}")
    ended = lambda i: (subject.picked(result, i), subject.seen(Whole(batch), i))
    with subject.place.context():
        lacking = warn_of_no_data(subject.entrance, history.loss, ended)
    return dataclasses.replace(result, _without_data=tuple(lacking))


def _solve(
    members: Members, problem: Problem, max_steps: int, bar: ProgressBar
) -> tuple[AbstractTrainer, History, list[StopReason], list[Distance]]:
    """Solves; returns the trainers, a history, and why and how near each ended."""
    trainers, _, _, place = members
    whole, old = place.whole, progress_of(trainers)
    ends, arrivals, broken = settle(members, problem, max_steps, bar)
    end, opt_state = ends
    starts, losses, steps, in_vain = jax.device_get(
        jax.tree.map(whole, (old.step_count, end.losses, end.steps, end.in_vain))
    )
    end = end._replace(step_count=old.step_count + end.steps)
    progress = progress_at(end, old, opt_state, old.nan_counts)
    reasons = [why for why, _ in arrivals]
    distances = [distance for _, distance in arrivals]
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

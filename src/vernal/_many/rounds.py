"""The rounds of solves of many: each decides as `solve` does, and all run together."""

import functools as ft
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Int

from .._boundary import PyTree, warn
from .._devices import ANYWHERE, AbstractPlacement
from .._fit import ProgressBar
from .._minimum import Distance, settled, what_falls
from .._policy import StopReason
from .._program import program, words_of
from .._projection import EigenProjector
from .._solve import (
    REASONS,
    Asked,
    End,
    Problem,
    Rounds,
    Start,
    can_whiten,
    in_parameters,
    is_least_squares,
    is_lost,
    progress_at,
    run_solver,
)
from .._step import (
    AbstractTrainer,
    bijections_of,
    bounds_of,
    config_of,
    in_free_coordinates,
    initial_opt_state,
    live,
    progress_of,
    stripped,
    with_progress,
)
from .._tree import ravel_size
from .arrival import distances_of
from .mapped_chunk import member
from .members import Members
from .stack import on_device, on_host, stack, with_rows

# About how many multiplications of a step take as long as its other work.
_MOST_TOGETHER = 2**19

Ends = tuple[End, PyTree]
"""How the solvers ended, and the first states of the optimisers."""

Arrival = tuple[StopReason, Distance]
"""Why one ended, and how near its minimum."""


class Point(NamedTuple):
    """Where a round begins, in free coordinates."""

    space: EigenProjector | None
    params: PyTree
    held: Start

    @classmethod
    def of(cls, asked: Asked) -> "Point":
        return cls(asked.projector, asked.trainer.params, asked.held)


@ft.partial(program, in_order=True)
def _run(
    members: Members,
    problem: Problem,
    points: Point | None,
    goals: Int[Array, " members"],
) -> End:
    """Solves for each, with at most as many steps as its goal.

    Without points all begin where they are, and share what they share.
    """

    def of_one(
        trainer: AbstractTrainer, batch: Any, point: Point | None, goal: Array
    ) -> End:
        inner = in_free_coordinates(trainer)
        own = inner.projector, inner.params, Start.of(inner)
        space, params, held = own if point is None else point
        inner = live(stripped(inner), params)
        return run_solver(inner, space, held, problem._replace(batch=batch), goal)

    return members.place.pin_rows(members.map(of_one, problem.batch, points, goals))


@program
def _in_free_coordinates(members: Members, batch: Any) -> Any:
    free = lambda trainer, _: progress_of(in_free_coordinates(trainer))
    return members.place.pin_rows(members.map(free, batch))


@program
def _in_parameters(members: Members, batch: Any, end: End) -> Ends:
    def of_one(trainer: AbstractTrainer, _: Any, end: End) -> Ends:
        end = in_parameters(end, trainer)
        return end, initial_opt_state(trainer.optimiser, end.params, end.latent)

    return members.place.pin_rows(members.map(of_one, batch, end))


def settle(
    members: Members, problem: Problem, max_steps: int, bar: ProgressBar
) -> tuple[Ends, list[Arrival], list[int]]:
    """Solves for all. Members within bounds go on as `solve` does, round after round.

    Returns how all ended, why and how near each ended, and which met an error.
    """
    together, place = _Together(members, problem, max_steps), members.place
    first, size = together.first(), len(members.trainers.step_count)
    arrivals, answers = dict[int, Arrival](), dict[int, End]()
    if first is not None:
        ends = _in_all(members, problem, first)
        arrivals = _arrived(members, problem, ends)
        if len(arrivals) == size:
            bar.update(size, dict)
            return ends, [*arrivals.values()], []
        answers = together.picked(first, set(range(size)) - set(arrivals))
        bar.update(len(arrivals), dict)
    rounds = {i: together.begun(i) for i in range(size) if i not in arrivals}
    asked = {index: own.next() for index, own in rounds.items()}
    try:
        while left := {i: own for i, own in asked.items() if isinstance(own, Asked)}:
            answers = answers or together.answers(left)
            for index, end in answers.items():
                asked[index] = rounds[index].next(end)
            bar.update(sum(not isinstance(asked[i], Asked) for i in answers), dict)
            answers = {}
    except KeyboardInterrupt:
        if place.mesh is not None:
            raise
    errors = {i: own for i, own in asked.items() if isinstance(own, RuntimeError)}
    if errors:
        index, error = next(iter(errors.items()))
        if place.mesh is not None:
            raise error
        warn(
            f"{len(errors)} of {size} members met an error, and stay where they were. "
            f"That of member {index}: {words_of(error)}"
        )
    rows = dict[int, End]()
    for index, own in rounds.items():
        failed = StopReason.FAILED if index in errors else None
        reason = StopReason.INTERRUPTED if isinstance(asked[index], Asked) else failed
        end, arrivals[index] = own.joined(reason, together.shapes)
        rows[index] = end
    if first is None:
        rows = {index: on_device(end) for index, end in rows.items()}
        columns = zip(*map(jax.tree.leaves, rows.values()), strict=True)
        joined = jax.tree.structure(rows[0]).unflatten(stack([*columns]))
    else:
        joined = with_rows(place.home(first._replace(local=None)), rows)
    ends = _in_all(members, problem, _spread(joined, place))
    return ends, [arrivals[index] for index in range(size)], [*errors]


class _Together:
    """Runs what members ask for in one program or, if they are large, one by one."""

    def __init__(self, members: Members, problem: Problem, most: int):
        self._members, self._problem, self._most = members, problem, most
        self._is_apart = _is_apart(members, problem)

    @ft.cached_property
    def _at_home(self) -> tuple[Members, Any]:
        """The members and their data on the host, for those that go on."""
        members = self._members
        home = members.place.home((members.trainers, self._problem.batch))
        trainers, batch = on_host(home)
        return members._replace(trainers=trainers), batch

    def begun(self, index: int) -> Rounds:
        """Returns the rounds of a member."""
        members, batch = self._at_home
        trainer, batch = on_device(members.one(batch, index))
        problem = self._problem._replace(batch=batch)
        is_bounded = bounds_of(trainer) is not None
        return Rounds(trainer, problem, ANYWHERE, self._most, is_bounded)

    def first(self) -> End | None:
        """Runs the first round of all, unless members are run one by one."""
        if self._is_apart:
            return None
        start, goal = None, self._most
        if bounds_of(self._members.trainers) is not None:
            start, goal = self._start, self._asked_first().goal
        goals = np.full(len(self._members.trainers.step_count), goal)
        try:
            return self._run(start, goals)
        except RuntimeError:
            if self._members.place.mesh is not None:
                raise
            self._is_apart = True
            return None

    @ft.cached_property
    def _shapes(self) -> End:
        return self._asked_first().shapes()

    def shapes(self) -> End:
        """Returns the shapes of how one ends."""
        return self._shapes

    def _asked_first(self) -> Asked:
        asked = self.begun(0).next()
        assert isinstance(asked, Asked)
        return asked

    def answers(self, asked: Mapping[int, Asked]) -> Mapping[int, End | RuntimeError]:
        """Runs what most ask for; the others wait."""
        if self._is_apart:
            index, one = next(iter(asked.items()))
            return {index: one.answer()}
        kinds = {i: jax.tree.structure(own.projector) for i, own in asked.items()}
        most, _ = Counter(kinds.values()).most_common(1)[0]
        own = {i: asked[i] for i, kind in kinds.items() if kind == most}
        start, place = self._start, self._members.place
        if most != jax.tree.structure(start.space):
            start = Point(None, start.params, start.held._replace(latent=None))
        if most == jax.tree.structure(start.space):
            goals = np.zeros(len(self._members.trainers.step_count), np.int32)
            goals[[*own]] = [one.goal for one in own.values()]
            points = {i: Point.of(one) for i, one in own.items()}
            points = with_rows(place.home(start), points)
            try:
                return self.picked(self._run(points, goals), own)
            except RuntimeError as error:
                if place.mesh is not None:
                    return dict.fromkeys(own, error)
                self._is_apart = True
        index, one = next(iter(own.items()))
        return {index: one.answer()}

    def picked(self, ends: End, indices: Iterable[int]) -> dict[int, End]:
        """Returns how some of them ended."""
        rows = on_host(self._members.place.home(ends))
        leaves, structure = jax.tree.flatten(rows)
        pick = lambda index: structure.unflatten(x[index] for x in leaves)
        return on_device({index: pick(index) for index in indices})

    def _run(self, points: Point | None, goals: Int[np.ndarray, " members"]) -> End:
        members, rows = self._members, (points, on_device(goals.astype(np.int32)))
        placed = _spread(rows, members.place)
        return jax.block_until_ready(_run(members, self._problem, *placed))

    @ft.cached_property
    def _start(self) -> Point:
        """Where all begin: a space that they share has a row for each, too."""
        members, trainers = self._members, self._members.trainers
        progress, count = progress_of(trainers), len(trainers.step_count)
        if bijections_of(trainers) is not None:
            progress = _in_free_coordinates(members, self._problem.batch)
        config = jax.tree.structure(config_of(trainers))
        own = config.unflatten(members.flags[: config.num_leaves]).projector
        at_home = self._at_home[0].trainers.projector
        as_rows = lambda own, x, y: x if own else np.broadcast_to(y, (count, *y.shape))
        space = jax.tree.map(as_rows, own, trainers.projector, at_home)
        return Point(on_device(space), progress.params, Start.at(progress))


def _is_apart(members: Members, problem: Problem) -> bool:
    """Whether members are so large that each is solved for by itself.

    Together they all take as many steps as the slowest of them.
    """
    if members.place.mesh is not None or jax.default_backend() != "cpu":
        return False
    count, leaves = len(members.trainers.step_count), jax.tree.leaves(problem.batch)
    has_rows = members.flags[len(members.flags) - len(leaves) :]
    pairs = zip(leaves, has_rows, strict=True)
    data = sum(np.size(leaf) // (count if own else 1) for leaf, own in pairs)
    size = ravel_size(members.trainers.params) // count
    # A minimiser forms no Jacobian, but a matrix of the parameters.
    has_rows = is_least_squares(problem.encoded.decode())
    return (data * has_rows + size) * size**2 > _MOST_TOGETHER


def _spread(rows: Any, place: AbstractPlacement) -> Any:
    """Puts arrays with a row for each member where the members are."""
    return place.put_rows(rows, (True,) * len(jax.tree.leaves(rows)))


def _in_all(members: Members, problem: Problem, end: End) -> Ends:
    """Finds where each ended in its parameters, and the state of its optimiser."""
    trainers = members.trainers
    if bijections_of(trainers) is None and trainers.optimiser is None:
        return end, None
    free = end._replace(losses=None, local=None)
    found, opt_state = _in_parameters(members, problem.batch, free)
    return found._replace(losses=end.losses, local=end.local), opt_state


def _arrived(members: Members, problem: Problem, ends: Ends) -> dict[int, Arrival]:
    """Finds why those that are done ended, and how near their minima.

    Within bounds the others have other elements to hold, or have ended badly.
    """
    trainers, place, (end, opt_state) = members.trainers, members.place, ends
    bounds, old = bounds_of(trainers), progress_of(trainers)
    progress = progress_at(end, old, opt_state, old.nan_counts)
    ended = members._replace(trainers=with_progress(trainers, progress))
    rows = old.params, end.params, end.local, end.reason, end.is_settled
    *places, numbers, flags = on_host(place.home(rows))
    indices = range(len(numbers)) if bounds is None else np.flatnonzero(flags).tolist()
    kind = what_falls(trainers, is_least_squares(problem.encoded.decode()))
    distances = distances_of(ended, problem.batch, kind, places[-1], indices)
    arrivals = {
        index: (settled(REASONS[numbers[index]], distance), distance)
        for index, distance in zip(indices, distances, strict=True)
    }
    if bounds is None:
        return arrivals
    config = jax.tree.structure(config_of(trainers))
    own = bounds_of(config.unflatten(members.flags[: config.num_leaves]))
    near, own = on_host(place.home(bounds)), jax.tree.leaves(own)
    whitens = can_whiten(eqx.filter_eval_shape(members.one, problem.batch, 0)[0])

    def is_done(index: int) -> bool:
        at = jax.tree.map(lambda x: x[index], places)
        well = StopReason.CONVERGED, StopReason.NO_MINIMUM
        is_well = arrivals[index][0] in well
        return is_well and not (whitens and is_lost(member(near, own, index), *at))

    return {index: arrival for index, arrival in arrivals.items() if is_done(index)}

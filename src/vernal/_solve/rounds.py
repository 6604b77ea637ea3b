"""The rounds of a solve, between which its space is whitened."""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._data import Whole
from .._devices import AbstractPlacement
from .._fit import FitResult
from .._inference import Passes, derive
from .._minimum import (
    Distance,
    Local,
    Lower,
    Site,
    distance_of,
    endless,
    lower_point,
    measure_jacobian,
    second_look,
    settled,
    unknown,
    what_falls,
)
from .._policy import StopReason
from .._projection import EigenProjector
from .._step import (
    AbstractTrainer,
    Diagnosis,
    bounds_of,
    count_non_finite,
    diagnosed,
    in_free_coordinates,
    initial_opt_state,
    live,
    noted,
    prior_count,
    progress_of,
    scorer_of,
    stripped,
    with_progress,
)
from .._storage import History
from .._tree import cast_like, ravel, ravel_size, unravel
from .box import is_lost
from .problem import (
    IS_OVER,
    REASONS,
    End,
    Problem,
    Start,
    find_bad_alone,
    in_parameters,
    is_least_squares,
    is_suspect,
    progress_at,
    run,
    run_solver,
)
from .whiten_again import can_whiten, damped, whitened_again

# The reasons for which another round may help, with others held at their bounds.
_GOES_ON = (StopReason.STALLED, StopReason.FAILED, StopReason.DIVERGED)

# The number of steps in a short round and in a long one, and how many for each
# parameter: to whiten costs about as much as one for each, and a solver needs several
# to learn the curvature of a space that has gone stale.
_SHORT, _LONG = 8, 128
_SHORT_EACH, _LONG_EACH = 1, 4

# After a round that gained little, the next is longer by this factor.
_LONGER = 4

# A round gains if the loss falls by this fraction of what the metric promised.
_GAIN = 0.1


T = TypeVar("T")


class Asked(NamedTuple):
    """What a solver is to do next, as `run` is given it."""

    trainer: AbstractTrainer
    projector: EigenProjector | None
    held: Start
    problem: Problem
    goal: int

    def answer(self) -> End | RuntimeError:
        """Solves; returns an error of the solver, or of the user's methods."""
        try:
            return jax.block_until_ready(run(*self._arguments()))
        except RuntimeError as error:
            return error

    def shapes(self) -> End:
        """Returns the shapes of the end, for which all is traced."""
        return eqx.filter_eval_shape(run_solver, *self._arguments())

    def _arguments(self) -> Any:
        return self._replace(goal=jax.device_put(np.int32(self.goal)))

    def unmoved(self, shapes: End) -> End:
        """Returns the end of a solver that has not taken a step."""
        end: End = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        held = self.held
        return end._replace(
            params=self.trainer.params,
            latent=held.latent,
            best=held.best,
            best_state=held.state,
            best_loss=jnp.asarray(held.loss, end.best_loss.dtype),
            step_count=self.trainer.step_count,
            stumble=self.trainer.params,
            local=None,
        )


Way = Generator[Asked, End, T]
"""Decisions that ask for one round after the other, and are sent how each ended."""


class _Round(NamedTuple):
    """How a round ended.

    - `steps`: how many steps it took.
    - `last`: the loss at the end.
    - `is_settled`: whether it is known which parameters are held at their bounds.
    - `is_over`: whether more rounds are of no use.
    """

    end: End
    projector: EigenProjector | None
    distance: Distance
    reason: StopReason
    steps: int
    last: float
    is_settled: bool
    is_over: bool

    def with_best_of(self, other: "_Round") -> "_Round":
        """Returns this round with what is the best after another one."""
        best, state, loss = other.end.best, other.end.best_state, other.end.best_loss
        end = self.end._replace(best=best, best_state=state, best_loss=loss)
        return self._replace(end=end)


class Rounds:
    """The decisions of one solve: what to do next, given how each round ended.

    It asks for a round after the other, so that those of many are run together.
    """

    def __init__(
        self,
        trainer: AbstractTrainer,
        problem: Problem,
        place: AbstractPlacement,
        most: int,
        rewhiten: bool,
    ):
        placed = in_free_coordinates(place.put(trainer))
        self._trainer, self._placed, self._place = trainer, placed, place
        self._problem, self._stripped = problem, stripped(placed)
        self._projector, self._held = placed.projector, Start.of(placed)
        self._found: _Round | None = None
        self._damped: EigenProjector | None = None
        self._most, self._ran_out = most, False
        self._way = self._go(rewhiten and can_whiten(placed))
        self._losses: list[np.ndarray] = []
        size = ravel_size(placed.params)
        self._short = max(_SHORT, _SHORT_EACH * size)
        self._long = max(_LONG, _LONG_EACH * size)

    def next(
        self, answer: End | RuntimeError | None = None
    ) -> Asked | RuntimeError | None:
        """Goes on with the answer to what was asked.

        Returns what to do next; `None` at the end, or the error that ended it.
        """
        way = self._way
        try:
            if isinstance(answer, RuntimeError):
                return way.throw(answer)
            return next(way) if answer is None else way.send(answer)
        except StopIteration:
            return None
        except RuntimeError as error:
            return error

    def _go(self, whitens: bool) -> Way[None]:
        """Solves until it converges, gets no further, or has taken its steps."""
        left, before, kept = self._most, np.inf, None
        while True:
            try:
                left = yield from self._attempt(left, whitens)
            except RuntimeError:
                if kept is None:
                    raise
                # The way from the lower point led where the model has an error.
                self._found = kept
                return
            now, lower = self._found, self._lower_point()
            if now is None or lower is None:
                return
            reason = settled(now.reason, lower.distance)
            kept = now._replace(distance=lower.distance, reason=reason)
            if not (left and now.last < before):
                self._found = kept
                return
            before = now.last
            params = unravel(jnp.asarray(lower.point), now.end.params)
            if not (whitens and self._whiten(params)):
                self._begin_within(now, params)

    def _attempt(self, left: int, whitens: bool) -> Way[int]:
        """Solves from where it is; returns how many steps are left."""
        if bounds_of(self._placed) is not None:
            if whitens and self._found is None:
                return (yield from self._settle_twice(left))
            return (yield from self._settle(left, whitens, self._found))[1]
        if whitens:
            return (yield from self._search(left))
        self._found = yield from self._run(left)
        return left - self._found.steps

    def _lower_point(self) -> Lower | None:
        """Finds a point below the end of the last round, to which no slope leads."""
        now = self._found
        if now is None or now.reason in IS_OVER:
            return None
        return lower_point(*self._surroundings(now.end), now.distance)

    def _surroundings(self, end: End) -> tuple[Site, Any]:
        """Returns what `second_look` and `lower_point` need to know of an end."""
        problem = self._problem
        kind = what_falls(self._placed, is_least_squares(problem.encoded.decode()))
        trainer = live(self._stripped, end.params)
        return Site(trainer, problem.batch, kind), end.local

    def _settle_twice(self, left: int) -> Way[int]:
        """Solves within bounds, and, if that ends badly, again from the start.

        A long step in the whitened space may end on a bound where other parameters have
        no effect, far from where they belong. So, unless there are few steps, it looks
        after a quarter of them, and keeps half for the parameters themselves. Some of
        these are to go on from the lower of the two ends. Returns how many are left.
        """
        half = left // 2
        part = half // 2 if left >= self._long else left
        kept, unused = yield from self._settle(part, True, None)
        left -= part - unused
        if kept.reason is StopReason.MAX_STEPS and left and not self._is_lost():
            self._begin(kept.end.params, kept.projector, kept.end.latent)
            kept, unused = yield from self._settle(part, True, kept)
            left -= part - unused
        has_converged = kept.reason is StopReason.CONVERGED
        if has_converged and not self._is_lost():
            return left
        # One that took all steps has half of them again.
        is_over = not left
        left = left or half
        if not left:
            return 0
        self._begin(self._placed.params, None, None)
        spare, count = 0 if has_converged else left // 4, len(self._losses)
        # One that leads to an error, or to where nothing is finite, does not count.
        now, is_lower, ran_out = None, False, False
        try:
            now, unused = yield from self._settle(left - spare, False, None)
            is_lower = now.last < kept.last - now.distance.noise
            is_lower &= now.reason is not StopReason.NON_FINITE
            ran_out = not is_lower and now.reason is StopReason.MAX_STEPS
        except RuntimeError:
            pass
        if now and is_lower:
            left = spare + unused
            if is_over:
                before = np.concatenate(self._losses[:count])
                self._losses[:count] = [before[: len(before) - half]]
            if not self._whiten(now.end.params):
                self._begin_within(kept, now.end.params)
            kept = self._moved(now)
        else:
            # The first way goes on as if there had been no other.
            del self._losses[count:]
            left = 0 if is_over else left
            kept = kept.with_best_of(now) if now else kept
            self._begin(kept.end.params, kept.projector, kept.end.latent)
        self._found = kept
        is_done = kept.is_settled and kept.reason is StopReason.CONVERGED
        if left and not is_done and kept.reason is not StopReason.NON_FINITE:
            kept, left = yield from self._settle(left, True, kept)
        has_converged = kept.reason is StopReason.CONVERGED
        if ran_out and has_converged and self._is_lost():
            # More steps from the start may lead lower.
            self._ran_out = True
            distance = kept.distance._replace(is_complete=np.array(False))
            why = StopReason.MAX_STEPS
            self._found = kept._replace(distance=distance, reason=why)
        return left

    def _is_lost(self) -> bool:
        """Whether the last round ended where a long step may have led."""
        assert self._found is not None
        bounds, end = bounds_of(self._placed), self._found.end
        assert bounds is not None
        start = self._placed.params
        return is_lost(bounds, start, end.params, end.local)

    def _settle(
        self, left: int, whitens: bool, before: _Round | None
    ) -> Way[tuple[_Round, int]]:
        """Solves until it is known what is held.

        `before` is the round before, if this goes on from it; from the start, it stops
        where it seems lost in a whitened space. Returns the last round, and how many
        steps are left.
        """
        stops = whitens and before is None
        while True:
            now = yield from self._taken(left)
            left -= now.steps
            fall = np.inf if before is None else before.last - now.last
            is_open = not now.is_settled and now.reason not in IS_OVER
            is_lost = stops and self._is_lost()
            # An open round ends beside the minimum, so nobody asks how far it is.
            if is_lost or not (is_open and left and now.steps and fall > 0):
                now = self._found = self._seen(now)
                falls = now.reason in _GOES_ON and fall > now.distance.noise
                if is_lost or not (now.is_settled and left and now.steps and falls):
                    return now, left
            before = now
            if not (whitens and not stops and self._whiten(now.end.params)):
                self._begin(now.end.params, now.projector, now.end.latent)

    def _search(self, left: int) -> Way[int]:
        """Solves from the given space on, and at most twice more from the start.

        A space goes stale on the way from a start far away. A solver that descends in
        it ends in a curved valley of the loss, along which it crawls: the second
        attempt whitens often from the beginning. Where nothing helps, as where a model
        is flat, the third begins with shorter steps. The lowest end counts. Returns how
        many steps are left.
        """
        kept, left = yield from self._descend(left, self._long, None)
        for is_damped in (False, True):
            if kept.is_over or not left:
                break
            if not self._whiten(self._placed.params, is_damped):
                if not is_damped and kept.reason is StopReason.MAX_STEPS:
                    # There is no other space.
                    self._begin(kept.end.params, kept.projector, kept.end.latent)
                    kept = self._found = yield from self._run(left)
                    left -= kept.steps
                break
            now, left = yield from self._descend(
                left, self._short, float(kept.end.first)
            )
            if not now.last <= kept.last + now.distance.noise:
                now = kept.with_best_of(now)
            kept = self._found = now
        if kept.projector is self._damped and self._whiten(kept.end.params):
            self._found = self._moved(kept)
        return left

    def _descend(
        self, left: int, steps: int, before: float | None
    ) -> Way[tuple[_Round, int]]:
        """Solves in rounds, the first of so many `steps`, each in a space of its own.

        `before` is the loss at the beginning, `None` in the space that was given.
        Returns the last round, and how many steps are left.
        """
        promised: Any = 0
        while True:
            goal = min(left, steps)
            now = self._found = yield from self._run(goal)
            left -= now.steps
            fall = np.nan if before is None else before - now.last
            if now.is_over or not left:
                return now, left
            if now.distance.is_minimum:
                # The metric is right: up to the tolerance of the solver.
                steps = left
            elif before is None:
                if now.steps == goal:
                    return now, left
            elif fall > _GAIN * promised:
                steps = self._short
            elif steps < self._long:
                steps = min(_LONGER * steps, self._long)
            elif not fall > now.distance.noise:
                return now, left
            if not self._whiten(now.end.params):
                return now, left
            before, promised = now.last, now.distance.edm

    def _run(self, steps: int) -> Way[_Round]:
        """Solves in the space as it is."""
        return self._seen((yield from self._taken(steps)))

    def _taken(self, steps: int) -> Way[_Round]:
        """Solves, and leaves open how far the minimum is, which may take longer."""
        end = yield self._asked(steps)
        copied = end.losses, end.steps, end.reason, end.last, end.is_settled
        losses, count, why, last, is_settled = jax.device_get(copied)
        self._losses.append(losses[:count])
        distance = unknown(np.zeros(ravel_size(end.params), losses.dtype))
        so_far = end, self._projector, distance, REASONS[why]
        known = int(count), float(last), bool(is_settled), not count
        self._found = _Round(*so_far, *known)
        return self._found

    def _asked(self, steps: int) -> Asked:
        here = self._stripped, self._projector, self._held
        return Asked(*here, self._problem, steps)

    def _seen(self, taken: _Round) -> _Round:
        """Finds how far the minimum is from the end of a round."""
        end = taken.end
        end = end._replace(local=end.local or self._linearised(end))
        distance = second_look(*self._surroundings(end), distance_of(end.local))
        why, reason = taken.reason, settled(taken.reason, distance)
        is_done = why is not StopReason.MAX_STEPS and reason is StopReason.CONVERGED
        is_over = taken.is_over or is_done or reason is StopReason.NON_FINITE
        seen = {"distance": distance, "reason": reason, "is_over": is_over}
        return taken._replace(end=end, **seen)

    def _whiten(self, params: Any, is_damped: bool = False) -> bool:
        """Begins at these parameters in a space whitened there, if there is one."""
        again = whitened_again(live(self._placed, params), self._problem)
        if again is not None:
            projector, latent = again
            if is_damped:
                projector = self._damped = damped(projector)
            self._begin(params, projector, latent)
        return again is not None

    def _moved(self, found: _Round) -> _Round:
        """Returns a round in the space of the next one, which begins at its end."""
        end = found.end._replace(latent=self._held.latent)
        return found._replace(end=end, projector=self._projector)

    def _begin_within(self, found: _Round, params: Any) -> None:
        """Begins another round at these parameters, in the space of an earlier one."""
        space = found.projector
        at = None if space is None else space.to_latent(params)
        self._begin(params, space, cast_like(at, found.end.latent))

    def _begin(self, params: Any, projector: Any, latent: Any) -> None:
        """Begins another round at these parameters."""
        assert self._found is not None
        end = self._found.end
        self._projector = projector
        self._stripped = live(self._stripped, params)
        self._held = self._held._replace(
            latent=latent,
            best=end.best,
            state=end.best_state,
            loss=end.best_loss,
            first=end.first,
        )

    def _linearised(self, end: End) -> Local:
        """Measures the surroundings of the end by the Jacobian there."""
        trainer, batch = live(self._placed, end.params), self._problem.batch
        passes = Passes(jac=self._problem.jac)
        try:
            # The program of `whiten` and `standard_errors`.
            found = derive(trainer, batch, "jacobian", None, passes, holds=True)
        except TypeError:
            # The solver needs the gradient of the loss alone.
            return unknown(ravel(end.params))
        (jacobian,), fall = found.found, end.first - end.last
        assert found.deviances is not None
        residuals = found.value, found.deviances
        at_end = found.held, end.params, self._projector, fall
        count = prior_count(trainer)
        return measure_jacobian(jacobian, residuals, *at_end, count)

    def diagnosis(self) -> Diagnosis:
        """Finds out why the values at the end are not finite."""
        assert self._found is not None
        trainer = live(self._placed, self._found.end.stumble)
        return diagnosed(trainer, self._problem.batch)

    def result(self, reason: StopReason | None = None) -> FitResult[Any, Any]:
        """Makes the result, with another `reason` than the solver's if there is one."""
        old = progress_of(self._trainer)
        if self._found is None:
            none = History(np.zeros(0, int), np.zeros(0, old.best_loss.dtype))
            return FitResult(self._trainer, none, reason or StopReason.ERROR)
        found, losses = self._ended(reason)
        end, projector = self._place.home((found.end, found.projector))
        start, reason, counts = int(old.step_count), found.reason, old.nan_counts
        if is_suspect(reason, end.in_vain):
            # The solver does not say what it met.
            bad = find_bad_alone(self._stripped, end.stumble, self._problem.batch)
            unexplained = reason is StopReason.NON_FINITE and not np.any(bad)
            last = jnp.asarray(start + max(len(losses) - 1, 0))
            counts = count_non_finite(counts, jnp.append(bad, unexplained), last)
            reason = StopReason.NON_FINITE if np.any(bad) else reason
        count = np.asarray(start + len(losses), old.step_count.dtype)
        end = end._replace(step_count=jnp.asarray(count))
        optimiser, end = self._trainer.optimiser, in_parameters(end, self._trainer)
        opt_state = initial_opt_state(optimiser, end.params, end.latent)
        progress = progress_at(end, old, opt_state, counts)
        history = History(np.arange(start, start + len(losses)), losses)
        trainer = with_progress(self._trainer, progress, projector=projector)
        trainer = noted(trainer, scorer_of(trainer, Whole(self._problem.batch)))
        return FitResult(trainer, history, reason, found.distance)

    def joined(
        self, reason: StopReason | None, shapes: Callable[[], End]
    ) -> tuple[End, tuple[StopReason, Distance]]:
        """Returns how all rounds ended, as one, in the space that was given.

        Of a solve that has not come through a round, a `reason` says why; its end has
        these `shapes`.
        """
        if self._found is None:
            distance = unknown(np.asarray(ravel(self._placed.params)))
            end = self._asked(0).unmoved(shapes())
            return end, (reason or StopReason.ERROR, distance)
        found, losses = self._ended(reason)
        end, space = found.end, self._placed.projector
        if found.projector is not space:
            latent = cast_like(space.to_latent(end.params), self._placed.latent)
            end = end._replace(latent=latent)
        room = np.pad(losses, (0, end.losses.size - len(losses)))
        end = end._replace(
            losses=room, steps=np.asarray(len(losses), end.steps.dtype), local=None
        )
        return end, (found.reason, found.distance)

    def _ended(self, reason: StopReason | None) -> tuple[_Round, np.ndarray]:
        """Returns the last round, with the `reason` if there is one, and all losses."""
        assert self._found is not None
        found, losses = self._found, np.concatenate(self._losses)
        if reason is not None:
            return found._replace(reason=reason), losses
        if found.reason is not StopReason.NON_FINITE:
            distance = endless(*self._surroundings(found.end), found.distance)
            why = settled(found.reason, distance)
            found = found._replace(distance=distance, reason=why)
        has_left = len(losses) < self._most and not self._ran_out
        if found.reason is StopReason.MAX_STEPS and has_left:
            # It is the end of a round, after which nothing was gained.
            found = found._replace(reason=StopReason.STALLED)
        return found, losses

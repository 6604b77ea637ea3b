"""A running fit: the trainer as it is now, and what was recorded so far."""

import contextlib
import dataclasses
import signal
import threading
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._boundary import debugged, warn
from .._data import Minibatches, Source, Stream, Whole, in_whole
from .._devices import Peers, fingerprint, leaf_fingerprints
from .._loop import (
    MOST_ROWS,
    Chunk,
    Ended,
    Guard,
    LackingMetricError,
    LoopState,
    Monitor,
    Record,
    Task,
)
from .._policy import StopReason
from .._program import (
    are_on_one_cpu,
    hash_of_code,
    is_of_host,
    is_refused,
    is_switched_on,
)
from .._step import (
    AbstractTrainer,
    Scorer,
    advance,
    code_of,
    config_of,
    data_code_of,
    is_of_other_code,
    noted,
    progress_of,
    warn_of_suspect_data,
    warn_of_training_layers,
    with_progress,
    with_some_best,
    without_best,
)
from .._storage import Checkpointer, History, Recorder
from .answer import (
    checked_answer,
    have_one_loss,
    is_boolean,
    still_stopped,
    with_best_of,
)
from .feed import Feed
from .options import Callback, FitOptions
from .subject import AbstractSubject

# The size in bytes above which a state is updated in place, which takes one copy when
# a fit begins.
_WORTH_REUSE = 2**20


def _is_worth_reuse(progress: Any) -> bool:
    # A Ctrl-C is held back as long as a call takes, which on a CPU may be the chunk.
    if jax.default_backend() == "cpu":
        return False
    return sum(leaf.nbytes for leaf in jax.tree.leaves(progress)) >= _WORTH_REUSE


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Delays Ctrl-C until the results of a call are in place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        signal.raise_signal(signal.SIGINT)


class FitRun:
    """A running fit: the trainer as it is now, and what was recorded so far."""

    def __init__(
        self,
        subject: AbstractSubject,
        inputs: tuple[AbstractTrainer, Source, Monitor],
        options: FitOptions,
        peers: Peers,
        checkpointer: Checkpointer | None,
    ):
        """Resumes the fit of the newest checkpoint, if there is one."""
        self.subject, self._checkpointer, self.peers = subject, checkpointer, peers
        trainer, self.source, self.monitor = inputs
        self._steps, validation = options.steps, self.monitor.validation
        self._scored = self.source if validation is None else Whole(validation.batch)
        self._counts = subject.on_host(progress_of(trainer).nan_counts)
        self._first_steps = subject.on_host(progress_of(trainer).step_count)
        self._data = data_code_of(self._scored)
        self.is_whole, self.is_resumed = True, False
        self._recorder = Recorder(self._no_history)
        self._monitor_state = subject.first_monitor_state(self.monitor, trainer)
        trainer = self._begun(trainer, 0)
        placed = subject.placed(trainer)
        first = subject.count(placed)
        self._hold(trainer, placed)
        if checkpointer is not None:
            trainer, placed = self._restored(checkpointer, trainer, placed)
            self._hold(trainer, placed)
        self._keeps_best = options.best
        self._move_to(self._state)
        is_seen = checkpointer is not None or options.callback is not None
        self._in_place = not is_seen and _is_worth_reuse(progress_of(placed))
        if self._in_place:
            # The user's arrays are never overwritten, nor one array twice.
            self._move_to(jax.tree.map(lambda leaf: leaf.copy(), self._state))
        steps = subject.count(placed)
        self._feed = Feed(self.source, steps, subject.prepare, peers)
        with subject.place.context():
            self._template = subject.template(placed)
            self._record = Record(self._template, options.record, self._peek)
            seen = lambda: (self._template, self._peek())
            warn_of_suspect_data(self.source, "data", seen)
        if validation is not None:
            warn_of_training_layers(self._template)
        self._every = subject.number(options.every)
        self.has_accepted = np.zeros(subject.shape, bool)
        # A fit without a bad step does without guards, and does not compile them.
        self._is_stream = isinstance(self.source, Stream)
        self._guard: Guard = "always" if self._is_stream else "never"
        self._may_be_one = is_switched_on()
        # The last steps and batches of a stream: a stop is noticed one step later.
        self._last: deque[tuple[int, Whole[Any] | Minibatches]] = deque(maxlen=2)
        self.taken = steps - first
        self.stopped = self._is_over()
        if checkpointer is not None:
            checkpointer.require_columns(self._no_history())

    def kind(self) -> Hashable:
        """Returns what is equal for fits whose steps take as long; of a stream none."""
        if self._is_stream:
            return None
        parts = self._config, self.source, self.monitor, self._record
        leaves = jax.tree.leaves((parts, self._state))
        return hash_of_code(parts), *(getattr(leaf, "shape", ()) for leaf in leaves)

    def _restored(
        self, checkpointer: Checkpointer, trainer: AbstractTrainer, placed: Any
    ) -> tuple[AbstractTrainer, Any]:
        """Returns the trainer of the newest checkpoint, as `_hold` takes it."""
        subject, first = self.subject, self.subject.count(placed)
        found = checkpointer.restore(placed, self.trainer, first, self._monitor_state)
        restored, known, monitor_state, history = found
        if history is None:
            return trainer, placed
        self.is_resumed = True
        taken = subject.count(restored) - first
        if taken > self._steps and self.peers.is_first:
            warn(
                f"`checkpoint`: there are {taken} steps of this fit, and it asks for "
                f"{self._steps}: the result is that of all of them. Give a fit of its "
                "own another directory."
            )
        self._recorder.extend(history)
        self._monitor_state = subject.placed_state(monitor_state)
        restored = self._begun(restored, taken)
        projector = subject.place.home(restored.projector)
        trainer = with_progress(known, progress_of(restored), projector=projector)
        placed = subject.placed(restored)
        checkpointer.mark_as_written(placed)
        return trainer, placed

    def _begun(self, trainer: AbstractTrainer, taken: int) -> AbstractTrainer:
        """Returns the trainer without a best of other data, if steps are left."""
        if taken >= self._steps:
            return trainer
        is_validated = self.monitor.validation is not None
        scorer = self._scorer_of(trainer)
        return self.subject.begun(trainer, self._scored, scorer, is_validated)

    def _scorer_of(self, trainer: AbstractTrainer) -> Scorer:
        """Returns what scores a trainer in this fit.

        Only its code is looked at again: a callback, or the loss itself, may change an
        object among the data in what no loss reads.
        """
        return Scorer(code_of(trainer), self._data)

    def _hold(self, trainer: AbstractTrainer, placed: Any) -> None:
        """Goes on with a trainer, given as the user knows it and as it was placed.

        Unless arrays are split, the user gets the same configuration back.
        """
        self._config, is_split = config_of(placed), self.subject.place.splits
        self._given: Any = None
        self.trainer: AbstractTrainer = (
            placed if is_split else with_progress(trainer, progress_of(placed))
        )

    def _move_to(self, state: LoopState) -> None:
        self.trainer = with_progress(self.trainer, with_some_best(state.progress))
        self._monitor_state = state.monitor_state

    def _peek(self) -> Any:
        return self.subject.row(self._feed.peek())

    def shown(self) -> dict[str, str]:
        return self.subject.shown(self.trainer, self._recorder.history())

    def take(self, count: int) -> None:
        """Takes `count` steps, unless the fit stops."""
        if not self._in_place and is_of_other_code(self.trainer):
            # A callback may have changed what the loss reads.
            trainer = self._begun(self.trainer, self.taken)
            self._monitor_state = self.subject.first_monitor_state(
                self.monitor, trainer
            )
            self._hold(trainer, self.subject.placed(trainer))
        goal = self.taken + count
        try:
            while self.taken < goal and not self.stopped:
                self._take(goal - self.taken)
        except jax.errors.JaxRuntimeError as error:
            if not is_of_host(error):
                # Most likely the devices of another process no longer answer.
                self.peers.is_disconnected = self.peers.are_many
            raise

    def _take(self, count: int) -> None:
        subject, start = self.subject, self.subject.count(self.trainer)
        config, state = self._config, self._state
        now, pending = start, list[tuple[Ended, Any, Any]]()
        most_rows = 1 if self._is_stream else MOST_ROWS
        try:
            for source, steps in self._feed.sources(count):
                if self._is_stream:
                    self._last.append((now, source))
                now += steps
                parts = config, source, self.monitor, self._record
                goal, every = subject.number(now), self._every
                task = Task(*parts, goal, every, most_rows, self._guard)
                with _held_back() if self._in_place else contextlib.nullcontext():
                    try:
                        chunk, ended = self._run(task, state)
                    except LackingMetricError as error:
                        error.args += (now - steps,)
                        raise
                    state = chunk.state
                    # Not the chunk, which would keep the parameters of each step.
                    pending.append((ended, chunk.rows, chunk.scores))
                # The chunk before the last is done by now: no waiting for its flags,
                # and a loader is read not much further than needed.
                if len(pending) > 1 and subject.is_over(pending[-2][0].is_over):
                    break
        finally:
            # Also where a stream has ended: the results are kept.
            self.is_whole = not any(x.is_deleted() for x in jax.tree.leaves(state))
            if self.is_whole:
                with _held_back():
                    self._settle(start, state, pending)

    def _run(self, task: Task, state: LoopState) -> tuple[Chunk, Ended]:
        run = self.subject.run
        if self._may_be_one and are_on_one_cpu((task, state)):
            try:
                return run(task._replace(is_on_one_cpu=True), state, self._in_place)
            except jax.errors.JaxRuntimeError as error:
                if not is_refused(error):
                    raise
                self._may_be_one = False
        return run(task, state, self._in_place)

    def _settle(
        self, start: int, state: LoopState, pending: list[tuple[Ended, Any, Any]]
    ) -> None:
        """Takes over the results of chunks that began at the step `start`."""
        subject = self.subject
        self._move_to(state)
        noted(self.trainer, self._scorer_of(self.trainer))
        kept = [subject.recorded(ended.step_count, *of) for ended, *of in pending]
        for ended, *_ in pending:
            self.has_accepted |= subject.on_host(ended.has_accepted)
            if subject.on_host(ended.needs_guard).any():
                self._guard = "bad steps"
        self.taken += subject.count(self.trainer) - start
        self.stopped = self._is_over()
        for history in kept:
            self._recorder.extend(history)

    @property
    def _state(self) -> LoopState:
        progress = progress_of(self.trainer)
        progress = progress if self._keeps_best else without_best(progress)
        return LoopState(progress, self._monitor_state)

    def _is_over(self) -> bool:
        flags = [self.trainer.stopped]
        if self._monitor_state is not None:
            flags.append(self._monitor_state.is_over)
        return self.subject.is_over(*flags)

    def call(self, callback: Callback | None) -> StopReason | None:
        """Calls the callback, if there is one, and returns why to end, if at all."""
        reason = None
        if callback is not None:
            seen = self._recorder.history(is_final=False)
            if self._given is None:  # made once: members may share large arrays
                self._given = config_of(self.subject.handed_out(self.trainer))
            given = with_progress(self._given, progress_of(self.trainer))
            call = lambda: callback(given, seen)
            with debugged():
                answer, all_answers = self.peers.run_and_gather(
                    call, self._summary, "a callback"
                )
            if is_boolean(answer):
                reason = StopReason.CALLBACK if answer else None
            if any(one != all_answers[0] for one in all_answers):
                raise ValueError(
                    "`callback` returned another trainer on one process than on "
                    "another, or none. It must return the same on all."
                )
            if not is_boolean(answer) and answer is not None:
                self._go_on_with(answer, given)
        if self._checkpointer is not None and self._checkpointer.is_terminating():
            reason = reason or StopReason.TERMINATED
        if self.peers.is_interrupted:
            self.peers.handles_interrupt = True
            reason = reason or StopReason.INTERRUPTED
        return reason

    def _summary(self, answer: Any) -> Any:
        """Returns what of a callback's answer other processes must have too."""
        is_trainer = type(answer) is type(self.trainer)
        return leaf_fingerprints(answer) if self.peers.are_many and is_trainer else None

    def _go_on_with(self, answer: Any, given: AbstractTrainer) -> None:
        answer = checked_answer(answer, given)
        if self.subject.on_host(given.stopped).any():
            answer = still_stopped(answer, given)
        best_loss = self.subject.on_host(progress_of(answer).best_loss)
        if self._keeps_best and not np.isfinite(best_loss).all():
            answer = with_best_of(answer, given)
        answer = self.subject.taken_back(answer, given, self.trainer)
        answer = self._begun(answer, self.taken)
        if not have_one_loss(progress_of(answer), progress_of(self.trainer)):
            # Scores before and after do not compare.
            self._monitor_state = self.subject.first_monitor_state(self.monitor, answer)
        self._hold(answer, self.subject.placed(answer))
        self.stopped = self._is_over()

    @property
    def checkpoint_is_due(self) -> bool:
        step = self.subject.count(self.trainer)
        return self._checkpointer is not None and self._checkpointer.is_due(step)

    def write_checkpoint(self) -> None:
        """Writes a checkpoint, if the user wants any and all processes can."""
        is_possible = self.is_whole and not self.peers.is_disconnected
        if self._checkpointer is not None and is_possible:
            step = self.subject.count(self.trainer)
            self._checkpointer.write(
                step, self.trainer, self._monitor_state, self._recorder.history()
            )

    def described(self) -> dict[str, str]:
        """Describes the fit, to find out whether another process does the same."""
        step = eqx.filter_make_jaxpr(lambda trainer, batch: advance(trainer, batch)[0])
        program = step(self._template, self._peek())
        return {
            "class": type(self.trainer).__qualname__,
            "stop": self.monitor.fingerprint,
            "record": self._record.names,
            "program": fingerprint(f"{program[0]} {self._record}"),
        }

    def _no_history(self) -> History:
        shapes = self._record.shapes(self._template, self._peek)
        shape = (0, *self.subject.shape)
        loss = np.zeros(shape, self.trainer.best_loss.dtype)
        rows = {k: np.zeros((*shape, *v.shape), v.dtype) for k, v in shapes.items()}
        return History(np.zeros(0, int), loss, rows)

    @property
    def bad_steps(self) -> np.ndarray:
        """How many steps were bad, of each member, and of each column of its report."""
        bad = self.subject.on_host(progress_of(self.trainer).nan_counts) - self._counts
        return bad[..., 0, :]

    @property
    def is_stuck(self) -> np.ndarray:
        """Whether every step since the first bad one was bad, like `bad_steps`."""
        progress = progress_of(self.trainer)
        now = progress.nan_counts, progress.step_count
        counts, steps = map(self.subject.on_host, now)
        totals, firsts, _ = np.moveaxis(counts, -2, 0)
        return (totals > 0) & (firsts + totals == steps[..., None])

    @property
    def steps_of_each(self) -> np.ndarray:
        """How many steps each member has taken."""
        now = self.subject.on_host(progress_of(self.trainer).step_count)
        return np.asarray(now - self._first_steps)

    def source_at(self, step: int | None) -> Whole[Any] | Minibatches | None:
        """Returns where the batch of a step comes from; `None` is the last one.

        Of a stream only the last two are held: for another step returns `None`.
        """
        if not isinstance(self.source, Stream):
            return self.source
        for at, source in reversed(self._last):
            if step in (None, at):
                return source
        return None

    def _stop_reasons(self, reason: StopReason) -> Iterator[StopReason]:
        """Yields why the fit of each trainer ended: by default for `reason`."""
        subject, progress = self.subject, progress_of(self.trainer)
        last_bad = subject.on_host(progress.nan_counts)[..., -1, :].max(axis=-1)
        count = subject.on_host(progress.step_count)
        is_bad = (last_bad == count - 1) & (last_bad >= 0)
        stopped, states = subject.on_host(progress.stopped), self._monitor_state
        if subject.shape:
            states = jax.device_get(jax.tree.map(subject.place.whole, states))
        # Each step had a bad value, and none was accepted.
        is_all_bad = self.bad_steps.sum(axis=-1) >= max(self.taken, 1)
        is_all_skipped = np.asarray(is_all_bad & ~self.has_accepted)
        for index in np.ndindex(subject.shape):
            pick = lambda leaf, index=index: leaf[index] if index else leaf
            if stopped[index]:
                bad = is_bad[index]
                yield StopReason.NON_FINITE if bad else StopReason.POLICY
            elif (met := self.monitor.reason(jax.tree.map(pick, states))) is not None:
                yield met
            elif reason is StopReason.STEPS_TAKEN and is_all_skipped[index]:
                yield StopReason.ALL_SKIPPED
            else:
                yield reason

    def ended(self, reason: StopReason) -> Any:
        """Makes the result of a fit that ended, by default for `reason`."""
        if self.taken:
            # For the next fit, whatever changed in an object among the data.
            self._data = data_code_of(self._scored)
            noted(self.trainer, self._scorer_of(self.trainer))
        reasons = list(self._stop_reasons(reason))
        result = self.subject.result(self.trainer, self._recorder.history(), reasons)
        return self._marked(self.subject.checked(result, in_whole(self.source)))

    def cut_short(self, reason: StopReason) -> Any:
        result = self.subject.cut_short(self.trainer, self._recorder.history(), reason)
        return self._marked(result)

    def _marked(self, result: Any) -> Any:
        return (
            result if self._keeps_best else dataclasses.replace(result, _has_best=False)
        )

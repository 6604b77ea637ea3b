"""A fit on its way: the trainer as it is now, and what was recorded so far."""

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._boundary import debugged, is_debugged
from .._data import Minibatches, Source, Stream, Whole
from .._devices import Peers, fingerprint, leaf_fingerprints
from .._loop import (
    MOST_ROWS,
    Ended,
    LackingMetricError,
    LoopState,
    Monitor,
    Record,
    Task,
)
from .._policy import StopReason
from .._step import (
    AbstractTrainer,
    Diagnosis,
    advance,
    bad_data,
    config_of,
    diagnosed,
    last_bad_step,
    progress_of,
    with_progress,
)
from .._storage import Checkpointer, History, Recorder
from .._tree import require_alike
from .feed import Feed
from .subject import AbstractSubject, BadEnd

Callback = Callable[[Any, History], Any]

# Memory is used again for states of at least so many bytes: below that it is not worth
# the copy with which a fit begins.
_WORTH_REUSE = 2**20


def _is_worth_reuse(progress: Any) -> bool:
    # A Ctrl-C is held back as long as a call takes, which on a CPU may be the chunk.
    if jax.default_backend() == "cpu":
        return False
    return sum(leaf.nbytes for leaf in jax.tree.leaves(progress)) >= _WORTH_REUSE


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Holds Ctrl-C back until what is under way is in place."""
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


def _is_boolean(answer: Any) -> bool:
    # The outcome of a comparison is a boolean of NumPy or of JAX, as often as not.
    is_one = isinstance(answer, bool | np.bool_ | jax.Array)
    return is_one and np.shape(answer) == () and np.asarray(answer).dtype == bool


class FitRun:
    """A fit on its way: the trainer as it is now, and what was recorded so far."""

    def __init__(
        self,
        subject: AbstractSubject,
        peers: Peers,
        trainer: AbstractTrainer,
        source: Source,
        monitor: Monitor,
        record: Any,
        every: int,
        checkpointer: Checkpointer | None,
        is_seen: bool,
    ):
        """**Arguments:** as those of `fit`, and

        - `is_seen`: whether somebody else has a hold on the trainer between two chunks.
        """
        self._subject, self._checkpointer, self.peers = subject, checkpointer, peers
        self._counts = subject.on_host(progress_of(trainer).nan_counts)
        self.source = source
        self.is_whole = True
        self._recorder = Recorder(self._no_history)
        self.monitor = monitor
        self.monitor_state = subject.first_monitor_state(monitor, trainer)
        there, self.is_resumed = subject.placed(trainer), False
        first = subject.count(there)
        if checkpointer is not None:
            there, self.monitor_state, history = checkpointer.restore(
                there, first, self.monitor_state
            )
            if history is not None:
                projector = subject.place.home(there.projector)
                trainer = with_progress(
                    trainer, progress_of(there), projector=projector
                )
                self.is_resumed = True
                self._recorder.extend(history)
                there = subject.placed(there)
                self.monitor_state = subject.placed_state(self.monitor_state)
                checkpointer.mark_as_written(there)
        self._hold(trainer, there)
        self._in_place = not is_seen and _is_worth_reuse(progress_of(there))
        if self._in_place:
            # What is the user's is never overwritten, nor anything twice.
            mine = jax.tree.map(lambda leaf: leaf.copy(), self._state)
            self._move_to(mine)
        self.feed = Feed(source, subject.count(there), subject.prepare, peers)
        with subject.context():
            self._template = subject.template(there)
            self.record = Record(self._template, record, self._peek)
        self.every = every
        self._has_accepted = np.zeros(subject.shape, bool)
        # Of a stream the steps and the batches that were last: a stop is noticed late.
        self._last: deque[tuple[int, Whole[Any] | Minibatches]] = deque(maxlen=2)
        self.taken = subject.count(there) - first
        self.stopped = self._is_over()
        if checkpointer is not None:
            checkpointer.require_columns(self._no_history())

    def _hold(self, trainer: AbstractTrainer, there: Any) -> None:
        """Goes on with a trainer.

        **Arguments:**

        - `trainer`: as it was given. What of it does not change is given back as it is.
        - `there`: the same where the fit takes place.
        """
        is_split = self._subject.place.splits
        self._config = config_of(there)
        self.trainer: AbstractTrainer = (
            there if is_split else with_progress(trainer, progress_of(there))
        )

    def _move_to(self, state: LoopState) -> None:
        self.trainer = with_progress(self.trainer, state.progress)
        self.monitor_state = state.monitor_state

    def _peek(self) -> Any:
        return self._subject.row(self.feed.peek())

    def shown(self) -> dict[str, str]:
        """What is shown of the fit on its way."""
        return self._subject.shown(self.trainer, self.history())

    def take(self, count: int) -> None:
        """Takes `count` steps, unless the fit stops."""
        goal = self.taken + count
        try:
            while self.taken < goal and not self.stopped:
                self._take(goal - self.taken)
        except jax.errors.JaxRuntimeError:
            # Devices of another process no longer answer, as likely as not.
            self.peers.is_disconnected = self.peers.are_many
            raise

    def _take(self, count: int) -> None:
        subject, start = self._subject, self._subject.count(self.trainer)
        config, state = self._config, self._state
        now, every, pending = start, subject.number(self.every), []
        most_rows = 1 if self.feed.is_stream else MOST_ROWS
        try:
            for source, steps in self.feed.sources(count):
                if self.feed.is_stream:
                    self._last.append((now, source))
                now += steps
                parts = config, source, self.monitor, self.record
                task = Task(*parts, subject.number(now), every, most_rows)
                with _held_back() if self._in_place else contextlib.nullcontext():
                    try:
                        chunk, ended = subject.run(task, state, self._in_place)
                    except LackingMetricError as error:
                        error.args += (now - steps,)
                        raise
                    state = chunk.state
                    # Not the chunk itself: of a stream's every step it would keep the
                    # parameters.
                    pending.append((ended, chunk.rows, chunk.scores))
                # The step before the last is done by now: to ask it costs no waiting,
                # and a loader is not read much further than it is of use.
                if len(pending) > 1 and subject.is_over(pending[-2][0].is_over):
                    break
        finally:
            # Also where a stream ran dry: what was computed is kept.
            self.is_whole = not any(x.is_deleted() for x in jax.tree.leaves(state))
            if self.is_whole:
                with _held_back():
                    self._settle(start, state, pending)

    def _settle(
        self, start: int, state: LoopState, pending: list[tuple[Ended, Any, Any]]
    ) -> None:
        """Takes over what chunks have computed, from the step `start` on."""
        subject = self._subject
        self._move_to(state)
        kept = [subject.recorded(ended.step_count, *of) for ended, *of in pending]
        for ended, *_ in pending:
            self._has_accepted |= subject.on_host(ended.has_accepted)
        self.taken += subject.count(self.trainer) - start
        self.stopped = self._is_over()
        for history in kept:
            self._recorder.extend(history)

    @property
    def _state(self) -> LoopState:
        return LoopState(progress_of(self.trainer), self.monitor_state)

    def _is_over(self) -> bool:
        flags = [self.trainer.stopped]
        if self.monitor_state is not None:
            flags.append(self.monitor_state.is_over)
        return self._subject.is_over(*flags)

    def call(self, callback: Callback | None) -> StopReason | None:
        """Calls the callback, if there is one, and tells why to end, if at all."""
        reason = None
        if callback is not None:
            seen = self._recorder.history(is_final=False)
            call = lambda: callback(self.trainer, seen)
            with debugged():
                answer, told = self.peers.run_and_gather(call, self._told, "a callback")
            if _is_boolean(answer):
                reason = StopReason.CALLBACK if answer else None
            if any(one != told[0] for one in told):
                raise ValueError(
                    "`callback` returned another trainer on one process than on "
                    "another, or none. It must return the same on all."
                )
            if not _is_boolean(answer) and answer is not None:
                self._go_on_with(answer)
        if self._checkpointer is not None and self._checkpointer.is_terminating:
            reason = reason or StopReason.TERMINATED
        if self.peers.is_interrupted:
            self.peers.handles_interrupt = True
            reason = reason or StopReason.INTERRUPTED
        return reason

    def _told(self, answer: Any) -> Any:
        """What the other processes hear of the answer of a callback."""
        is_trainer = type(answer) is type(self.trainer)
        return leaf_fingerprints(answer) if self.peers.are_many and is_trainer else None

    def _go_on_with(self, answer: Any) -> None:
        if type(answer) is not type(self.trainer):
            raise TypeError(
                f"`callback` returned an object of type `{type(answer).__name__}`. It "
                "may return `None`, `True` to end the fit, or a trainer to go on with."
            )
        what = "the trainer that `callback` returned"
        require_alike(answer, self.trainer, what, "the one it was given")
        if progress_of(answer).params is not progress_of(self.trainer).params:
            # What was seen of other parameters says nothing of these.
            self.monitor_state = self._subject.first_monitor_state(self.monitor, answer)
        self._hold(answer, self._subject.placed(answer))
        self.stopped = self._is_over()

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether a checkpoint is due."""
        step = self._subject.count(self.trainer)
        return self._checkpointer is not None and self._checkpointer.is_due(step)

    def write_checkpoint(self) -> None:
        """Writes a checkpoint, if any are wanted, and all processes can do so."""
        is_possible = self.is_whole and not self.peers.is_disconnected
        if self._checkpointer is not None and is_possible:
            step = self._subject.count(self.trainer)
            self._checkpointer.write(
                step, self.trainer, self.monitor_state, self.history()
            )

    def described(self) -> dict[str, str]:
        """Describes what is fitted, as to find out whether another process does so."""
        step = eqx.filter_make_jaxpr(lambda trainer, batch: advance(trainer, batch)[0])
        program = step(self._template, self._peek())
        return {
            "class": type(self.trainer).__qualname__,
            "stop": self.monitor.fingerprint,
            "record": self.record.names,
            "program": fingerprint(f"{program[0]} {self.record}"),
        }

    def _no_history(self) -> History:
        shapes, shape = (
            self.record.shapes(self._template, self._peek),
            (0, *self._subject.shape),
        )
        loss = np.zeros(shape, self.trainer.best_loss.dtype)
        rows = {k: np.zeros((*shape, *v.shape), v.dtype) for k, v in shapes.items()}
        return History(np.zeros(0, int), loss, rows)

    def history(self) -> History:
        return self._recorder.history()

    @property
    def _is_all_skipped(self) -> np.ndarray:
        """Whether each step, of each member, had a bad value and was not accepted."""
        bad = self._subject.on_host(progress_of(self.trainer).nan_counts) - self._counts
        is_bad = bad[..., 0, :].sum(axis=-1) >= max(self.taken, 1)
        return np.asarray(is_bad & ~self._has_accepted)

    def diagnosis(self, end: BadEnd) -> Diagnosis:
        """Finds out why a fit ended at a value that is not finite.

        The model is evaluated for this where no step was accepted, or where an error is
        to be raised. Later on the fit may have gone astray by itself: there only the
        data of that step are looked at.
        """
        index, trainer = end.index, end.trainer
        source, step = self.feed.source, last_bad_step(trainer)
        if isinstance(source, Stream):
            source = dict(self._last).get(step, Whole(None))
        batch = self._subject.seen(source, index)
        with self._subject.context():
            is_asked = trainer.nan_policy.raises or is_debugged()
            if is_asked or not self._has_accepted[index]:
                return diagnosed(trainer, batch)
            data = bad_data(batch)
            return Diagnosis((f"At step {step}:", *data) if data else ())

    def _stop_reasons(self, reason: StopReason) -> Iterator[StopReason]:
        """Yields why the fit of each trainer ended; `reason` if it does not say."""
        subject, progress = self._subject, progress_of(self.trainer)
        last_bad = subject.on_host(progress.nan_counts)[..., -1, :].max(axis=-1)
        is_bad = last_bad == subject.on_host(progress.step_count) - 1
        stopped, states = subject.on_host(progress.stopped), self.monitor_state
        if subject.shape:
            states = jax.device_get(jax.tree.map(subject.place.whole, states))
        is_all_skipped = self._is_all_skipped
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
        """Makes the result of a fit that came to its end, with `reason` for it."""
        reasons = list(self._stop_reasons(reason))
        result = self._subject.result(self.trainer, self.history(), reasons)
        return self._subject.checked(result, self.source)

    def cut_short(self, reason: StopReason) -> Any:
        return self._subject.cut_short(self.trainer, self.history(), reason)

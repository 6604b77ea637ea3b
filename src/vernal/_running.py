"""A fit on its way: the trainer as it is now, and what was recorded so far."""

import contextlib
import hashlib
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ._alike import require_alike
from ._compiled import Moving, Task, is_over
from ._data import Source
from ._feed import Feed
from ._history import History, concatenate
from ._keeper import Keeper
from ._monitor import Monitor
from ._one import One
from ._peers import Peers
from ._record import MOST_ROWS, Record
from ._recorder import Recorder
from ._step import advance
from ._stop import StopReason

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


class Running:
    """A fit on its way: the trainer as it is now, and what was recorded so far."""

    def __init__(
        self,
        kind: One,
        peers: Peers,
        trainer: Any,
        source: Source,
        monitor: Monitor,
        record: Any,
        every: int,
        keeper: Keeper | None,
        is_seen: bool,
    ):
        """**Arguments:** as those of `fit`, and

        - `is_seen`: whether somebody else has a hold on the trainer between two chunks.
        """
        self._kind, self._keeper, self.peers = kind, keeper, peers
        self._recorder = Recorder(self._no_history)
        self.monitor, self.watched = monitor, kind.watched(monitor, trainer)
        trainer = kind.placed(trainer)
        self.is_resumed, first = False, kind.count(trainer)
        if keeper is not None:
            trainer, self.watched, history = keeper.restore(
                trainer, first, self.watched
            )
            self.is_resumed = history is not None
            if history is not None:
                self._recorder.extend(history)
                trainer = kind.placed(trainer)
                self.watched = kind.placed_state(self.watched)
        self._in_place = not is_seen and _is_worth_reuse(trainer._progress)
        if self._in_place:
            # That of the user is never overwritten.
            trainer = trainer._at(jax.tree.map(lambda x: x.copy(), trainer._progress))
        self.trainer: Any = trainer
        self.feed = Feed(source, kind.count(trainer), kind.prepare, peers)
        self.record = Record(kind.template(trainer), record, self._peek)
        self.every = every
        self.taken = kind.count(trainer) - first
        self.stopped = self._is_over()
        if keeper is not None:
            keeper.begin(self._no_history())

    def _peek(self) -> Any:
        return self._kind.row(self.feed.peek())

    def shown(self) -> dict[str, str]:
        """What is shown of the fit on its way."""
        return self._kind.shown(self.trainer, self.history())

    def take(self, count: int) -> None:
        """Takes `count` steps, unless the fit stops."""
        goal = self.taken + count
        try:
            while self.taken < goal and not self.stopped:
                self._take(goal - self.taken)
        except jax.errors.JaxRuntimeError:
            # Devices of another process no longer answer, as likely as not.
            self.peers.are_lost = self.peers.are_many
            raise

    def _take(self, count: int) -> None:
        kind, start = self._kind, self._kind.count(self.trainer)
        config, moving = self.trainer._at(None), self._moving
        now, every, pending = start, kind.number(self.every), []
        most_rows = 1 if self.feed.is_stream else MOST_ROWS
        try:
            for source, steps in self.feed.sources(count):
                now += steps
                parts = config, source, self.monitor, self.record
                task = Task(*parts, kind.number(now), every, most_rows)
                with _held_back() if self._in_place else contextlib.nullcontext():
                    chunk, ended = kind.run(task, moving, self._in_place)
                    moving = chunk.moving
                    # Not the chunk itself: of a stream's every step it would keep the
                    # parameters.
                    pending.append((ended, chunk.rows, chunk.scores))
                # The step before the last is done by now: to ask it costs no waiting,
                # and a loader is not read much further than it is of use.
                if len(pending) > 1 and kind.is_over(pending[-2][0].is_over):
                    break
        finally:
            # Also where a stream ran dry: what was computed is kept.
            kept = [kind.recorded(ended.step_count, *of) for ended, *of in pending]
            self.trainer = self.trainer._at(moving.progress)
            self.watched = moving.watched
            self.taken += kind.count(self.trainer) - start
            self.stopped = self._is_over()
            if kept:
                self._recorder.extend(concatenate(kept))

    @property
    def _moving(self) -> Moving:
        return Moving(self.trainer._progress, self.watched)

    def _is_over(self) -> bool:
        return self._kind.is_over(is_over(*self._moving))

    def call(self, callback: Callback | None) -> StopReason | None:
        """Calls the callback, if there is one, and tells why to end, if at all."""
        if callback is not None:
            answer = callback(self.trainer, self.history())
            if _is_boolean(answer) and answer:
                return StopReason.CALLBACK
            self._go_on_with(answer)
        if self._keeper is not None and self._keeper.asked_to_end:
            return StopReason.TERMINATED
        return StopReason.INTERRUPTED if self.peers.is_interrupted else None

    def _go_on_with(self, answer: Any) -> None:
        if answer is None or _is_boolean(answer):
            return
        if type(answer) is not type(self.trainer):
            raise TypeError(
                f"`callback` returned an object of type `{type(answer).__name__}`. It "
                "may return `None`, `True` to end the fit, or a trainer to go on with."
            )
        what = "the trainer that `callback` returned"
        require_alike(answer, self.trainer, what, "the one it was given")
        if answer._progress.params is not self.trainer._progress.params:
            # What was seen of other parameters says nothing of these.
            self.watched = self._kind.watched(self.monitor, answer)
        self.trainer = self._kind.placed(answer)
        self.stopped = self._is_over()

    @property
    def is_to_be_kept(self) -> bool:
        """Whether a checkpoint is due."""
        step = self._kind.count(self.trainer)
        return self._keeper is not None and self._keeper.is_due(step)

    def keep(self) -> None:
        """Writes a checkpoint, if any are wanted, and all can do so."""
        if self._keeper is not None and not self.peers.are_lost:
            step = self._kind.count(self.trainer)
            self._keeper.write(step, self.trainer, self.watched, self.history())

    def described(self) -> dict[str, str]:
        """Describes what is fitted, as to find out whether another process does so."""
        template, kind = self._kind.template(self.trainer), type(self.trainer)
        batch = self._peek()
        program = eqx.filter_make_jaxpr(lambda t, b: advance(t, b)[0])(template, batch)
        # Where an object lies says nothing of what it is.
        text = re.sub(r" at 0x[0-9a-f]+", "", f"{program[0]} {self.record}")
        return {
            "class": kind.__qualname__,
            "stop": self.monitor.fingerprint,
            "record": self.record.names,
            "program": hashlib.sha256(text.encode()).hexdigest(),
        }

    def _no_history(self) -> History:
        template, shape = self._kind.template(self.trainer), (0, *self._kind.shape)
        shapes = self.record.shapes(template, self._peek)
        loss = np.zeros(shape, self.trainer.best_loss.dtype)
        rows = {k: np.zeros((*shape, *v.shape), v.dtype) for k, v in shapes.items()}
        return History(np.zeros(0, int), loss, rows)

    def history(self) -> History:
        return self._recorder.history

    def cut_short(self, reason: StopReason) -> Any:
        return self._kind.cut_short(self.trainer, self.history(), reason)

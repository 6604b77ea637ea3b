"""What a fit fits: one trainer, or many at once."""

import abc
import functools
import math
import operator
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from .._boundary import PyTree
from .._data import Minibatches, Source, Whole
from .._devices import AbstractPlacement
from .._loop import Chunk, Ended, LoopState, Monitor, MonitorState, Rows, Task
from .._policy import StopReason
from .._step import (
    AbstractTrainer,
    Scorer,
    begun_on,
    is_scored_otherwise,
    non_finite_error,
    noted,
    progress_of,
    with_progress,
)
from .._storage import History


class BadEnd(NamedTuple):
    """A trainer, alone or one of many, that ended at non-finite values."""

    index: Any
    """An integer, or `()` if there is one trainer alone."""
    reason: StopReason
    trainer: AbstractTrainer
    warning: str
    which: str = ""
    """Which of many it is, for an error."""
    is_all: bool = True
    """Whether all of them did."""

    def raise_if_asked(self, result: Any, explanation: str) -> None:
        """Raises an error with the result, under a policy that raises."""
        is_bad = self.reason is StopReason.NON_FINITE
        if is_bad and self.trainer.nan_policy.raises:
            explanation = f"{self.which}{explanation}"
            raise non_finite_error(self.trainer, result, explanation)


class AbstractSubject(abc.ABC):
    """What a fit fits. Its arrays lie where `place` puts them."""

    # Not a module: each method of a module is made again when it is looked up.
    place: AbstractPlacement

    entrance: ClassVar[str]
    """The name of the function that the user called."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The leading axes of each recorded value: one for the members of many."""
        return ()

    # What goes to the devices.

    @abc.abstractmethod
    def source(self, data: Any) -> Source:
        """Makes a source of batches of the data that the user gave."""

    @abc.abstractmethod
    def marks(
        self, trainer: AbstractTrainer, source: Source, by_validation: bool
    ) -> np.ndarray:
        """Marks the data that each trainer is scored on."""

    @abc.abstractmethod
    def prepare(self, batch: Any) -> Any:
        """Converts and places a batch of a stream, for a step."""

    @abc.abstractmethod
    def prepare_validation(self, batch: Any) -> Any:
        """Converts and places the batch of a validation."""

    @abc.abstractmethod
    def first_monitor_state(
        self, monitor: Monitor, trainer: AbstractTrainer
    ) -> MonitorState | None:
        """Makes the first state of a monitor."""

    @abc.abstractmethod
    def placed(self, trainer: AbstractTrainer) -> Any:
        """Puts a trainer onto the devices of the fit."""

    @abc.abstractmethod
    def placed_state(self, state: PyTree) -> Any:
        """Puts what changes from step to step onto the devices of the fit."""

    def monitor(self, validation: Any, stop: Any) -> Monitor:
        """Makes the monitor of the fit, on its devices."""
        monitor = Monitor(validation, stop)
        return monitor.placed(self.prepare_validation, self.place.put_whole)

    def number(self, value: int) -> Array:
        """Puts a number onto the devices, so that another one compiles nothing."""
        return self.place.put_whole(jax.device_put(np.int32(value)))

    # One of them, and a chunk of steps.

    def template(self, trainer: AbstractTrainer) -> Any:
        """Returns a trainer with the names and the shapes of each."""
        return trainer

    def row(self, batch: Any) -> Any:
        """Returns what each trainer sees of a batch, or its shapes."""
        return batch

    @abc.abstractmethod
    def seen(self, source: Whole[Any] | Minibatches, index: Any) -> Any:
        """Returns what one trainer saw of a source: a batch, or all minibatches."""

    @abc.abstractmethod
    def run(self, task: Task, state: LoopState, in_place: bool) -> tuple[Chunk, Ended]:
        """Takes the steps of a chunk; `in_place` allows it to overwrite the state."""

    # What comes back to the host.

    @abc.abstractmethod
    def shown(self, trainer: AbstractTrainer, history: History) -> dict[str, str]:
        """Returns what a progress bar shows."""

    def handed_out(self, trainer: AbstractTrainer) -> Any:
        """Returns a trainer as the user is given it: many have a row of every array."""
        return trainer

    def taken_back(
        self, answer: AbstractTrainer, given: AbstractTrainer, held: AbstractTrainer
    ) -> Any:
        """Undoes `handed_out` for the trainer that a callback returned.

        It was `given` one. In the one that is `held`, what members share is there once.
        """
        return answer

    @abc.abstractmethod
    def result(
        self, trainer: AbstractTrainer, history: History, reasons: list[StopReason]
    ) -> Any:
        """Makes the result of a fit, with a reason for each trainer."""

    @abc.abstractmethod
    def checked(self, result: Any, source: Source) -> Any:
        """Checks that a fit which has converged is at a minimum."""

    @property
    def is_here(self) -> bool:
        """Whether this process has all arrays, and each parameter is on one device."""
        is_shared = self.place.mesh is not None and jax.process_count() > 1
        return not (is_shared or self.place.splits)

    @abc.abstractmethod
    def reasons(self, result: Any) -> tuple[StopReason, ...]:
        """Returns why the fit of each trainer ended."""

    @abc.abstractmethod
    def bad_end(self, result: Any) -> BadEnd | None:
        """Finds a trainer that ended at non-finite values and is worth a message.

        Of many trainers it is the first one, if there is an error to raise, or else the
        one that ended first.
        """

    @abc.abstractmethod
    def picked(self, result: Any, index: Any) -> AbstractTrainer:
        """Returns the trainer of a result with an index, as in `BadEnd`."""

    def home(self, trainer: AbstractTrainer) -> Any:
        """Brings a trainer back from the devices of the fit."""
        return with_progress(trainer, self.place.home(progress_of(trainer)))

    def on_host(self, array: Any) -> np.ndarray:
        """Copies an array to the host."""
        return np.asarray(self.place.whole(array))

    def count(self, trainer: AbstractTrainer) -> int:
        """Returns how many steps were taken."""
        return int(self.on_host(trainer.step_count).max())

    def begun(
        self,
        trainer: AbstractTrainer,
        scored: Source,
        scorer: Scorer,
        by_validation: bool = False,
        is_solved: bool = False,
    ) -> AbstractTrainer:
        """Returns the trainer without a best of other data, or of another scorer.

        A fit leaves a trainer that has stopped as it is, unless `is_solved`.
        """
        marks = self.marks(trainer, scored, by_validation)
        stopped = self.on_host(trainer.stopped)
        stopped = stopped & (not is_solved)
        if stopped.all():
            return trainer
        is_other = is_scored_otherwise(trainer, scorer)
        begun = begun_on(
            progress_of(trainer), marks, by_validation, stopped, is_other, self.on_host
        )
        return noted(with_progress(trainer, begun), scorer)

    def is_over(self, *flags: Any) -> bool:
        """Whether no trainer goes on: one of its flags is set."""
        return bool(functools.reduce(operator.or_, map(self.on_host, flags)).all())

    def recorded(self, step_count: Any, rows: Rows, scores: Rows | None) -> History:
        """Copies to the host what a chunk has recorded up to a step count."""
        counts = self.on_host(step_count)
        end = int(counts.max())
        scored, score, _ = (None,) * 3 if scores is None else scores.columns(end + 1)
        history = History(*rows.columns(end), score, scored)
        if self.shape:
            # A member that is over is computed on with the others, but not recorded.
            is_over = history.steps[:, None] >= counts
            for column in (history.loss, *history.records.values()):
                is_inexact = np.issubdtype(column.dtype, np.inexact)
                column[is_over] = np.nan if is_inexact else 0
            history.validation[history.validation_steps[:, None] > counts] = np.nan
        return history

    def cut_short(
        self, trainer: AbstractTrainer, history: History, reason: StopReason
    ) -> Any:
        """Makes the result of a fit that did not come to its end."""
        return self.result(trainer, history, [reason] * math.prod(self.shape))

"""What a fit says of its result: what was not finite and why, what nobody scored."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from .._boundary import is_debugged, warn
from .._data import Minibatches, Source, Stream, Whole, in_whole
from .._loop import Monitor
from .._minimum import has_minimum
from .._policy import Converged, StopReason
from .._step import (
    AbstractTrainer,
    Diagnosis,
    bad_data,
    diagnosed,
    last_bad_step,
    nan_columns,
    warn_of_no_data,
)
from .subject import AbstractSubject, BadEnd


class Course(NamedTuple):
    """What a fit took: its data, and its steps."""

    subject: AbstractSubject
    trainer: AbstractTrainer
    source: Source
    latest: Mapping[int, Whole[Any] | Minibatches]
    """The last batches of a stream, by their steps."""
    monitor: Monitor
    steps: np.ndarray
    """How many steps each trainer has taken."""
    taken: int
    """How many steps the fit has taken."""
    bad_steps: np.ndarray
    """How many of them were bad, of each column of a report."""
    has_accepted: np.ndarray
    """Whether each trainer has accepted any."""

    def source_of_bad(self, trainer: AbstractTrainer) -> Whole[Any] | Minibatches:
        """Returns where the batch of the last bad step comes from."""
        if isinstance(self.source, Stream):
            return self.latest.get(last_bad_step(trainer), Whole(None))
        return self.source

    def last_source(self) -> Whole[Any] | Minibatches:
        """Returns where the batch of the last step comes from."""
        if isinstance(self.source, Stream):
            return list(self.latest.values())[-1] if self.latest else Whole(None)
        return self.source


def remark(course: Course, result: Any) -> None:
    """Warns of what is wrong with a result, or raises an error if the policy does."""
    subject, history = course.subject, result.history
    validation = course.monitor.validation
    end = subject.bad_end(result) if course.taken else None
    if end is not None:
        diagnosis = _diagnosis(course, end)
        end.raise_if_asked(result, diagnosis.advised)
        if str(diagnosis):
            warn(f"{end.warning} {diagnosis}")
    if end is None or not end.is_all:
        _warn_of_bad_steps(course, result)
        if course.taken and validation is not None:
            _warn_of_scores(course, history.validation)
    if StopReason.CONVERGED in subject.reasons(result):
        _warn_of_no_check(course)
    with subject.context():
        ended = _ended(course, course.last_source(), result)
        warn_of_no_data(subject.entrance, history.loss, ended)
        if validation is not None:
            ended = _ended(course, Whole(validation.batch), result)
            warn_of_no_data("validation", history.validation, ended)


def _diagnosis(course: Course, end: BadEnd) -> Diagnosis:
    """Finds out why a fit ended at a non-finite value.

    It evaluates the model if no step was accepted, or for an error. After accepted
    steps the fit may have diverged by itself: then it checks only the data.
    """
    index, trainer = end.index, end.trainer
    batch = course.subject.seen(course.source_of_bad(trainer), index)
    with course.subject.context():
        is_asked = trainer.nan_policy.raises or is_debugged()
        if is_asked or not course.has_accepted[index]:
            return diagnosed(trainer, batch)
        data = bad_data(batch)
        step = last_bad_step(trainer)
        return Diagnosis((f"At step {step}:", *data) if data else ())


def _warn_of_bad_steps(course: Course, result: Any) -> None:
    """Warns of what was bad at every step, though steps were accepted."""
    is_bad = course.bad_steps >= np.maximum(course.steps, 1)[..., None]
    found = np.argwhere(is_bad & np.expand_dims(course.has_accepted, -1))
    if not found.size:
        return
    *member, _ = map(int, found[0])
    index = member[0] if member else ()
    trainer = course.subject.picked(result, index)
    names = np.asarray(nan_columns(trainer))[is_bad[index]]
    batch = course.subject.seen(course.source_of_bad(trainer), index)
    with course.subject.context():
        data = bad_data(batch)
    of_member = f" of member {index}" if member else ""
    said = (
        f"`{course.subject.entrance}`: not finite at any of the steps "
        f"({int(course.steps[index])}{of_member}), though the NaN policy took them: "
        f"{', '.join(names)}."
    )
    warn(" ".join([said, *data]))


def _warn_of_scores(course: Course, scores: np.ndarray) -> None:
    """Warns if no score of a validation could choose the best."""
    best_losses = course.subject.on_host(course.trainer.best_loss)
    if not scores.size and not np.isfinite(best_losses).any():
        warn(
            f"`validation`: it was not due within the {course.taken} steps of this "
            "fit, so that `best` is the model that the fit began with. Take more "
            "steps, or validate more often: `validation=(batch, every)`."
        )
    elif scores.size and not np.isfinite(scores).any():
        warn(
            "`validation`: no score was finite, so that `best` is no better than the "
            "model that the fit began with. Check the batch, and `evaluate`."
        )


def _warn_of_no_check(course: Course) -> None:
    """Warns of a fit that `Converged` has ended, and that nobody has checked."""
    source, entrance = course.source, course.subject.entrance
    # A criterion of the user may watch a validation.
    is_ours = lambda stop: isinstance(stop, Converged)
    stops = jax.tree.leaves(course.monitor.stop, is_leaf=is_ours)
    if not any(map(is_ours, stops)):
        return
    if not isinstance(in_whole(source), Whole):
        warn(
            f"`{entrance}`: `Converged` has ended it, but the loss of a batch is no "
            "measure of the next one, and whether this is a minimum was not checked. "
            "Watch a validation, `validation=(batch, every)` with "
            "`stop=vn.Patience(n)`; or fit all of the data at each step."
        )
    elif not course.subject.is_here and has_minimum(course.trainer):
        warn(
            f"`{entrance}`: `Converged` has ended it, and whether this is a minimum "
            "was not checked, since devices share parameters, or processes the mesh. "
            "On one device a report says how far it is: `report(batch).edm`."
        )


def _ended(
    course: Course, source: Whole[Any] | Minibatches, result: Any
) -> Callable[[Any], tuple[AbstractTrainer, Any]]:
    """Returns a function of an index: a trainer of a result, and its batch."""
    subject = course.subject
    return lambda i: (subject.picked(result, i), subject.seen(source, i))

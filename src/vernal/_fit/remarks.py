"""What a fit says of its result: what was not finite and why, what nobody scored."""

from typing import Any

import jax
import numpy as np

from .._boundary import is_debugged, warn
from .._data import Whole, in_whole
from .._minimum import has_minimum
from .._policy import AT_NON_FINITE, Converged, StopReason
from .._step import (
    Diagnosis,
    bad_data,
    diagnosed,
    last_bad_step,
    nan_columns,
    warn_of_no_data,
)
from .run import FitRun
from .subject import BadEnd

_LET_GO = (
    "At step {} a value was not finite. The batch of that step is no longer held, "
    "since the stream went on for the others: look for NaN in what it yields there, or "
    "`fit` this one alone."
)

# So many bad steps up to the end tell that the fit went no further.
_MANY_IN_A_ROW = 10

_HOW_TO_END = (
    "`nan_policy=vn.SkipStep() | vn.StopAfter(10)` ends such a fit early, and "
    "`vn.RaiseOnNan()` names the source."
)


def remark(run: FitRun, result: Any) -> list[int]:
    """Warns of what is wrong with a result, or raises an error if the policy does.

    Returns the members of many that have no data.
    """
    subject, history = run.subject, result.history
    validation = run.monitor.validation
    end = subject.bad_end(result) if run.taken else None
    if end is not None:
        diagnosis = _diagnosis(run, end)
        end.raise_if_asked(result, diagnosis.advised)
        if str(diagnosis):
            warn(f"{end.warning} {diagnosis}")
    if end is None or not end.is_all:
        _warn_of_bad_steps(run, result)
        if run.taken and validation is not None:
            _warn_of_scores(run, result, validation.batch)
    if StopReason.CONVERGED in subject.reasons(result):
        _warn_of_no_check(run)
    seen = {}
    if (last := run.source_at(None)) is not None:
        seen[subject.entrance] = history.loss, last
    if validation is not None:
        seen["validation"] = history.validation, Whole(validation.batch)
    lacking = []
    with subject.place.context():
        for where, (losses, source) in seen.items():
            ended = lambda index, source=source: (
                subject.picked(result, index),
                subject.seen(source, index),
            )
            lacking += warn_of_no_data(where, losses, ended)
    return lacking


def _diagnosis(run: FitRun, end: BadEnd) -> Diagnosis:
    """Finds out why a fit ended at a non-finite value.

    It evaluates the model if no step was accepted, or for an error. After accepted
    steps the fit may have diverged by itself: then it checks only the data.
    """
    index, trainer = end.index, end.trainer
    step = last_bad_step(trainer)
    if (source := run.source_at(step)) is None:
        # Others of many went on, and the stream with them.
        return Diagnosis((), (_LET_GO.format(step),))
    batch = run.subject.seen(source, index)
    with run.subject.place.context():
        is_asked = trainer.nan_policy.raises or is_debugged()
        if is_asked or not run.has_accepted[index]:
            return diagnosed(trainer, batch)
        data = bad_data(batch)
        return Diagnosis((f"At step {step}:", *data) if data else ())


def _warn_of_bad_steps(run: FitRun, result: Any) -> None:
    """Warns of what was bad at most steps, or at all of many last ones.

    Of the trainers that ended at a bad step another warning tells.
    """
    bad, steps = run.bad_steps, run.steps_of_each
    in_a_row = np.where(run.is_stuck, bad, 0)
    is_bad = (2 * bad > steps[..., None]) | (in_a_row >= _MANY_IN_A_ROW)
    is_bad &= np.expand_dims(run.has_accepted & _goes_on(run, result), -1)
    if not is_bad.any():
        return
    *member, _ = map(int, np.argwhere(is_bad)[0])
    index = member[0] if member else ()
    trainer = run.subject.picked(result, index)
    names = np.asarray(nan_columns(trainer))[is_bad[index]]
    data, source = (), run.source_at(last_bad_step(trainer))
    if source is not None:
        with run.subject.place.context():
            data = bad_data(run.subject.seen(source, index))
    of_member = f" of member {index}" if member else ""
    count, of_all = int(bad[index].max()), int(steps[index])
    lasts = ", the last ones" if in_a_row[index].max() == count < of_all else ""
    said = (
        f"`{run.subject.entrance}`: not finite at {count} of the {of_all} "
        f"steps{of_member}{lasts}, though the NaN policy went on: {', '.join(names)}."
    )
    warn(" ".join([said, *(data or (_HOW_TO_END,))]))


def _goes_on(run: FitRun, result: Any) -> np.ndarray:
    """Whether the fit of each trainer ended elsewhere than at a bad step."""
    reasons = run.subject.reasons(result)
    return np.reshape([r not in AT_NON_FINITE for r in reasons], run.subject.shape)


def _warn_of_scores(run: FitRun, result: Any, batch: Any) -> None:
    """Warns if no score of a validation could choose the best."""
    subject, scores = run.subject, result.history.validation
    if not scores.size:
        if not np.isfinite(subject.on_host(run.trainer.best_loss)).any():
            warn(
                f"`validation`: it was not due within the {run.taken} steps of this "
                "fit, so that `best` is the model that the fit began with. Take more "
                "steps, or validate more often: `validation=(batch, every)`."
            )
        return
    bad = np.argwhere(~np.isfinite(scores).any(axis=0) & _goes_on(run, result))
    if not len(bad):
        return
    index = int(bad[0][0]) if subject.shape else ()
    of_member = f" of member {index}" if subject.shape else ""
    with subject.place.context():
        batch = subject.seen(Whole(batch), index)
        data = bad_data(batch, "validation") or ("Check the batch, and `evaluate`.",)
    said = (
        f"`validation`: no score{of_member} was finite, so that `best` is no better "
        "than the model that the fit began with."
    )
    warn(" ".join([said, *data]))


def _warn_of_no_check(run: FitRun) -> None:
    """Warns of a fit that `Converged` has ended, and that nobody has checked."""
    source, entrance = run.source, run.subject.entrance
    # A criterion of the user may watch a validation.
    is_ours = lambda stop: isinstance(stop, Converged)
    stops = jax.tree.leaves(run.monitor.stop, is_leaf=is_ours)
    if not any(map(is_ours, stops)):
        return
    if not isinstance(in_whole(source), Whole):
        warn(
            f"`{entrance}`: `Converged` has ended it, but the loss of a batch is no "
            "measure of the next one, and whether this is a minimum was not checked. "
            "Watch a validation, `validation=(batch, every)` with "
            "`stop=vn.Patience(n)`; or fit all of the data at each step."
        )
    elif not run.subject.is_here and has_minimum(run.trainer):
        warn(
            f"`{entrance}`: `Converged` has ended it, and whether this is a minimum "
            "was not checked, since devices share parameters, or processes the mesh. "
            "On one device a report says how far it is: `report(batch).edm`."
        )

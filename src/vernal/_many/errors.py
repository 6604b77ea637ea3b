"""The standard errors of many members, in one program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import warn
from .._curvature import Mode, checked_mode
from .._inference import (
    NO_ACCIDENT,
    NO_SANDWICH,
    ErrorKind,
    ErrorOptions,
    KnownErrors,
    around,
    checked_kind,
    errors_or_nan,
    few_text,
    how_far,
)
from .._minimum import Distance, share_p_value, slope_note
from .._program import program
from .._step import AbstractTrainer, in_free_coordinates, in_real_coordinates
from .mapped_chunk import Flags
from .members import Members
from .stack import stacked

# How many members a warning names.
_MOST_NAMED = 8


def errors_of_each(
    trainers: AbstractTrainer,
    batch: Any,
    flags: Flags,
    group: int,
    options: ErrorOptions,
) -> KnownErrors:
    """Computes the standard errors of each member, NaN for a broken one.

    `flags` says which leaves of the batch have a row for each member; `group` members
    are computed at a time.
    """
    kind = checked_kind(trainers, options.kind)
    trainers, own, size = stacked(trainers)
    members = Members(trainers, (*own, *flags), group or size)
    try:
        found = run_errors(members, batch, checked_mode(options.jac), kind)
    except RuntimeError:
        apart = _errors_apart(members, batch, checked_mode(options.jac), kind)
        if apart is None:
            raise
        found = apart
    if np.all(found.lacks_scatter):
        raise ValueError(NO_SANDWICH)
    return found


@program
def run_errors(
    members: Members, batch: Any, jac: Mode | None, kind: ErrorKind | None
) -> KnownErrors:
    of_one = lambda trainer, batch: errors_or_nan(trainer, batch, jac, kind)
    return members.map(of_one, batch)


def _errors_apart(
    members: Members, batch: Any, jac: Mode | None, kind: ErrorKind | None
) -> KnownErrors | None:
    """Computes those of each by itself: NaN where the model raises an error."""
    found = list[KnownErrors | None]()
    for index in range(members.trainers.step_count.shape[0]):
        trainers, rows = members.one(batch, np.array([index]))
        alone = members._replace(trainers=trainers, group=1)
        try:
            found.append(run_errors(alone, rows, jac, kind))
        except RuntimeError:
            found.append(None)
    if not any(found):
        return None
    is_real = lambda x: np.issubdtype(x.dtype, np.inexact)
    empty = lambda x: np.full_like(x, np.nan if is_real(x) else 0)
    none = jax.tree.map(empty, next(filter(None, found)))
    joined = lambda *rows: jnp.concatenate(rows)
    return jax.tree.map(joined, *(one or none for one in found))


def warn_if_any_is_far(
    found: KnownErrors,
    member_of: Callable[[int], tuple[AbstractTrainer, Any]],
    options: ErrorOptions,
) -> None:
    """Warns of errors that are asked for far from the minimum of a member.

    `member_of` returns the trainer of a member, and its batch.
    """
    scale_errors, jac, kind = options
    p_value = found.fall.truth_p_value
    if scale_errors and (scatter := found.scatter) is not None:
        p_value = share_p_value(*found.fall, scatter.squares, scatter.data.size)
    suspects = [int(index) for index in np.flatnonzero(p_value <= NO_ACCIDENT)]
    for index in suspects:
        trainer, batch = member_of(index)
        try:
            here = around(trainer, batch, "A standard error", jac, kind)
        except ValueError:  # on the verge of having no errors, by rounding
            continue
        if not (far := how_far(trainer, here, scale_errors)):
            continue
        others = _of_others([other for other in suspects if other > index])
        warn(
            f"The errors of member {index} are asked for {far} {others}Fit on first: "
            "`vn.fit_many(result.trainers, data, steps)`."
        )
        return


def warn_if_any_is_of_few(
    found: KnownErrors, member_of: Callable[[int], tuple[AbstractTrainer, Any]]
) -> None:
    """Warns of members with an error from the scatter of very few data."""
    if suspects := np.flatnonzero(np.any(found.is_of_few, axis=-1)).tolist():
        first, *others = suspects
        trainer = in_free_coordinates(member_of(first)[0])
        text = few_text(found.is_of_few[first], trainer.params)
        warn(f"The errors of member {first}: {text}. {_of_others(others)}".rstrip())


def warn_if_any_is_lost(
    distances: Distance | None, explain: Callable[[int], str]
) -> None:
    """Warns of the members whose fit ended where there is no minimum.

    `distances` are those at the ends, `None` where they are not known; `explain` says
    how a member ended.
    """
    if distances is None:
        return
    at = lambda index: jax.tree.map(lambda x: x[index], distances)
    suspects = np.flatnonzero(distances.is_endless | distances.is_saddle).tolist()
    lost = [index for index in suspects if at(index).is_lost]
    if lost:
        first, *others = lost
        told = f"The errors of member {first}: {explain(first)} {_of_others(others)}"
        warn(told.rstrip())


def warn_if_any_lacks_slopes(
    distances: Distance | None,
    found: KnownErrors,
    member_of: Callable[[int], tuple[AbstractTrainer, Any]],
    kind: ErrorKind | None,
) -> None:
    """Warns of errors from slopes, if there are hardly any at the end of a member."""
    scatter = found.scatter
    if distances is None or scatter is None or kind not in (None, "expected"):
        return
    if kind is None and np.any(scatter.data.is_robust):
        return
    notes = dict[int, str]()
    for index in np.flatnonzero(distances.is_leap).tolist():
        at = jax.tree.map(lambda x, i=index: x[i], distances)
        params = in_real_coordinates(member_of(index)[0]).params
        if note := slope_note(at, params):
            notes[index] = note
    if notes:
        first, *others = notes
        told = f"The errors of member {first}: {notes[first]}. {_of_others(others)}"
        warn(told.rstrip())


def _of_others(members: list[int]) -> str:
    shown = ", ".join(map(str, members[:_MOST_NAMED]))
    shown += ", …" * (len(members) > _MOST_NAMED)
    return f"The same may hold of {shown}. " * bool(members)

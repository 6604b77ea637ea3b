"""Whether many trainers are at their minima, at the end of a fit."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._boundary import outside_mesh
from .._devices import AbstractPlacement
from .._minimum import (
    Distance,
    Local,
    Site,
    distance_of,
    endless,
    has_jacobian,
    has_minimum,
    is_idle,
    lower_point,
    may_be_endless,
    measure,
    second_look,
    settled,
    unknown,
    what_falls,
)
from .._policy import StopReason
from .._program import program
from .._step import (
    AbstractTrainer,
    config_of,
    in_real_coordinates,
    progress_of,
    stripped,
    with_progress,
)
from .._storage import History
from .mapped_chunk import Flags, apart
from .members import Members
from .result import ManyResult, measured
from .stack import on_host, stacked


@outside_mesh
def checked_ends(
    result: ManyResult[Any],
    batch: Any,
    flags: Flags,
    group: int,
    place: AbstractPlacement,
) -> ManyResult[Any]:
    """Checks of each member that `Converged` ended that it has arrived at a minimum.

    `flags` says which leaves of the batch have a row for each member. The batch lies
    where `place` puts it.
    """
    reasons = list(result.stop_reasons)
    over = [i for i, reason in enumerate(reasons) if reason is StopReason.CONVERGED]
    if not over or not has_minimum(result.trainers):
        return result
    trainers, own, _ = stacked(result.trainers)
    group = _group(trainers, batch, flags, group, place.size)
    falls = jnp.asarray(_falls(result.history, np.asarray(trainers.step_count)))
    every = (True,) * len(jax.tree.leaves(progress_of(trainers)))
    progress = place.put_rows(progress_of(trainers), every)
    config = place.put_rows(config_of(trainers), own)
    members = Members(with_progress(config, progress), (*own, *flags), group, place)
    falls = place.put_rows(falls, (True,))
    kind = what_falls(trainers)
    local = _measure(members, batch, kind, falls)
    distances = distances_of(members, batch, kind, local, over)
    found = dict(zip(over, distances, strict=True))
    for index, distance in found.items():
        reasons[index] = settled(reasons[index], distance)
    none = unknown(found[over[0]].direction)
    distances = [found.get(index, none) for index in range(len(reasons))]
    result = dataclasses.replace(result, stop_reasons=tuple(reasons))
    return measured(result, distances)


def distances_of(
    members: Members, batch: Any, kind: str, local: Any, indices: Iterable[int]
) -> list[Distance]:
    """Finds the distances of the members with these indices, on the host.

    `local` is what `measure` found of all of them, for this `kind`.
    """
    local = jax.device_get(local)
    at = {i: jax.tree.map(lambda x, i=i: x[i], local) for i in indices}
    found = {i: distance_of(own) for i, own in at.items()}
    seems_odd = lambda d: (
        d.is_leap or d.is_steep or (d.is_saddle and np.isfinite(d.edm))
    )
    seems_lower = lambda i, d: d.is_minimum and is_idle(at[i])
    is_odd = lambda i, d: (
        seems_odd(d) or seems_lower(i, d) or may_be_endless(kind, at[i], d)
    )
    odd = [i for i, distance in found.items() if is_odd(i, distance)]
    if odd:
        trainers, batch = on_host(members.place.home((members.trainers, batch)))
        members = members._replace(trainers=trainers)
    for index in odd:
        trainer, data = members.one(batch, index)
        site = Site(stripped(in_real_coordinates(trainer)), data, kind)
        here = site, at[index]
        distance = second_look(*here, found[index])
        if distance.is_minimum and (lower := lower_point(*here, distance)):
            distance = lower.distance
        found[index] = endless(*here, distance)
    return list(found.values())


@program
def _measure(
    members: Members, batch: Any, kind: str, falls: Float[Array, " members"]
) -> Local:
    def of_one(trainer: AbstractTrainer, batch: Any, fall: Array) -> Local:
        trainer = in_real_coordinates(trainer)
        return measure(stripped(trainer), trainer.projector, batch, kind, fall)

    return members.map(of_one, batch, falls)


def _group(trainers: Any, batch: Any, flags: Flags, group: int, parts: int) -> int:
    """Returns how many members to measure at a time, a multiple of `parts`.

    A fit needs no matrices; here those of all members are in memory together.
    """
    size = len(trainers.step_count)
    count = lambda tree: sum(map(np.size, jax.tree.leaves(tree)))
    rows, shared = apart(batch, flags)
    data = count(rows) // size + count(shared)
    params = count(trainers.params) // size
    fits = lambda n: n == parts or has_jacobian(n * data, params)
    return next(n for n in range(group, 0, -parts) if size % n == 0 and fits(n))


def _falls(history: History, counts: np.ndarray) -> np.ndarray:
    """Returns how far the recorded loss of each member fell.

    It has no loss after its end, at a step of its own.
    """
    losses = history.loss
    rows = np.searchsorted(history.steps, counts)
    if not len(losses):
        return np.zeros(len(counts), losses.dtype)
    # A step that was skipped may have none either.
    known = np.isfinite(losses) & (np.arange(len(losses))[:, None] < rows)
    at = lambda row: np.take_along_axis(losses, row[None], axis=0)[0]
    fall = at(known.argmax(axis=0)) - at(len(losses) - 1 - known[::-1].argmax(axis=0))
    return np.where(known.any(axis=0), fall, 0).astype(losses.dtype)

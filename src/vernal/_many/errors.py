"""The standard errors of many members, in one program."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array

from .._boundary import PyTree
from .._curvature import Mode, checked_mode
from .._devices import ANYWHERE
from .._inference import ErrorKind, checked_kind, errors_or_nan
from .._program import program
from .._step import AbstractTrainer, Progress, config_of, progress_of, with_progress
from .mapped_chunk import Flags, apart, in_groups
from .stack import stacked


class _Members(NamedTuple):
    """The stacked trainers, and which leaves of them and of the batch have rows."""

    trainers: AbstractTrainer
    flags: Flags
    group: int


def errors_of_each(
    trainers: AbstractTrainer,
    batch: Any,
    flags: Flags,
    group: int,
    jac: Mode | None,
    kind: ErrorKind | None,
) -> tuple[PyTree, dict[str, Array]]:
    """Computes the standard errors of each member, NaN for a broken one.

    Returns those of the parameters, and those of what is tied, by path.

    `flags` says which leaves of the batch have a row for each member; `group` members
    are computed at a time.
    """
    kind = checked_kind(trainers, kind)
    trainers, own, size = stacked(trainers)
    members = _Members(trainers, (*own, *flags), group or size)
    return _errors(members, batch, checked_mode(jac), kind)


@program
def _errors(
    members: _Members, batch: Any, jac: Mode | None, kind: ErrorKind | None
) -> tuple[PyTree, dict[str, Array]]:
    trainers, flags, group = members
    config, progress = config_of(trainers), progress_of(trainers)
    rows, shared = apart((config, batch), flags)

    def of_one(own: tuple[PyTree, Progress]) -> Any:
        rows, progress = own
        config, batch = eqx.combine(rows, shared)
        return errors_or_nan(with_progress(config, progress), batch, jac, kind)

    return in_groups(jax.vmap(of_one), (rows, progress), group, ANYWHERE)

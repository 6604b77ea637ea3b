"""Stacked trainers, with a function of each by itself, in one program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax

from .._boundary import PyTree
from .._devices import ANYWHERE, AbstractPlacement
from .._step import AbstractTrainer, config_of, progress_of, with_progress
from .mapped_chunk import Flags, apart, at_once, in_groups, member


class Members(NamedTuple):
    """The stacked trainers, and which leaves of them and of the batch have rows."""

    trainers: AbstractTrainer
    flags: Flags
    group: int
    place: AbstractPlacement = ANYWHERE

    def map(self, fn: Callable[..., Any], batch: Any, *rows: PyTree) -> Any:
        """Calls `fn(trainer, batch, *rows)` for each, a group at a time."""
        config, progress = config_of(self.trainers), progress_of(self.trainers)
        one = self.one(batch, 0)
        config, shared = apart((config, batch), self.flags)

        def of_one(own: tuple[PyTree, ...]) -> Any:
            config, progress, *rows = own
            config, batch = eqx.combine(config, shared)
            return fn(with_progress(config, progress), batch, *rows)

        own = config, progress, *rows
        group = at_once(*one, self.group, self.place)
        return in_groups(jax.vmap(of_one), own, group, self.place)

    def one(self, batch: Any, index: Any) -> tuple[AbstractTrainer, Any]:
        """Returns one of the trainers, and its batch; stacked ones of many indices."""
        progress = jax.tree.map(lambda x: x[index], progress_of(self.trainers))
        own = config_of(self.trainers), batch
        config, batch = member(own, self.flags, index)
        return with_progress(config, progress), batch

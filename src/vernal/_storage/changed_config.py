"""What a callback has changed of the configuration with which a fit began."""

from collections.abc import Mapping
from typing import Any

import jax

from .._step import (
    AbstractTrainer,
    TrainerT,
    changed,
    config_of,
    progress_of,
    with_progress,
)
from .._tree import NamedArray, by_path, from_arrays, is_weak, leaf_sums, to_arrays


class Beginning:
    """The configuration with which a program begins a fit."""

    def __init__(self, trainer: AbstractTrainer):
        self._config = _config(trainer)
        self.arrays: dict[str, NamedArray] = to_arrays(self._config)

    def changes(
        self, trainer: AbstractTrainer
    ) -> tuple[dict[str, NamedArray], dict[str, list[Any]], list[str]]:
        """Finds what is another in the trainer that the fit has now.

        Returns the leaves, by path; the kind and the checksum that each of them had,
        for JSON; and the paths of those that cannot be saved, such as functions. All
        processes that have a part of an array must call this.
        """
        config, now, before, lost = _config(trainer), {}, {}, []
        for path, leaf in to_arrays(config).items():
            old = self.arrays.get(path)
            if old is None or leaf.array is old.array:
                continue
            if _mark(leaf) != (mark := _mark(old)):
                now[path], before[path] = leaf, mark
        pairs = zip(by_path(config).items(), jax.tree.leaves(self._config), strict=True)
        for (path, leaf), old in pairs:
            is_same = leaf is old or (
                isinstance(leaf, str) and isinstance(old, str) and leaf == old
            )
            if path not in self.arrays and not is_same:
                lost.append(path)
        return now, before, lost

    def applied(
        self,
        trainer: TrainerT,
        now: Mapping[str, NamedArray],
        before: Mapping[str, list[Any]],
        source: str,
    ) -> TrainerT:
        """Puts changes into a trainer of this configuration.

        What the program begins with otherwise than the fit that was changed stays.
        """
        known = {p: leaf for p, leaf in self.arrays.items() if p in now}
        same = {p for p, leaf in known.items() if _mark(leaf) == before.get(p)}
        if not same:
            return trainer
        config = _config(trainer)
        kept = to_arrays(config) | {path: now[path] for path in same}
        new = jax.tree.map(_as_weak, from_arrays(kept, config, source), config)
        return with_progress(new, progress_of(trainer), projector=trainer.projector)


def _config(trainer: TrainerT) -> TrainerT:
    # The projector is a part of what is saved in any case.
    return changed(config_of(trainer), projector=None)


def _mark(leaf: NamedArray) -> list[Any]:
    return [str(leaf.kind), *(total for *_, total in leaf_sums(leaf.array))]


def _as_weak(new: Any, old: Any) -> Any:
    """Gives a rate the weak type that a file does not know of."""
    is_lost = isinstance(old, jax.Array) and is_weak(old) and not is_weak(new)
    return old.at[...].set(new) if is_lost else new

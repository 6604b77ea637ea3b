"""A fit of many trainers at once."""

import dataclasses
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import first_names
from .._data import Minibatches, Source, Whole, as_batch, as_source
from .._devices import AbstractPlacement
from .._fit import AbstractSubject, BadEnd
from .._loop import Chunk, Ended, LoopState, Monitor, MonitorState, Task
from .._policy import AT_NON_FINITE, StopReason
from .._step import (
    AbstractTrainer,
    compared,
    config_of,
    in_source,
    marks_of_rows,
    noted_as,
    progress_of,
    scored_parts,
    with_progress,
)
from .._storage import History
from .._tree import by_path
from .arrival import checked_ends
from .data_axis import axes_of, members_first
from .mapped_chunk import Flags, Spread, apart, member, run_many, run_many_in_place
from .result import ManyResult
from .stack import first_rows, is_same, stack


@final
@dataclasses.dataclass(frozen=True)
class ManyTrainers(AbstractSubject):
    """A fit of many trainers at once, stacked to one, `group` at a time.

    `config` flags the leaves of their configuration that have a row for each.
    """

    entrance = "fit_many"
    place: AbstractPlacement
    size: int
    group: int
    config: Flags
    data_axis: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    def source(self, data: Any) -> Source:
        source = as_source(data)
        if isinstance(source, Whole):
            return Whole(self.prepare(source.batch))
        if isinstance(source, Minibatches) and self.data_axis is not None:
            raise TypeError(
                "`data` is Minibatches, which all trainers share; `data_axis` is for "
                "a batch, or for the batches of a Stream, with a part for each."
            )
        if isinstance(source, Minibatches):
            return self.place.put_whole(source)
        return source

    def marks(
        self, trainer: AbstractTrainer, source: Source, by_validation: bool
    ) -> np.ndarray:
        rows, shared = None, in_source(source)
        own, same = (
            compared(shared, scored_parts(half, by_validation))
            for half in apart(config_of(trainer), self.config)
        )
        if isinstance(source, Whole):
            rows, shared = apart(shared, self.flags(shared))
        return np.asarray(marks_of_rows((rows, own), (shared, same), self.size))

    def prepare(self, batch: Any) -> Any:
        return self._with_rows(batch, "data")

    def prepare_validation(self, batch: Any) -> Any:
        return self._with_rows(batch, "validation")

    def _with_rows(self, batch: Any, argument: str) -> Any:
        batch = as_batch(batch, argument)
        batch, flags = members_first(batch, self.data_axis, self.size, argument)
        return self.place.put_rows(batch, flags)

    def placed(self, trainer: AbstractTrainer) -> Any:
        config = self.place.put_rows(config_of(trainer), self.config)
        return with_progress(config, self.placed_state(progress_of(trainer)))

    def placed_state(self, state: Any) -> Any:
        return self.place.put_rows(state, (True,) * len(jax.tree.leaves(state)))

    def flags(self, batch: Any) -> Flags:
        axes = axes_of(batch, self.data_axis, "data")
        return tuple(axis is not None for axis in axes)

    def first_monitor_state(
        self, monitor: Monitor, trainer: AbstractTrainer
    ) -> MonitorState | None:
        return eqx.filter_vmap(monitor.init, axis_size=self.size)(progress_of(trainer))

    def template(self, trainer: AbstractTrainer) -> Any:
        trainer = jax.tree.map(self.place.whole, trainer)
        rows, shared = apart(config_of(trainer), self.config)
        rows, progress = first_rows((rows, progress_of(trainer)))
        return with_progress(eqx.combine(rows, shared), progress)

    def row(self, batch: Any) -> Any:
        rows, shared = apart(batch, self.flags(batch))
        first = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return eqx.combine(jax.tree.map(first, rows), shared)

    def run(self, task: Task, state: LoopState, in_place: bool) -> tuple[Chunk, Ended]:
        spread = Spread(
            group=self.group,
            config=self.config,
            monitor=self._monitor_flags(task.monitor),
            source=self._source_flags(task.source),
            place=self.place,
        )
        run = run_many_in_place if in_place else run_many
        with self.place.context():
            return run(task, state, spread)

    def _monitor_flags(self, monitor: Monitor) -> Flags:
        every = len(jax.tree.leaves(monitor))
        own = () if monitor.validation is None else self.flags(monitor.validation.batch)
        return (*own, *(False,) * (every - len(own)))

    def _source_flags(self, source: Whole[Any] | Minibatches) -> Flags:
        if isinstance(source, Whole):
            return self.flags(source.batch)
        return (False,) * len(jax.tree.leaves(source))

    def shown(self, trainer: AbstractTrainer, history: History) -> dict[str, str]:
        best = float(self.on_host(trainer.best_loss).min())
        over = int(self.on_host(trainer.stopped).sum())
        shown = {"trainers": str(self.size), "best": f"{best:.6g}"}
        return shown | ({"stopped": str(over)} if over else {})

    def checked(self, result: Any, source: Source) -> Any:
        if not (self.is_here and isinstance(source, Whole)):
            return result
        batch, flags = source.batch, self.flags(source.batch)
        with self.place.context():
            return checked_ends(result, batch, flags, self.group, self.place)

    def handed_out(self, trainer: AbstractTrainer) -> Any:
        rows, shared = apart(config_of(trainer), self.config)
        is_array = lambda leaf: isinstance(leaf, jax.Array)
        arrays, others = eqx.partition(shared, is_array)
        columns = [(leaf,) * self.size for leaf in jax.tree.leaves(arrays)]
        repeated = jax.tree.structure(arrays).unflatten(stack(columns))
        config = eqx.combine(rows, repeated, others)
        return with_progress(config, progress_of(trainer))

    def taken_back(
        self, answer: AbstractTrainer, given: AbstractTrainer, held: AbstractTrainer
    ) -> Any:
        is_foreign = lambda leaf: isinstance(leaf, np.ndarray | np.generic)
        if any(map(is_foreign, jax.tree.leaves(answer))):
            convert = lambda leaf: jnp.asarray(leaf) if is_foreign(leaf) else leaf
            answer = jax.tree.map(convert, answer)
        config = config_of(answer)
        before, shared = (jax.tree.leaves(config_of(of)) for of in (given, held))
        columns = by_path(config).items(), before, shared, self.config
        leaves = []
        for (path, leaf), old, one, has_rows in zip(*columns, strict=True):
            if has_rows or not eqx.is_array(leaf):
                leaves.append(leaf)
            elif leaf is old:
                leaves.append(one)
            elif is_same(leaf):
                leaves.append(first_rows(leaf))
            else:
                raise ValueError(
                    f"`callback` returned a trainer whose array {path!r} is another "
                    "for each member, and all members share it. Give each trainer an "
                    "array of its own when the fit begins."
                )
        config = jax.tree.structure(config).unflatten(leaves)
        return with_progress(config, progress_of(answer))

    def result(
        self, trainer: AbstractTrainer, history: History, reasons: list[StopReason]
    ) -> ManyResult[Any]:
        stacked = noted_as(self.handed_out(self.home(trainer)), trainer)
        edms = np.full(self.size, np.nan)
        own = self.data_axis, self.group
        return ManyResult(stacked, history, tuple(reasons), edms, *own)

    def reasons(self, result: Any) -> tuple[StopReason, ...]:
        return result.stop_reasons

    def bad_end(self, result: ManyResult[Any]) -> BadEnd | None:
        reasons, raises = result.stop_reasons, result.trainers.nan_policy.raises
        bad = [i for i, reason in enumerate(reasons) if reason in AT_NON_FINITE]
        if not bad:
            return None
        # An error names the first that it is about; a warning the one that ended first,
        # as with bad data.
        is_named = lambda index: reasons[index] is StopReason.NON_FINITE
        steps = self.on_host(result.trainers.step_count)
        least = min(bad, key=steps.__getitem__)
        index = next(filter(is_named, bad), bad[0]) if raises else least
        is_all, names = len(bad) == self.size, first_names([*map(str, bad)], str)
        count = f"all {self.size}" if is_all else f"{len(bad)} of {self.size}"
        named = "" if is_all else f" ({names})"
        warning = (
            f"`fit_many`: {count} trainers{named} ended at values that are not "
            f"finite. Of member {index}:"
        )
        which = f"That is member {index} of {self.size}. "
        trainer = self.picked(result, index)
        return BadEnd(index, reasons[index], trainer, warning, which, is_all)

    def picked(self, result: ManyResult[Any], index: Any) -> AbstractTrainer:
        return result.trainer(index)

    def seen(self, source: Whole[Any] | Minibatches, index: Any) -> Any:
        source = self.place.home(source)
        if isinstance(source, Whole):
            return member(source, self._source_flags(source), index).batch
        return source

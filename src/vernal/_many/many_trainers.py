"""What a fit asks of many trainers at once, and what comes of it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import PyTree, spelled, warn, whole_number
from .._curvature import Mode, checked_mode
from .._data import Minibatches, Source, Whole, as_batch, as_source
from .._devices import AbstractPlacement, same_inputs
from .._fit import BadEnd, One
from .._loop import Chunk, Ended, LoopState, Monitor, MonitorState, Rows, Task
from .._policy import AT_NON_FINITE, SKIP_ADVICE, StopReason
from .._solve import Problem, checked_solver
from .._step import (
    AbstractTrainer,
    config_of,
    diagnosed,
    non_finite_error,
    progress_of,
    with_progress,
)
from .._storage import History
from .mapped_chunk import Flags, Spread, apart, member, run_many, run_many_in_place
from .result import ManyResult
from .solve_many import Members, solve_many
from .stack import first_row, stack


class Many(One):
    """A fit of many trainers at once, which are one that is stacked."""

    entrance = "fit_many"

    def __init__(
        self,
        size: int,
        group: int,
        config: Flags,
        data_axis: Any,
        place: AbstractPlacement,
    ):
        super().__init__(place)
        self.size, self.group, self.config = size, group, config
        self.data_axis, self.shape = data_axis, (size,)

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

    def prepare(self, batch: Any, argument: str = "data") -> Any:
        batch = as_batch(batch, argument)
        axes, (flat, structure) = self._axes(batch, argument), _flatten(batch)
        leaves = []
        for (keys, leaf), axis in zip(flat, axes, strict=True):
            if axis is None:
                leaves.append(leaf)
                continue
            length = leaf.shape[axis] if -leaf.ndim <= axis < leaf.ndim else None
            if length != self.size:
                raise ValueError(
                    f"`data_axis`: {spelled(argument, keys)} has the shape "
                    f"{leaf.shape}, whose axis {axis} must be as long as there are "
                    f"trainers, {self.size}."
                )
            leaves.append(jnp.moveaxis(leaf, axis, 0))
        batch = structure.unflatten(leaves)
        return self.place.put_rows(batch, [axis is not None for axis in axes])

    def placed(self, trainer: AbstractTrainer) -> Any:
        config = self.place.put_rows(config_of(trainer), self.config)
        return with_progress(config, self.placed_state(progress_of(trainer)))

    def placed_state(self, state: Any) -> Any:
        return self.place.put_rows(state, (True,) * len(jax.tree.leaves(state)))

    def _whole(self, array: Any) -> Any:
        return self.place.whole(array)

    def on_host(self, array: Any) -> np.ndarray:
        return np.asarray(self._whole(array))

    def _axes(self, batch: Any, argument: str) -> list[int | None]:
        """Finds the axis of each leaf of a batch, `None` for what is shared."""
        is_none = lambda node: node is None
        for axis in jax.tree.leaves(self.data_axis):
            whole_number(axis, "data_axis")
        spread = lambda axis, part: jax.tree.map(lambda _: axis, part)
        try:
            axes = jax.tree.map(spread, self.data_axis, batch, is_leaf=is_none)
        except ValueError as error:
            like = jax.tree.map(lambda _: 0, batch)
            raise ValueError(
                f"`data_axis` is {self.data_axis!r}, but must be one axis, or a tree "
                f"of axes like `{argument}`, such as {like!r}, with `None` for what "
                "all share."
            ) from error
        found = jax.tree.leaves(axes, is_leaf=is_none)
        leaves = jax.tree.leaves(batch, is_leaf=is_none)
        return [
            axis if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
            for axis, leaf in zip(found, leaves, strict=True)
            if leaf is not None
        ]

    def _flags(self, batch: Any) -> Flags:
        return tuple(axis is not None for axis in self._axes(batch, "data"))

    def _scored(self, batch: Any) -> Any:
        return self.prepare(batch, "validation")

    def watched(
        self, monitor: Monitor, trainer: AbstractTrainer
    ) -> MonitorState | None:
        return eqx.filter_vmap(monitor.init, axis_size=self.size)(progress_of(trainer))

    def template(self, trainer: AbstractTrainer) -> Any:
        trainer = jax.tree.map(self._whole, trainer)
        rows, shared = apart(config_of(trainer), self.config)
        progress = jax.tree.map(first_row, progress_of(trainer))
        first = eqx.combine(jax.tree.map(first_row, rows), shared)
        return with_progress(first, progress)

    def row(self, batch: Any) -> Any:
        leaves, structure = jax.tree.flatten(batch)
        rows = [
            jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if flag else leaf
            for leaf, flag in zip(leaves, self._flags(batch), strict=True)
        ]
        return structure.unflatten(rows)

    def count(self, trainer: AbstractTrainer) -> int:
        return int(self.on_host(trainer.step_count).max())

    def is_over(self, *flags: Any) -> bool:
        return bool(np.logical_or.reduce([*map(self.on_host, flags)]).all())

    def run(self, task: Task, state: LoopState, in_place: bool) -> tuple[Chunk, Ended]:
        spread = Spread(
            group=self.group,
            config=self.config,
            monitor=self._monitor_flags(task.monitor),
            source=self._source_flags(task.source),
            place=self.place,
        )
        run = run_many_in_place if in_place else run_many
        with self.context():
            return run(task, state, spread)

    def _monitor_flags(self, monitor: Monitor) -> Flags:
        every = len(jax.tree.leaves(monitor))
        own = (
            () if monitor.validation is None else self._flags(monitor.validation.batch)
        )
        return (*own, *(False,) * (every - len(own)))

    def _source_flags(self, source: Whole[Any] | Minibatches) -> Flags:
        if isinstance(source, Whole):
            return self._flags(source.batch)
        return (False,) * len(jax.tree.leaves(source))

    def recorded(self, step_count: Any, rows: Rows, scores: Rows | None) -> History:
        counts = self.on_host(step_count)
        history = super().recorded(counts.max(), rows, scores)
        # One that is over is computed on with the others: of that there is no record.
        is_over = history.steps[:, None] >= counts
        for column in (history.loss, *history.records.values()):
            column[is_over] = np.nan if np.issubdtype(column.dtype, np.inexact) else 0
        history.validation[history.validation_steps[:, None] > counts] = np.nan
        return history

    def shown(self, trainer: AbstractTrainer, history: History) -> dict[str, str]:
        best = float(self.on_host(trainer.best_loss).min())
        over = int(self.on_host(trainer.stopped).sum())
        shown = {"trainers": str(self.size), "best": f"{best:.6g}"}
        return shown | ({"stopped": str(over)} if over else {})

    def ended(
        self,
        trainer: AbstractTrainer,
        history: History,
        monitor: Monitor,
        watched: MonitorState | None,
        reason: StopReason,
        is_all_skipped: np.ndarray,
    ) -> ManyResult[Any]:
        progress = progress_of(trainer)
        lasts = self.on_host(progress.nan_counts)[:, -1]
        is_bad = lasts.max(axis=1) == self.on_host(progress.step_count) - 1
        stopped = self.on_host(progress.stopped)
        watched = jax.device_get(jax.tree.map(self._whole, watched))
        reasons = []
        for index in range(self.size):
            own = jax.tree.map(lambda x, i=index: x[i], watched)
            if stopped[index]:
                bad = is_bad[index]
                reasons.append(StopReason.NON_FINITE if bad else StopReason.POLICY)
            elif (met := monitor.reason(own)) is not None:
                reasons.append(met)
            elif reason is StopReason.STEPS_TAKEN and is_all_skipped[index]:
                reasons.append(StopReason.ALL_SKIPPED)
            else:
                reasons.append(reason)
        return self._result(trainer, history, reasons)

    def checked(self, result: Any, source: Source) -> Any:
        return result

    def cut_short(
        self, trainer: AbstractTrainer, history: History, reason: StopReason
    ) -> ManyResult[Any]:
        return self._result(trainer, history, [reason] * self.size)

    def _result(
        self,
        trainer: AbstractTrainer,
        history: History,
        reasons: list[StopReason],
        edms: Any = None,
    ) -> ManyResult[Any]:
        trainer = self.home(trainer)
        if edms is None:
            edms = np.full(self.size, np.nan)
        leaves, structure = jax.tree.flatten(config_of(trainer))
        rows = [
            stack((leaf,) * self.size)
            if isinstance(leaf, jax.Array) and not flag
            else leaf
            for leaf, flag in zip(leaves, self.config, strict=True)
        ]
        stacked = with_progress(structure.unflatten(rows), progress_of(trainer))
        return ManyResult(stacked, history, tuple(reasons), edms)

    def solved(
        self,
        trainer: AbstractTrainer,
        data: Any,
        solver: Any,
        steps: int,
        jac: Mode | None,
    ) -> ManyResult[Any]:
        """Solves for all of them, rather than to fit."""
        with same_inputs(self.entrance, self.place) as require_same, self.context():
            encoded, rows = checked_solver(solver, steps, "steps")
            batch = self.prepare(data)
            flags = (*self.config, *self._flags(batch))
            options: dict[str, Any] = {"steps": steps, "jac": jac, "group": self.group}
            options |= {"solver": (solver, encoded), "data_axis": self.data_axis}
            like = self.template(trainer), self.row(batch)
            require_same(trainer, batch, like, **options)
            there = Members(self.placed(trainer), flags, self.group, self.place)
            problem = Problem(batch, encoded, rows, checked_mode(jac))
            trainers, history, reasons, edms = solve_many(there, problem, steps)
        result = self._result(trainers, history, reasons, edms)
        if (end := self.bad_end(result)) is not None:
            diagnosis = diagnosed(end.trainer, self.seen(Whole(batch), end.index))
            self.raise_if_non_finite(result, diagnosis.advised_on_data)
            warn(f"{end.sentence} {diagnosis}")
        return result

    def bad_end(self, result: ManyResult[Any]) -> BadEnd | None:
        are_bad = [reason in AT_NON_FINITE for reason in result.stop_reasons]
        raises = result.trainers.nan_policy.raises
        if not (any(are_bad) if raises else all(are_bad)):
            return None
        index = are_bad.index(True)
        sentence = (
            f"`fit_many`: all {len(result)} trainers ended at values that are not "
            f"finite. Of member {index}:"
        )
        return BadEnd(index, result.trainer(index), sentence)

    def seen(self, source: Whole[Any] | Minibatches, index: Any) -> Any:
        source = self.home_state(source)
        if isinstance(source, Whole):
            return member(source, self._source_flags(source), index).batch
        return source

    def raise_if_non_finite(
        self, result: ManyResult[Any], explanation: str = SKIP_ADVICE
    ) -> None:
        if not result.trainers.nan_policy.raises:
            return
        for index, reason in enumerate(result.stop_reasons):
            if reason is StopReason.NON_FINITE:
                told = f"That is member {index} of {len(result)}. {explanation}"
                raise non_finite_error(result.trainer(index), result, told)


def _flatten(tree: PyTree) -> Any:
    return jax.tree_util.tree_flatten_with_path(tree)

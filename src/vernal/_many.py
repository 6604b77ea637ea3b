"""`fit_many`: many starts, a sweep of rates, or many data sets, in one program."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ._compiled import Chunk, Ended, Moving, Task
from ._data import Minibatches, Source, Whole, as_batch, as_source
from ._history import History
from ._loop import fit
from ._monitor import Monitor, MonitorState
from ._nonfinite import NanCount
from ._one import One
from ._paths import dotted
from ._placement import Placement, placement
from ._record import Rows
from ._retrace import explain_retrace
from ._solve import checked_solver
from ._solve_many import Members, solve_many
from ._spread import Flags, Spread, apart, run_many, run_many_in_place
from ._stop import StopReason
from ._trainer import Trainer
from ._typing import PyTree, whole_number

TrainerT = TypeVar("TrainerT", bound=Trainer[Any, Any])


@final
class ManyResult(eqx.Module, Generic[TrainerT]):
    """What [`vernal.fit_many`][] returns. `len(result)` is the number of members.

    **Attributes:**

    - `trainers`: all trainers after the last step, stacked: a trainer whose arrays have
        a row for each member. It can be given to `fit_many` again.
    - `history`: what was recorded, with a column for each member:
        `history.loss[row, i]`. Where a member was over before the others, it is NaN.
    - `stop_reasons`: why the fit of each ended.
    """

    trainers: TrainerT
    history: History
    stop_reasons: tuple[StopReason, ...] = eqx.field(static=True)

    def __len__(self) -> int:
        return len(self.stop_reasons)

    def trainer(self, index: int) -> TrainerT:
        """The trainer of one member."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` is {index}, and there are {len(self)} members.")
        is_array = lambda leaf: isinstance(leaf, jax.Array)
        return jax.tree.map(lambda x: x[index] if is_array(x) else x, self.trainers)

    @property
    def losses(self) -> Float[np.ndarray, " members"]:
        """The last recorded loss of each member that is a number, NaN if none is."""
        if not len(self.history):
            return np.full(len(self), np.nan)
        backwards = self.history.loss[::-1]
        last = np.argmin(np.isnan(backwards), axis=0)
        return np.take_along_axis(backwards, last[None], axis=0)[0]

    @property
    def best_losses(self) -> Float[Array, " members"]:
        """The loss of each member's best model, or its validation score."""
        return self.trainers.best_loss

    @property
    def best_index(self) -> int:
        """The member with the lowest of all `best_losses`."""
        return int(np.argmin(self.best_losses))

    @property
    def best(self) -> Any:
        """The best model of all members."""
        return self.trainer(self.best_index).best

    def nan_report(self, index: int) -> dict[str, NanCount]:
        """What was not finite in one member, as [`vernal.Trainer.nan_report`][]."""
        return self.trainer(index).nan_report()

    def __repr__(self) -> str:
        best = self.best_index
        return (
            f"ManyResult({len(self)} members, "
            f"best_loss={float(self.best_losses[best]):.6g} of member {best})"
        )


def fit_many(
    trainers: Sequence[TrainerT] | TrainerT,
    data: Any,
    steps: int,
    *,
    data_axis: Any = None,
    solver: Any = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> ManyResult[TrainerT]:
    """Fits many trainers at once, in one compiled program.

    They may differ in the values of all their arrays: starts, rates, keys, projectors.
    Each has its own NaN policy, stop and best: one that ends, or turns non-finite, does
    no harm to another.

    ```python
    starts = [ModelFit(perturbed(key), optimiser) for key in jax.random.split(key, 64)]
    result = vn.fit_many(starts, data, steps=2_000)
    result.best, result.best_losses

    rates = [ModelFit(model, optax.adam(rate)) for rate in (1e-3, 1e-2, 1e-1)]
    vn.fit_many(rates, data, steps=2_000)

    # 1,000 light curves at the same times, solved for.
    solver = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    vn.fit_many(trainers, (times, fluxes), 99, data_axis=(None, 0), solver=solver)
    ```

    **Arguments:**

    - `trainers`: a sequence of trainers; or a stacked one, whose arrays have a row for
        each, as `eqx.filter_vmap(make)(keys)` returns it.
    - `data`: as for [`vernal.Trainer.fit`][]. All see the same batch at a step.
    - `steps`: how many steps to take; with a solver, at most.
    - `data_axis`: the axis of the arrays in `data` along which each trainer finds its
        own, or a tree of such axes that is a prefix of `data`, `None` for what is
        shared: as `in_axes` of `jax.vmap`. It holds for the batch of a `validation`
        too.
    - `solver`: solves, as [`vernal.Trainer.solve`][] does, instead of to fit. `data` is
        one batch then, and there are no other options.
    - `batch`: how many to compute at a time, to bound memory; it must divide their
        number. By default all.
    - `mesh`: devices to spread the trainers over, along the first axis of the mesh,
        whose length must divide `batch`. Each device has a copy of the data that they
        share. In several processes each gives all trainers and all data.
    - `**options`: as for [`vernal.Trainer.fit`][]. A callback is given the stacked
        trainer.

    **Returns:**

    A [`vernal.ManyResult`][].

    **Raises:**

    - `ValueError`: if there are no trainers, or they differ in more than the values of
        arrays, or stand at different steps; if an axis has another length than there
        are trainers, or `batch` does not divide that number.
    - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][], once all are over.
    """
    stacked, flags, size = _stacked(trainers)
    group = size if batch is None else whole_number(batch, "batch", least=1)
    if size % group:
        raise ValueError(
            f"`batch` is {group}, which does not divide the {size} trainers evenly. "
            f"Give one of {', '.join(map(str, _divisors(size)))}."
        )
    place = placement(stacked, mesh)
    if place is not None:
        _check_spread(place, size, group)
    many = _Many(size, group, flags, data_axis, place)
    if solver is not None:
        if options:
            raise TypeError(
                f"`{next(iter(options))}` is for a fit, and with `solver` there is "
                "none. Leave it out."
            )
        return many.solved(stacked, data, solver, steps)
    _require_one_step(stacked)
    return fit(stacked, data, steps, kind=many, **options)


def _check_spread(place: Placement, size: int, group: int) -> None:
    """Checks that each device has as many of a group as any other."""
    if group % place.size:
        what = f"{size} trainers" if group == size else f"`batch`, {group} trainers,"
        raise ValueError(
            f"`mesh`: {what} cannot be spread evenly over the {place.size} devices "
            f"along the axis {place.axis!r}. Make their number a multiple of "
            f"{place.size}, or give a smaller mesh."
        )


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


# The trainers.


def _stacked(trainers: Any) -> tuple[Any, Flags, int]:
    """Makes one trainer of many.

    **Returns:**

    The trainer, which of the leaves of its configuration have a row for each, and how
    many they are.
    """
    if isinstance(trainers, Trainer):
        return _as_stacked(trainers)
    if not isinstance(trainers, Sequence) or isinstance(trainers, str):
        raise TypeError(
            f"`trainers` is of type `{type(trainers).__name__}`, but must be a "
            "sequence of trainers, or a stacked one: `eqx.filter_vmap(make)(keys)`."
        )
    if not trainers:
        raise ValueError("`trainers` is empty: there is nothing to fit.")
    first = trainers[0]
    for index, trainer in enumerate(trainers):
        if not isinstance(trainer, Trainer):
            raise TypeError(f"`trainers[{index}]` is {trainer!r}, not a Trainer.")
        _require_alike(first, trainer, index)
    configs = [trainer._at(None) for trainer in trainers]
    # What all of them share, such as a large frozen array, needs no rows.
    flags = [_is_own(column) for column in _columns(configs)]
    leaves = [
        _stack(column) if flag else column[0]
        for column, flag in zip(_columns(configs), flags, strict=True)
    ]
    config = jax.tree.structure(configs[0]).unflatten(leaves)
    rows = map(_stack, _columns([trainer._progress for trainer in trainers]))
    progress = jax.tree.structure(first._progress).unflatten(rows)
    return config._at(progress), tuple(flags), len(trainers)


def _columns(trees: list[Any]) -> list[tuple[Any, ...]]:
    return list(zip(*map(jax.tree.leaves, trees), strict=True))


def _is_own(column: tuple[Any, ...]) -> bool:
    is_array = isinstance(column[0], jax.Array)
    return is_array and any(leaf is not column[0] for leaf in column)


def _stack(column: tuple[Any, ...]) -> Array:
    if _is_for_jax_alone(column[0]):
        return jnp.stack(column)
    # Through NumPy, for which nothing is compiled.
    return jnp.asarray(np.stack([np.asarray(leaf) for leaf in column]))


def _first(leaf: Array) -> Array:
    return leaf[0] if _is_for_jax_alone(leaf) else jnp.asarray(np.asarray(leaf)[0])


def _is_for_jax_alone(leaf: Array) -> bool:
    """Whether NumPy would lose what an array is: a key, or of a weak type."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.weak_type


def _require_alike(first: Any, other: Any, index: int) -> None:
    is_array = lambda leaf: isinstance(leaf, jax.Array)
    same = jax.tree.structure(first) == jax.tree.structure(other) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype) if is_array(a) else a is b or a == b
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    )
    if not same:
        raise ValueError(
            f"`trainers[{index}]` differs from `trainers[0]` in more than the values "
            f"of its arrays:\n{explain_retrace(first, other)}"
        )


def _as_stacked(trainer: Any) -> tuple[Any, Flags, int]:
    if trainer.step_count.ndim != 1:
        raise TypeError(
            "`trainers` is one trainer. Give a sequence of them, or a stacked one: "
            "`eqx.filter_vmap(make)(keys)`."
        )
    size = len(trainer.step_count)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(trainer)[0]:
        if isinstance(leaf, jax.Array) and leaf.shape[:1] != (size,):
            raise ValueError(
                f"`trainers` is stacked, with {size} members, but the array at "
                f"{dotted(keys)!r} has the shape {leaf.shape}."
            )
    config = jax.tree.leaves(trainer._at(None))
    return trainer, tuple(isinstance(leaf, jax.Array) for leaf in config), size


def _require_one_step(stacked: Any) -> None:
    counts, stopped = map(np.asarray, (stacked.step_count, stacked.stopped))
    # One that has stopped may be behind the others, but not ahead of them.
    found = sorted({*counts[~stopped].tolist(), counts.max().item()})
    if len(found) > 1 and not stopped.all():
        raise ValueError(
            f"`trainers` stand at different steps ({', '.join(map(str, found))}), and "
            "those that go on must stand at one. Fit each to the same step first."
        )


# What a fit asks of them.


class _Many(One):
    """A fit of many trainers at once, which are one that is stacked."""

    def __init__(
        self,
        size: int,
        group: int,
        config: Flags,
        data_axis: Any,
        place: Placement | None,
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
        if self.place is not None and isinstance(source, Minibatches):
            return self.place.put(source)
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
                name = f"the leaf {dotted(keys)!r} of `{argument}`"
                raise ValueError(
                    f"`data_axis`: {name if keys else f'`{argument}`'} has the shape "
                    f"{leaf.shape}, whose axis {axis} must be as long as there are "
                    f"trainers, {self.size}."
                )
            leaves.append(jnp.moveaxis(leaf, axis, 0))
        batch = structure.unflatten(leaves)
        if self.place is None:
            return batch
        return self.place.put_rows(batch, [axis is not None for axis in axes])

    def placed(self, trainer: Any) -> Any:
        if self.place is None:
            return trainer
        config = self.place.put_rows(trainer._at(None), self.config)
        return config._at(self.placed_state(trainer._progress))

    def placed_state(self, state: Any) -> Any:
        if self.place is None:
            return state
        return self.place.put_rows(state, (True,) * len(jax.tree.leaves(state)))

    def _whole(self, array: Any) -> Any:
        return array if self.place is None else self.place.whole(array)

    def _on_host(self, array: Any) -> np.ndarray:
        return np.asarray(self._whole(array))

    def _axes(self, batch: Any, argument: str) -> list[int | None]:
        """Finds the axis of each leaf of a batch, `None` for what is shared."""
        is_none = lambda node: node is None
        spread = lambda axis, part: jax.tree.map(lambda _: axis, part)
        try:
            axes = jax.tree.map(spread, self.data_axis, batch, is_leaf=is_none)
        except ValueError as error:
            raise ValueError(
                f"`data_axis` is {self.data_axis!r}, which is no prefix of "
                f"`{argument}`: {error}"
            ) from error
        found = jax.tree.leaves(axes, is_leaf=is_none)
        leaves = jax.tree.leaves(batch)
        return [
            axis if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
            for axis, leaf in zip(found, leaves, strict=True)
        ]

    def _flags(self, batch: Any) -> Flags:
        return tuple(axis is not None for axis in self._axes(batch, "data"))

    def _scored(self, batch: Any) -> Any:
        return self.prepare(batch, "validation")

    def watched(self, monitor: Monitor, trainer: Any) -> MonitorState | None:
        return eqx.filter_vmap(monitor.init, axis_size=self.size)(trainer._progress)

    def template(self, trainer: Any) -> Any:
        trainer = jax.tree.map(self._whole, trainer)
        own, join = apart(trainer._at(None), self.config)
        progress = jax.tree.map(_first, trainer._progress)
        return join([_first(leaf) for leaf in own])._at(progress)

    def row(self, batch: Any) -> Any:
        leaves, structure = jax.tree.flatten(batch)
        rows = [
            jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if flag else leaf
            for leaf, flag in zip(leaves, self._flags(batch), strict=True)
        ]
        return structure.unflatten(rows)

    def count(self, trainer: Any) -> int:
        return int(self._on_host(trainer.step_count).max())

    def is_over(self, flags: Any) -> bool:
        return bool(self._on_host(flags).all())

    def run(self, task: Task, moving: Moving, in_place: bool) -> tuple[Chunk, Ended]:
        spread = Spread(
            size=self.size,
            group=self.group,
            config=self.config,
            monitor=self._monitor_flags(task.monitor),
            source=self._source_flags(task.source),
            place=self.place,
        )
        return (run_many_in_place if in_place else run_many)(task, moving, spread)

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
        counts = self._on_host(step_count)
        history = super().recorded(counts.max(), rows, scores)
        # One that is over is computed on with the others: of that there is no record.
        is_over = history.steps[:, None] >= counts
        for column in (history.loss, *history.records.values()):
            column[is_over] = np.nan if np.issubdtype(column.dtype, np.inexact) else 0
        history.validation[history.validation_steps[:, None] > counts] = np.nan
        return history

    def shown(self, trainer: Any, history: History) -> dict[str, str]:
        best = float(self._on_host(trainer.best_loss).min())
        over = int(self._on_host(trainer.stopped).sum())
        shown = {"trainers": str(self.size), "best": f"{best:.6g}"}
        return shown | ({"stopped": str(over)} if over else {})

    def ended(
        self,
        trainer: Any,
        history: History,
        monitor: Monitor,
        watched: MonitorState | None,
        reason: StopReason,
    ) -> ManyResult[Any]:
        progress = trainer._progress
        lasts = self._on_host(progress.nan_counts)[:, -1]
        is_bad = lasts.max(axis=1) == self._on_host(progress.step_count) - 1
        stopped = self._on_host(progress.stopped)
        watched = jax.device_get(jax.tree.map(self._whole, watched))
        reasons = []
        for index in range(self.size):
            own = jax.tree.map(lambda x, i=index: x[i], watched)
            if stopped[index]:
                bad = is_bad[index]
                reasons.append(StopReason.NON_FINITE if bad else StopReason.POLICY)
            else:
                reasons.append(monitor.reason(own) or reason)
        return self._result(trainer, history, reasons)

    def cut_short(
        self, trainer: Any, history: History, reason: StopReason
    ) -> ManyResult[Any]:
        return self._result(trainer, history, [reason] * self.size)

    def _result(
        self, trainer: Any, history: History, reasons: list[StopReason]
    ) -> ManyResult[Any]:
        trainer = self.home(trainer)
        leaves, structure = jax.tree.flatten(trainer._at(None))
        rows = [
            _stack((leaf,) * self.size)
            if isinstance(leaf, jax.Array) and not flag
            else leaf
            for leaf, flag in zip(leaves, self.config, strict=True)
        ]
        stacked = structure.unflatten(rows)._at(trainer._progress)
        return ManyResult(stacked, history, tuple(reasons))

    def solved(
        self, trainer: Any, data: Any, solver: Any, steps: int
    ) -> ManyResult[Any]:
        """Solves for all of them, rather than to fit."""
        encoded, rows = checked_solver(solver, steps, "steps")
        batch = self.prepare(data)
        flags = self.config, self._flags(batch)
        there = Members(self.placed(trainer), flags, self.group, self.place)
        trainers, history, reasons = solve_many(there, batch, encoded, steps, rows)
        result = self._result(trainers, history, reasons)
        self.raise_if_non_finite(result)
        return result

    def raise_if_non_finite(self, result: ManyResult[Any]) -> None:
        if not result.trainers.nan_policy.raises:
            return
        for index, reason in enumerate(result.stop_reasons):
            if reason is StopReason.NON_FINITE:
                raise result.trainer(index)._non_finite_error(result)


def _flatten(tree: PyTree) -> Any:
    return jax.tree_util.tree_flatten_with_path(tree)

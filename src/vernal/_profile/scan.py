"""`Scan`: minima with some elements held, wherever a profile asks for them."""

import contextlib
import functools
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import refuse_program
from .._curvature import Mode
from .._data import as_batch
from .._inference import (
    Around,
    ErrorKind,
    Passes,
    around,
    hidden_by_rounding,
    laplace,
    require_likelihood,
    seen_again,
)
from .._minimum import edm_note, what_falls
from .._program import words_of
from .._projection import DenseWhitening
from .._solve import (
    Problem,
    checked_solver,
    is_least_squares,
    require_squares,
    whitened_without_signs,
)
from .._step import (
    AbstractTrainer,
    bounds_of,
    defined,
    in_free_coordinates,
    prior_ends,
    stripped,
    template_of,
)
from .._tree import ravel_dtype, widest
from .by_solver import by_solver, run_nll
from .conditional import Held, Points, Space, run_limits, run_points
from .elements import values_of

# A likelihood that is lower by less than this is the same, beside rounding.
_LOWER = 5e-3

# Two minima that differ by less, beside rounding, are the same.
_SAME = 1e-6

# Where so much of a fall comes and goes by rounding, there is none. So many points
# tell.
_MOST_LOST, _AROUND = 0.2, 8

LOST = (
    "it changes as much if the parameters are off by rounding: large numbers cancel in "
    "it there, and its digits are lost. Write it so that they do not cancel, or keep "
    "the parameters away from there, by `bounds`."
)

_WHAT = "A profile of the likelihood"

# The room of the program.
_ROOM = 256

# The share of a variance that another element leaves is known to this.
_LEAST_SHARE = 1e-12

# Where more Newton steps than these are needed, the solver is better.
_MOST_STEPS = 32

Start = np.ndarray | int
"""The rows of a point where to begin, as those of `Points`; or its index."""


class Options(NamedTuple):
    """The options that `profile` and `intervals` share."""

    max_steps: int
    jac: Mode | None
    scale_errors: bool


class Scan:
    """A trainer at a minimum, whose elements are held at one value after the other.

    - `base`: the minimum.
    - `errors`: the standard errors of all elements, as reports have them.
    - `is_hidden`: which of these are infinite, as rounding has it.
    - `wide_errors`: those if none of the bounds were there.
    - `low`, `high`: the bounds of all elements, infinite where there is none.
    """

    def __init__(
        self,
        name: str,
        trainer: AbstractTrainer,
        solver: Any,
        batch: Any,
        options: Options,
    ):
        """Checks that the trainer is at a minimum, and finds its curvature there."""
        refuse_program(name, trainer, batch)
        encoded, _ = checked_solver(solver, options.max_steps, "max_steps")
        require_likelihood(trainer, _WHAT)
        _require_same(trainer, solver)
        batch, jac = as_batch(batch), options.jac
        trainer = in_free_coordinates(trainer)
        found = _metric(name, trainer, batch, jac, options.scale_errors)
        metric, self.errors, is_hidden, scale, slope = found
        self.is_hidden = np.isinf(self.errors) & is_hidden
        self._problem = Problem(batch, encoded, 1, jac)
        self._goal = jax.device_put(np.int32(options.max_steps))
        most = jax.device_put(np.int32(min(options.max_steps, _MOST_STEPS)))
        # How fast twice the negative log-likelihood rises from a bound.
        self._rise = 2 * abs(slope) / scale**2
        bare, scale = stripped(trainer), jax.device_put(metric.dtype.type(scale))
        self._space = Space(bare, batch, jac, metric, most, scale)
        self.wide_errors = np.asarray(metric.errors_of_the_data(), float)
        # On the host, where nothing is compiled.
        known, leaves = jax.device_get((metric, jax.tree.leaves(trainer.params)))
        # The last error of the model where elements were held.
        self.raised: RuntimeError | None = None
        self._scale = known.scale.astype(float)
        self._matrix = known.vectors.astype(float) * known.roots.astype(float)
        self._flat = np.concatenate([np.ravel(x) for x in leaves], dtype=metric.dtype)
        self.high = np.full(self._flat.shape, np.inf)
        self.low = -self.high
        if bounds_of(trainer) is not None:
            self.low, self.high = jax.device_get(run_limits(self._space))
        found = self.points([()], [()], list(self._room(1).rows))
        self.base: Points = jax.tree.map(lambda x: x[0], found)

    def is_on_bound(self, index: int) -> bool:
        """Whether an element is on one of its bounds at the minimum."""
        return bool(self.base.flat[index] in (self.low[index], self.high[index]))

    def unit(self, index: int) -> float:
        """Returns the wide error, or a scale where the data do not constrain it."""
        return float(self._scale[index] * np.linalg.norm(self._matrix[index]))

    def unit_beside(self, index: int, held: int) -> float:
        """Returns the unit of an element while another one is held."""
        rows = self._matrix[[index, held]]
        matrix = rows @ rows.T
        share = matrix[0, 1] ** 2 / (matrix[0, 0] * matrix[1, 1])
        # Where the two are one by rounding, the unit is still a number.
        return self.unit(index) * math.sqrt(max(1 - share, _LEAST_SHARE))

    def unit_by_slope(self, index: int) -> float:
        """Returns the scale of an element that is pushed against a bound, or zero.

        A count of zero where the rate is zero has an error of zero: the likelihood is
        linear in the rate, and no parabola.
        """
        rise = float(self._rise[index])
        return 1 / rise if rise > 0 else 0.0

    def falls(self, index: int) -> bool:
        """Whether an element falls as its free coordinate rises."""
        _, slope = values_of(self.trainer, index, self.base.flat[[index]])
        return bool(slope[0] < 0)

    def start(self, flat: np.ndarray, elements: Sequence[int]) -> Start:
        """Begins at `flat` with these elements held, in the metric of the minimum."""
        rows = np.zeros((3, flat.size), flat.dtype)
        rows[0] = flat
        rows[1 : 1 + len(elements)] = self._along(tuple(elements)) @ self._matrix.T
        return rows

    def _along(self, elements: tuple[int, ...]) -> np.ndarray:
        """Returns the shortest latent moves by which each element goes by its scale."""
        return np.linalg.pinv(self._matrix[list(elements)]).T

    def is_lower(self, points: Points) -> Any:
        """Whether the likelihood is lower than at the minimum, beyond rounding.

        That of parameters that are far from zero, and cancel each other, counts too.
        """
        eps, minimum = np.finfo(self._flat.dtype).eps, float(self.base.nll)
        units = points.flat.astype(float) / self._scale
        away = eps * np.linalg.norm(units, axis=-1)
        cancelled = away * math.sqrt(2 * abs(minimum)) + away**2 / 2
        noise = 64 * eps * abs(minimum) + cancelled
        return points.nll < minimum - _LOWER - noise

    def is_lost(self, flat: np.ndarray, nll: float) -> bool:
        """Whether the likelihood is lower there by what rounding makes of it."""
        rounded = np.random.default_rng(0).integers(-4, 5, (_AROUND, flat.size))
        near = flat * (1 + rounded * np.finfo(flat.dtype).eps).astype(flat.dtype)
        values = [float(run_nll(self._space, jax.device_put(row))) for row in near]
        fall = float(self.base.nll) - nll
        return not np.ptp(values) <= _MOST_LOST * fall

    def model(self, flat: np.ndarray) -> Any:
        return self._space.at(jnp.asarray(flat)).model

    @property
    def trainer(self) -> AbstractTrainer:
        """The trainer at the minimum, stripped."""
        return self._space.trainer

    def points(
        self,
        elements: Sequence[Sequence[int]],
        values: Sequence[Sequence[float]],
        starts: Sequence[Start],
    ) -> Points:
        """Finds the minima where elements are held at values, two at most.

        The solver takes over where Newton steps do not lead to a minimum.
        """
        held = self._held(elements, values)
        found = self._newton(held, starts)
        if template_of(self.trainer).bijections is not None and all(elements):
            # Near the edge of a bijection the likelihood is flat in the coordinate: a
            # point that begins there stays, though it may be better elsewhere.
            from_base = [self.start(self._flat, own) for own in elements]
            again = self._newton(held, from_base)
            same = _SAME + 64 * np.finfo(found.nll.dtype).eps * np.abs(found.nll)
            least = np.where(found.is_minimum, -same, same)
            # It is NaN where the model raised an error.
            is_better = again.is_minimum & ~(again.nll >= found.nll + least)
            for whole, part in zip(found, again, strict=True):
                whole[is_better] = part[is_better]
        for task in map(int, np.flatnonzero(~found.is_minimum)):
            own: Held = jax.tree.map(lambda x, i=task: x[i], held)
            start = starts[task]
            before = found.flat[start] if isinstance(start, int) else start[0]
            for flat in found.flat[task].copy(), before:
                args = self._space, self._problem, own, flat, self._goal
                try:
                    solved = by_solver(*args)
                except RuntimeError as error:
                    self._note(error, own)
                    continue
                found.flat[task], found.nll[task], found.is_minimum[task] = solved
                if found.is_minimum[task]:
                    break
        return found

    def _newton(self, held: Held, starts: Sequence[Start]) -> Points:
        """Finds minima by Newton steps, each after that at which it begins."""
        children: dict[int, list[int]] = {}
        ready: deque[int] = deque()
        for task, start in enumerate(starts):
            if isinstance(start, int):
                children.setdefault(start, []).append(task)
            else:
                ready.append(task)
        found = self._room(len(starts))
        while ready:
            rows: dict[int, int] = {}
            while ready and len(rows) < _ROOM:
                task = ready.popleft()
                rows[task] = len(rows)
                ready += children.get(task, ())
            self._run(held, starts, rows, found)
        return found

    def _room(self, count: int) -> Points:
        """Makes room for points, which begin at the minimum."""
        rows = np.zeros((count, 3, self._flat.size), self._flat.dtype)
        rows[:, 0] = self._flat
        return Points(rows, np.zeros(count, rows.dtype), np.zeros(count, bool))

    def _held(
        self, elements: Sequence[Sequence[int]], values: Sequence[Sequence[float]]
    ) -> Held:
        size, find_along = self._flat.size, functools.cache(self._along)
        units, along = np.zeros((2, len(elements), 2, size), self._flat.dtype)
        goal = np.zeros_like(units[:, 0])
        for row, (own, at) in enumerate(zip(map(tuple, elements), values, strict=True)):
            units[row, range(len(own)), own] = 1
            along[row, : len(own)] = find_along(own)
            goal[row, list(own)] = at
        return Held(units, along, goal)

    def _note(self, error: RuntimeError, own: Held) -> None:
        """Keeps an error of the model; raises any other, and one at the minimum."""
        of_model = jax.errors.JaxRuntimeError, eqx.EquinoxRuntimeError
        is_memory = "RESOURCE_EXHAUSTED" in str(error)
        if not isinstance(error, of_model) or is_memory or not own.flags.any():
            raise error
        self.raised = error

    def error_note(self) -> str:
        """Returns what there is to say of an error of the model."""
        if self.raised is None:
            return ""
        return (
            " The model raised an error at values that were tried "
            f"({words_of(self.raised)[:160]}): let it return NaN there, as "
            "`diffeqsolve` of diffrax does with `throw=False`."
        )

    def _run(
        self,
        held: Held,
        starts: Sequence[Start],
        rows: dict[int, int],
        found: Points,
    ) -> None:
        """Runs the program for some points, each in a row of its own.

        Those at which the model raises an error are NaN.
        """
        begin, parents = self._room(_ROOM), np.arange(_ROOM, dtype=np.int32)
        tasks, count = list(rows), np.int32(len(rows))
        # The rows that are left are not looked at.
        own = jax.tree.map(lambda x: x[np.resize(tasks, _ROOM)], held)
        for task, row in rows.items():
            start = starts[task]
            if not isinstance(start, int):
                begin.rows[row] = start
            elif start in rows:
                parents[row] = rows[start]
            else:
                begin.rows[row] = found.rows[start]
        try:
            new = run_points(self._space, own, parents, begin, count)
        except RuntimeError as error:
            if len(tasks) == 1:
                self._note(error, jax.tree.map(lambda x: x[0], own))
                found.nll[tasks] = np.nan
                return
            half = len(tasks) // 2
            for part in (tasks[:half], tasks[half:]):
                places = {task: row for row, task in enumerate(part)}
                self._run(held, starts, places, found)
            return
        for whole, part in zip(found, jax.device_get(new), strict=True):
            whole[tasks] = part[: len(tasks)]


def _metric(
    name: str,
    trainer: AbstractTrainer,
    batch: Any,
    jac: Mode | None,
    scale_errors: bool,
) -> tuple[DenseWhitening, np.ndarray, np.ndarray, float, np.ndarray]:
    """Whitens all parameters; refuses a trainer that is not at a minimum.

    Returns their errors too, with what is at its bound held there, which of these
    rounding may hide, the scale of the error bars, and the slopes of what is held.
    """
    # A robust loss is refused, whether its data scatter or not.
    kind = "expected" if "residuals" in defined(trainer) else None
    here = seen_again(trainer, batch, around(trainer, batch, _WHAT, jac, kind))
    if here.data is not None and here.data.is_robust:
        raise TypeError(
            f"`{name}` follows a likelihood, and a robust loss is none: by how much it "
            "rises says nothing of the errors. Use `standard_errors`, which takes them "
            "from the scatter of the data."
        )
    note = None if here.distance is None else edm_note(here.distance, trainer.params)
    if note is not None:
        raise ValueError(
            f"`{name}`: the trainer is {note}. A profile begins at the minimum: "
            "`trainer.solve(solver, batch).trainer` is there."
            + prior_ends(trainer, is_near=True)
        )
    if kind is not None and _lacks_slopes(here):
        # The curvature of the model may be all there is. It is no unit at a saddle, and
        # a model may have none, by a rule of its own for its derivatives.
        with contextlib.suppress(ValueError, TypeError):
            here = around(trainer, batch, _WHAT, jac, "observed")
    scale = here.error_scale(scale_errors)
    if scale == 0:
        raise ValueError(
            f"`{name}`: `scale_errors` takes the scale of the errors from the scatter "
            "of the residuals, and these are all zero. Leave it out."
        )
    metric, errors = here.whitening, here.whitening.errors_of_the_data()
    is_hidden, slope = hidden_by_rounding(metric), np.zeros(here.held.shape)
    if np.any(here.held):
        free, slope = _without_bounds(trainer, batch, jac, here.kind)
        metric, slope = free or metric, np.where(here.held, slope, 0)
    dtype = widest((ravel_dtype(trainer.params), metric.dtype))
    # On the host, where nothing is compiled.
    scaled = jax.device_put(np.asarray(metric.scale) * scale)
    metric = eqx.tree_at(lambda w: w.scale, metric, scaled)
    metric = jax.tree.map(lambda x: x.astype(dtype), metric)
    return metric, scale * np.asarray(errors, float), is_hidden, scale, slope


def _lacks_slopes(here: Around) -> bool:
    """Whether there is a direction in which residuals have hardly any slope."""
    is_leap = here.distance is not None and here.distance.is_leap
    errors = np.asarray(here.whitening.errors_of_the_data())
    return bool(is_leap or np.isinf(errors[~here.held]).any())


def _without_bounds(
    trainer: AbstractTrainer, batch: Any, jac: Mode | None, kind: ErrorKind
) -> tuple[DenseWhitening | None, Any]:
    """Whitens all parameters: one that is held at its bound may have to leave it.

    Returns their slopes too, zero if they are not known.
    """
    try:
        free = laplace(trainer, batch, _WHAT, jac, kind, holds=False)
    except ValueError:  # the likelihood may curve downwards there
        found = whitened_without_signs(trainer, batch, None, Passes(jac=jac))
        if found is None:
            return None, 0.0
        (whitening,) = found.projector.whitenings
        assert isinstance(whitening, DenseWhitening)
        return whitening, 0.0
    slope, unit = (np.asarray(x, float) for x in free.slope)
    return free.whitening, slope / unit


def _require_same(trainer: AbstractTrainer, solver: Any) -> None:
    """Refuses a solver that minimises something else than the likelihood."""
    require_squares(trainer, solver)
    if defined(trainer) == ("residuals",):
        return  # all that there is, also for a minimiser and beside any prior
    kind = "residuals" if "residuals" in defined(trainer) else "nll"
    falls = what_falls(trainer, is_least_squares(solver))
    if falls != kind:
        least = "a least-squares solver" if kind == "residuals" else "no `loss`"
        raise ValueError(
            f"`solver` minimises `{falls}`, and the profile is of the likelihood, by "
            f"`{kind}`. Give {least}, or a class that defines `{kind}` alone."
        )

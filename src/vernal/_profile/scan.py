"""`Scan`: minima with some elements held, wherever a profile asks for them."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import refuse_program
from .._curvature import Mode, checked_mode
from .._data import as_batch
from .._inference import Passes, around, require_likelihood
from .._minimum import edm_note, what_falls
from .._projection import DenseWhitening
from .._solve import Problem, checked_solver, is_least_squares, whitened_without_signs
from .._step import (
    AbstractTrainer,
    bounds_of,
    defined,
    in_free_coordinates,
    stripped,
)
from .._tree import ravel_dtype, widest
from .by_solver import by_solver
from .conditional import Held, Points, Space, read, run_models, run_points

# A likelihood that is lower by less than this is the same, beside rounding.
_LOWER = 5e-3

# The room of the program, and how many points it finds at a time.
_ROOM, _WIDTH = 256, 4

# Where more Newton steps than these are needed, the solver is better.
_MOST_STEPS = 32

Start = tuple[np.ndarray, np.ndarray] | int
"""Parameters, and their response to what is held; or the index of another point."""


class Options(NamedTuple):
    """The options that `profile` and `intervals` share."""

    max_steps: int
    jac: Mode | None


class Scan:
    """A trainer at a minimum, whose elements are held at one value after the other.

    - `base`: the minimum.
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
        require_likelihood(trainer, "A profile of the likelihood")
        _require_same(trainer, solver)
        batch, jac = as_batch(batch), checked_mode(options.jac)
        trainer = in_free_coordinates(trainer)
        metric = _metric(name, trainer, batch, jac)
        self._problem = Problem(batch, encoded, 1, jac)
        self._goal = jnp.asarray(np.int32(options.max_steps))
        most = jnp.asarray(np.int32(min(options.max_steps, _MOST_STEPS)))
        self._space = Space(stripped(trainer), batch, jac, metric, most)
        self._errors = np.asarray(metric.errors_of_the_data(), float)
        flat, self.low, self.high, covariance = jax.device_get(read(self._space))
        self._flat, self._covariance = flat, covariance
        self.base: Points = self._room(1)
        found = self.points([()], [()], [(flat, self.base.response[0])])
        self.base = jax.tree.map(lambda x: x[0], found)

    def error(self, index: int) -> float:
        """Returns the standard error of an element, without a bound."""
        return float(self._errors[index])

    def unit(self, index: int) -> float:
        """Returns the same, or a scale where the data do not constrain the element."""
        return float(np.sqrt(self._covariance[index, index]))

    def start(self, flat: np.ndarray, elements: Sequence[int]) -> Start:
        """Begins at `flat` with these elements held, in the metric of the minimum."""
        held, response = list(elements), np.zeros((flat.size, 2))
        inner = self._covariance[np.ix_(held, held)]
        others = np.linalg.lstsq(inner, self._covariance[held], rcond=None)[0]
        response[:, : len(held)] = others.T
        return flat, response

    def model(self, flat: np.ndarray) -> Any:
        """Returns the model with these parameters."""
        return self._space.at(jnp.asarray(flat)).model

    def models(self, flat: np.ndarray) -> Any:
        """Returns the models with these parameters, stacked."""
        return run_models(self._space, jnp.asarray(flat))

    def points(
        self,
        elements: Sequence[Sequence[int]],
        values: Sequence[Sequence[float]],
        starts: Sequence[Start],
    ) -> Points:
        """Finds the minima where elements are held at values, two at most.

        The solver takes over where Newton steps do not lead to a minimum.
        """
        held = self._held(len(starts))
        for task, pairs in enumerate(zip(elements, values, strict=True)):
            for row, (index, value) in enumerate(zip(*pairs, strict=True)):
                held.units[task, row, index], held.goal[task, index] = 1, value
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
            for first in range(0, _ROOM, _WIDTH):
                block = [ready.popleft() for _ in range(min(_WIDTH, len(ready)))]
                if not block:
                    break
                rows |= {task: first + place for place, task in enumerate(block)}
                ready += [child for task in block for child in children.get(task, ())]
            self._run(held, starts, rows, found)
        for task in map(int, np.flatnonzero(~found.is_minimum)):
            own: Held = jax.tree.map(lambda x, i=task: x[i], held)
            start = starts[task]
            before = found.flat[start] if isinstance(start, int) else start[0]
            for flat in found.flat[task].copy(), before:
                args = self._space, self._problem, own, flat, self._goal
                solved = by_solver(*args)
                found.flat[task], found.nll[task], found.is_minimum[task] = solved
                if found.is_minimum[task]:
                    break
        return found

    def _room(self, count: int) -> Points:
        """Makes room for points, which begin at the minimum."""
        size, dtype = self._flat.size, self._flat.dtype
        return Points(
            flat=np.tile(self._flat, (count, 1)),
            response=np.zeros((count, size, 2), dtype),
            nll=np.zeros(count, dtype),
            is_minimum=np.zeros(count, bool),
        )

    def _run(
        self,
        held: Held,
        starts: Sequence[Start],
        rows: dict[int, int],
        found: Points,
    ) -> None:
        """Runs the program for some points, each in a row of its own."""
        begin, parents = self._room(_ROOM), np.arange(_ROOM, dtype=np.int32)
        tasks, places, own = list(rows), list(rows.values()), self._held(_ROOM)
        for whole, part in zip(own, held, strict=True):
            whole[places] = part[tasks]
        for task, row in rows.items():
            start = starts[task]
            if not isinstance(start, int):
                begin.flat[row], begin.response[row] = start
            elif start in rows:
                parents[row] = rows[start]
            else:
                begin.flat[row] = found.flat[start]
                begin.response[row] = found.response[start]
        blocks = np.int32(max(places) // _WIDTH + 1)
        new = run_points(self._space, own, parents, begin, blocks, _WIDTH)
        for whole, part in zip(found, jax.device_get(new), strict=True):
            whole[tasks] = part[places]

    def _held(self, count: int) -> Held:
        """Makes room for what is held."""
        size, dtype = self._flat.size, self._flat.dtype
        units = np.zeros((count, 2, size), dtype)
        return Held(units, np.zeros((count, size), dtype))


def _metric(
    name: str, trainer: AbstractTrainer, batch: Any, jac: Mode | None
) -> DenseWhitening:
    """Whitens all parameters; refuses a trainer that is not at a minimum."""
    here = around(trainer, batch, "A profile of the likelihood", jac)
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
        )
    metric = here.whitening
    if bounds_of(trainer) is not None:
        # An element that is held at its bound may have to leave it.
        found = whitened_without_signs(trainer, batch, None, Passes(jac=jac))
        if found is not None:
            (whitening,) = found.projector.whitenings
            assert isinstance(whitening, DenseWhitening)
            metric = whitening
    dtype = widest((ravel_dtype(trainer.params), metric.dtype))
    return jax.tree.map(lambda x: x.astype(dtype), metric)


def _require_same(trainer: AbstractTrainer, solver: Any) -> None:
    """Refuses a solver that minimises something else than the likelihood."""
    kind = "residuals" if "residuals" in defined(trainer) else "nll"
    falls = what_falls(trainer, is_least_squares(solver))
    if falls != kind:
        least = "a least-squares solver" if kind == "residuals" else "no `loss`"
        raise ValueError(
            f"`solver` minimises `{falls}`, and the profile is of the likelihood, by "
            f"`{kind}`. Give {least}, or a class that defines `{kind}` alone."
        )


def is_lower(nll: Any, minimum: Any) -> Any:
    """Whether the likelihood is lower than at the minimum, beyond rounding."""
    eps = np.finfo(minimum.dtype).eps
    return nll < minimum - _LOWER - 64 * eps * np.abs(minimum)

"""`solve`: a solver of Optimistix, in rounds between which the space is whitened."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from .._boundary import boolean, refuse_program, warn
from .._curvature import Mode, checked_mode, matmul
from .._data import as_batch
from .._devices import AbstractPlacement, placement, same_inputs
from .._fit import FitResult
from .._inference import (
    Passes,
    curvature,
    fisher,
    has_likelihood,
    linearised,
    whitened,
)
from .._minimum import (
    MOST_PARAMETERS,
    Distance,
    Local,
    distance_of,
    measure_jacobian,
    settled,
    unknown,
)
from .._policy import StopReason
from .._projection import DenseWhitening, EigenProjector, Unchanged
from .._step import (
    AbstractTrainer,
    Diagnosis,
    bounds_of,
    count_non_finite,
    diagnosed,
    in_free_coordinates,
    initial_opt_state,
    live,
    non_finite_error,
    progress_of,
    reproject,
    stripped,
    with_progress,
)
from .._storage import History
from .._tree import paths, ravel
from .problem import (
    IS_OVER,
    REASONS,
    SOLVERS,
    End,
    Problem,
    Start,
    checked_solver,
    find_bad_alone,
    in_parameters,
    is_suspect,
    progress_at,
    run,
)

# How many columns of a matrix are computed at a time.
_COLUMNS = 64

_IN_A_PROGRAM = (
    "Within a compiled program, minimise `trainer.objective(batch)` by "
    "`optimistix.minimise`, or call `vn.unroll`."
)

# The reasons for which whitening again may help.
_GOES_ON = (StopReason.STALLED, StopReason.FAILED, StopReason.DIVERGED)


class SolveOptions(NamedTuple):
    """The options of `Trainer.solve`."""

    max_steps: int
    rewhiten: bool
    jac: Mode | None


def solve(
    trainer: AbstractTrainer,
    solver: Any,
    batch: Any,
    options: SolveOptions,
    mesh: Mesh | None,
) -> FitResult[Any, Any]:
    """Implements `Trainer.solve`."""
    if isinstance(batch, SOLVERS):
        raise TypeError(
            f"`batch` is a `{type(batch).__name__}`. Give the solver first: "
            "`trainer.solve(solver, batch)`."
        )
    refuse_program("solve", trainer, batch, remedy=_IN_A_PROGRAM)
    options = options._replace(rewhiten=boolean(options.rewhiten, "rewhiten"))
    place = placement(trainer, mesh)
    with same_inputs("solve", place) as require_same, place.context():
        encoded, rows = checked_solver(solver, options.max_steps, "max_steps")
        batch = as_batch(batch)
        require_same(trainer, batch, solver=(solver, encoded), **options._asdict())
        batch = place.batch(batch, "batch")
        # After `whiten` there is a program of the Jacobian already.
        is_shared = trainer.projector is not None
        problem = Problem(batch, encoded, rows, checked_mode(options.jac), is_shared)
        rounds = _Rounds(trainer, problem, place)
        try:
            rounds.go(options.max_steps, options.rewhiten)
        except RuntimeError as error:
            # Most likely an `eqx.error_if`, of the solver or of the user's methods.
            if not hasattr(error, "result"):
                error.result = rounds.result(StopReason.ERROR)  # pyright: ignore
                error.add_note("The solve up to here is `.result` of this error.")
            raise
        result = rounds.result()
        if result.stop_reason is not StopReason.NON_FINITE:
            return result
        diagnosis = rounds.diagnosis()
    if trainer.nan_policy.raises:
        raise non_finite_error(result.trainer, result, diagnosis.advised_on_data)
    warn(f"`solve`: {result.stop_reason} {diagnosis}")
    return result


class _Rounds:
    """A running solve."""

    def __init__(
        self, trainer: AbstractTrainer, problem: Problem, place: AbstractPlacement
    ):
        placed = in_free_coordinates(place.put(trainer))
        self._trainer, self._placed, self._place = trainer, placed, place
        self._problem, self._stripped = problem, stripped(placed)
        self._projector, self._held = placed.projector, Start.of(placed)
        self._end: End | None = None
        self._distance: Distance | None = None
        self._losses: list[np.ndarray] = []
        self._reason = StopReason.ERROR

    def go(self, max_steps: int, rewhiten: bool) -> None:
        """Solves until it converges, gets no further, or has taken its steps."""
        left, before = max_steps, None
        while True:
            goal = jnp.asarray(np.int32(left))
            end = run(self._stripped, self._projector, self._held, self._problem, goal)
            copied = end.losses, end.steps, end.reason, end.last, end.is_settled
            losses, steps, reason, last, is_settled = jax.device_get(copied)
            distance = distance_of(end.local or self._linearised(end))
            self._end, self._distance = end, distance
            self._losses.append(losses[:steps])
            self._reason = settled(REASONS[reason], distance)
            left -= steps
            fall = np.inf if before is None else before - last
            if not (left and steps and self._may_go_on(fall, is_settled, rewhiten)):
                return
            again = None
            if rewhiten and self._projector is not None:
                again = _whitened_again(live(self._placed, end.params), self._problem)
            if again is None and bounds_of(self._placed) is None:
                return
            self._projector, latent = again or (self._projector, end.latent)
            before = last
            self._stripped = live(self._stripped, end.params)
            self._held = self._held._replace(
                latent=latent,
                best=end.best,
                state=end.best_state,
                loss=end.best_loss,
                is_validated=jnp.zeros_like(self._held.is_validated),
                first=end.first,
            )

    def _linearised(self, end: End) -> Local:
        """Measures the surroundings of the end by the Jacobian there."""
        batch, jac = self._problem.batch, self._problem.jac
        try:
            found = linearised(live(self._placed, end.params), batch, jac)
        except TypeError:
            # The solver needs the gradient of the loss alone.
            return unknown(ravel(end.params))
        fall = end.first - end.last
        return measure_jacobian(*found, end.params, self._projector, fall)

    def _may_go_on(self, fall: Any, is_settled: Any, rewhiten: bool) -> bool:
        """Whether another round may help: in another metric, or with others held.

        `fall` is how far the loss fell in this round.
        """
        assert self._distance is not None
        if not is_settled and self._reason not in IS_OVER:
            return bool(fall > 0)
        has_other = bounds_of(self._placed) is not None or (
            rewhiten and self._projector is not None
        )
        is_short = self._reason in _GOES_ON and fall > self._distance.limit
        return bool(is_short and has_other)

    def diagnosis(self) -> Diagnosis:
        """Finds out why the values at the end are not finite."""
        assert self._end is not None
        trainer = live(self._placed, self._end.stumble)
        return diagnosed(trainer, self._problem.batch)

    def result(self, reason: StopReason | None = None) -> FitResult[Any, Any]:
        """Makes the result, with another `reason` than the solver's if there is one."""
        old = progress_of(self._trainer)
        if self._end is None:
            none = History(np.zeros(0, int), np.zeros(0, old.best_loss.dtype))
            return FitResult(self._trainer, none, reason or self._reason)
        end, projector = self._place.home((self._end, self._projector))
        losses, start = np.concatenate(self._losses), int(old.step_count)
        reason, counts = reason or self._reason, old.nan_counts
        if is_suspect(reason, end.in_vain):
            # The solver does not say what it met.
            bad = find_bad_alone(self._stripped, end.stumble, self._problem.batch)
            unexplained = reason is StopReason.NON_FINITE and not np.any(bad)
            last = jnp.asarray(start + max(len(losses) - 1, 0))
            counts = count_non_finite(counts, jnp.append(bad, unexplained), last)
            reason = StopReason.NON_FINITE if np.any(bad) else reason
        count = np.asarray(start + len(losses), old.step_count.dtype)
        end = end._replace(step_count=jnp.asarray(count))
        optimiser, end = self._trainer.optimiser, in_parameters(end, self._trainer)
        opt_state = initial_opt_state(optimiser, end.params, end.latent)
        progress = progress_at(end, old, opt_state, counts)
        history = History(np.arange(start, start + len(losses)), losses)
        trainer = with_progress(self._trainer, progress, projector=projector)
        return FitResult(trainer, history, reason, self._distance)


def _whitened_again(
    trainer: AbstractTrainer, problem: Problem
) -> tuple[EigenProjector, Any] | None:
    """Whitens where a trainer is now, as `Trainer.whiten` does by default.

    Returns the projector and the latent point; `None` if the space is of another kind.
    For many parameters the Jacobian, which `solve` may not have formed, is not kept.
    """
    projector: EigenProjector = trainer.projector
    kinds = {type(whitening) for whitening in projector.whitenings}
    size = sum(leaf.size for leaf in jax.tree.leaves(trainer.params))
    if projector.latent_size < size or not kinds <= {DenseWhitening, Unchanged}:
        return None
    blocks = None
    if projector.has_names:
        names = paths(trainer.params)
        whitenings = zip(projector.blocks, projector.whitenings, strict=True)
        blocks = tuple(
            tuple(names[index] for index in block)
            for block, whitening in whitenings
            if isinstance(whitening, DenseWhitening)
        )
    passes = Passes(_COLUMNS if size > MOST_PARAMETERS else None, problem.jac)
    try:
        found = whitened(trainer, problem.batch, blocks, passes, {})
        again = reproject(trainer, found, None)
    except ValueError:
        again = whitened_without_signs(trainer, problem.batch, blocks, passes)
    return None if again is None else (again.projector, again.latent)


def whitened_without_signs(
    trainer: AbstractTrainer, batch: Any, blocks: Any, passes: Passes
) -> AbstractTrainer | None:
    """Whitens by the absolute curvature, where a Hessian curves downwards too.

    See Dauphin et al., *Identifying and attacking the saddle point problem in
    high-dimensional non-convex optimization* (2014).
    """
    matrix = fisher if has_likelihood(trainer) else curvature
    found = jax.tree.map(_without_signs, matrix(trainer, batch, blocks, passes))
    make = EigenProjector.from_fisher if blocks is None else EigenProjector.from_blocks
    try:
        return reproject(trainer, make(found, trainer.params, on_null="prior"), None)
    except ValueError:
        # It is not finite either.
        return None


def _without_signs(matrix: Array) -> Array:
    """Takes the absolute values of the eigenvalues of the scaled matrix."""
    scale = jnp.sqrt(jnp.abs(jnp.diag(matrix)))
    scale = jnp.where(scale > 0, scale, 1)
    rows, columns = scale[:, None], scale[None, :]
    values, vectors = jnp.linalg.eigh(matrix / columns / rows)
    return matmul(vectors * jnp.abs(values)[None, :], vectors.T) * columns * rows

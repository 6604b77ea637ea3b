"""`solve`: a solver of Optimistix, round after round, in a space whitened anew."""

import dataclasses
from typing import Any

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
from .._inference import Passes, curvature, fisher, has_likelihood, whitened
from .._minimum import MOST_PARAMETERS, Distance, distance_of, settled
from .._policy import StopReason
from .._projection import DenseWhitening, EigenProjector, Unchanged
from .._step import (
    AbstractTrainer,
    Diagnosis,
    Progress,
    count_non_finite,
    diagnosed,
    initial_opt_state,
    live,
    non_finite_error,
    progress_of,
    reproject,
    stripped,
    with_progress,
)
from .._storage import History
from .._tree import paths
from .problem import (
    REASONS,
    End,
    Problem,
    Start,
    checked_solver,
    find_bad_alone,
    is_suspect,
    run,
)

# How many columns of a matrix are computed at a time.
_COLUMNS = 64

_IN_A_PROGRAM = (
    "Within a compiled program, minimise `trainer.objective(batch)` by "
    "`optimistix.minimise`, or call `vn.unroll`."
)

# What another metric may help.
_GOES_ON = (StopReason.STALLED, StopReason.FAILED, StopReason.DIVERGED)


def solve(
    trainer: AbstractTrainer,
    solver: Any,
    batch: Any,
    max_steps: int,
    rewhiten: bool,
    jac: Mode | None,
    mesh: Mesh | None,
) -> FitResult[Any, Any]:
    """Solves for the parameters. The documentation is that of `Trainer.solve`."""
    refuse_program("solve", trainer, batch, remedy=_IN_A_PROGRAM)
    rewhiten = boolean(rewhiten, "rewhiten")
    place = placement(trainer, mesh)
    with same_inputs("solve", place) as require_same, place.context():
        encoded, rows = checked_solver(solver, max_steps, "max_steps")
        batch = as_batch(batch)
        options = {"max_steps": max_steps, "rewhiten": rewhiten, "jac": jac}
        require_same(trainer, batch, solver=(solver, encoded), **options)
        batch, there = place.batch(batch, "batch"), place.put(trainer)
        problem = Problem(batch, encoded, rows, checked_mode(jac))
        rounds = _Rounds(trainer, there, problem, place)
        try:
            rounds.go(max_steps, rewhiten)
        except RuntimeError as error:
            # An `eqx.error_if`, as likely as not, in the solver or in what is solved.
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
    """A solve on its way."""

    def __init__(
        self,
        trainer: AbstractTrainer,
        there: Any,
        problem: Problem,
        place: AbstractPlacement,
    ):
        """**Arguments:**

        - `trainer`, `there`: the trainer as it was given, and where it is solved.
        - `problem`: what is solved.
        - `place`: where.
        """
        self._trainer, self._there, self._place = trainer, there, place
        self._problem, self._bare = problem, stripped(there)
        self._projector, self._held = there.projector, Start.of(there)
        self._end: End | None = None
        self._distance: Distance | None = None
        self._losses: list[np.ndarray] = []
        self._reason = StopReason.ERROR
        self._in_vain = False

    def go(self, max_steps: int, rewhiten: bool) -> None:
        """Goes on until it arrives, gets no further, or has taken its steps."""
        left, before = max_steps, None
        while True:
            goal = jnp.asarray(np.int32(left))
            end = run(self._bare, self._projector, self._held, self._problem, goal)
            told = end.losses, end.steps, end.reason, end.in_vain, end.last, end.local
            losses, steps, reason, in_vain, last, local = jax.device_get(told)
            distance = distance_of(local)
            self._end, self._in_vain, self._distance = end, in_vain, distance
            self._losses.append(losses[:steps])
            self._reason = settled(REASONS[reason], distance)
            left -= steps
            has_fallen = before is None or before - last > distance.limit
            if not (rewhiten and left > 0 and has_fallen and self._may_go_on()):
                return
            again = _whitened_again(live(self._there, end.params), self._problem)
            if again is None:
                return
            before, (self._projector, latent) = last, again
            self._bare = live(self._bare, end.params)
            self._held = self._held._replace(
                latent=latent,
                best=end.best,
                state=end.best_state,
                loss=end.best_loss,
                is_validated=jnp.zeros_like(self._held.is_validated),
                first=end.first,
            )

    def _may_go_on(self) -> bool:
        """Whether another metric may help."""
        return self._reason in _GOES_ON and self._projector is not None

    def diagnosis(self) -> Diagnosis:
        """Finds out why it ended at a value that is not finite, at that point."""
        assert self._end is not None
        there = live(self._there, self._end.stumble)
        return diagnosed(there, self._problem.batch)

    def result(self, reason: StopReason | None = None) -> FitResult[Any, Any]:
        """Makes of it what a fit returns.

        **Arguments:**

        - `reason`: why it ended, unless it knows.
        """
        old: Progress = progress_of(self._trainer)
        if self._end is None:
            none = History(np.zeros(0, int), np.zeros(0, old.best_loss.dtype))
            return FitResult(self._trainer, none, reason or self._reason)
        end, projector = self._place.home((self._end, self._projector))
        losses, start = np.concatenate(self._losses), int(old.step_count)
        reason, counts = reason or self._reason, old.nan_counts
        if is_suspect(reason, self._in_vain):
            # What the solver stumbled over, it does not say.
            bad = find_bad_alone(self._bare, end.stumble, self._problem.batch)
            unexplained = reason is StopReason.NON_FINITE and not np.any(bad)
            last = jnp.asarray(start + max(len(losses) - 1, 0))
            counts = count_non_finite(counts, jnp.append(bad, unexplained), last)
            reason = StopReason.NON_FINITE if np.any(bad) else reason
        count = np.asarray(start + len(losses), old.step_count.dtype)
        progress = dataclasses.replace(
            old,
            params=end.params,
            latent=end.latent,
            opt_state=initial_opt_state(
                self._trainer.optimiser, end.params, end.latent
            ),
            best=end.best,
            best_state=end.best_state,
            best_loss=end.best_loss,
            is_validated=jnp.asarray(np.bool_(False)),
            nan_counts=counts,
            step_count=jnp.asarray(count),
            stopped=jnp.asarray(np.bool_(False)),
        )
        history = History(np.arange(start, start + len(losses)), losses)
        trainer = with_progress(self._trainer, progress, projector=projector)
        return FitResult(trainer, history, reason, self._distance)


def _whitened_again(
    trainer: AbstractTrainer, problem: Problem
) -> tuple[EigenProjector, Any] | None:
    """Whitens where a trainer is now, as `Trainer.whiten` does by default.

    Of many parameters the Jacobian, which `solve` may not have formed, is not kept.

    **Returns:**

    The projector and the latent point; `None` if the space was another.
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
        again = _whitened_without_signs(trainer, problem.batch, blocks, passes)
    return None if again is None else (again.projector, again.latent)


def _whitened_without_signs(
    trainer: AbstractTrainer, batch: Any, blocks: Any, passes: Passes
) -> AbstractTrainer | None:
    """Whitens where a Hessian curves downwards too: by how much, either way.

    See Dauphin et al., *Identifying and attacking the saddle point problem in
    high-dimensional non-convex optimization* (2014).
    """
    matrix = fisher if has_likelihood(trainer) else curvature
    found = jax.tree.map(_without_signs, matrix(trainer, batch, blocks, passes))
    make = EigenProjector.from_fisher if blocks is None else EigenProjector.from_blocks
    try:
        return reproject(trainer, make(found, trainer.params, on_null="prior"), None)
    except ValueError:
        # Neither is it finite.
        return None


def _without_signs(matrix: Array) -> Array:
    """Takes the absolute values of the eigenvalues of the scaled matrix."""
    scale = jnp.sqrt(jnp.abs(jnp.diag(matrix)))
    scale = jnp.where(scale > 0, scale, 1)
    rows, columns = scale[:, None], scale[None, :]
    values, vectors = jnp.linalg.eigh(matrix / columns / rows)
    return matmul(vectors * jnp.abs(values)[None, :], vectors.T) * columns * rows

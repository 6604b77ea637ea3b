"""`solve`: a solver of Optimistix, in rounds between which the space is whitened."""

from typing import Any, NamedTuple

from jax.sharding import Mesh

from .._boundary import boolean, refuse_program, warn
from .._curvature import Mode, checked_mode
from .._data import Whole, as_batch
from .._devices import placement, same_inputs
from .._fit import FitResult, OneTrainer
from .._policy import StopReason
from .._step import (
    AbstractTrainer,
    non_finite_error,
    scorer_of,
    warn_of_no_data,
    warn_of_suspect_data,
)
from .problem import SOLVERS, Problem, checked_solver
from .rounds import Asked, Rounds

_IN_A_PROGRAM = (
    "Within a compiled program, call `vn.unroll`; or, without bijections, minimise "
    "`trainer.objective(batch)` by `optimistix.minimise`."
)


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
        whole = Whole(batch)
        warn_of_suspect_data(whole, "batch", lambda: (trainer, batch))
        scorer = scorer_of(trainer, whole)
        trainer = OneTrainer(place).begun(trainer, whole, scorer, is_solved=True)
        # After `whiten` there is a program of the Jacobian already.
        is_shared = trainer.projector is not None
        problem = Problem(batch, encoded, rows, checked_mode(options.jac), is_shared)
        rounds = Rounds(trainer, problem, place, options.max_steps, options.rewhiten)
        try:
            asked = rounds.next()
            while isinstance(asked, Asked):
                asked = rounds.next(asked.answer())
            if asked is not None:
                raise asked
        except RuntimeError as error:
            # Most likely an `eqx.error_if`, of the solver or of the user's methods.
            if not hasattr(error, "result"):
                error.result = rounds.result(StopReason.ERROR)  # pyright: ignore
                error.add_note("The solve up to here is `.result` of this error.")
            raise
        result = rounds.result()
        if result.stop_reason is not StopReason.NON_FINITE:
            ended = lambda _: (result.trainer, batch)
            warn_of_no_data("solve", result.history.loss, ended)
            return result
        diagnosis = rounds.diagnosis()
    if trainer.nan_policy.raises:
        raise non_finite_error(result.trainer, result, diagnosis.advised_on_data)
    warn(f"`solve`: {result.stop_reason} {diagnosis}")
    return result

"""`solve`: a solver of Optimistix on what a trainer fits."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ._alike import cast_like
from ._closures import Closure
from ._data import as_batch
from ._history import History
from ._nonfinite import all_finite
from ._objective import defined, live, real_residuals, score, step_key
from ._placement import context, placement
from ._programs import program
from ._projector import EigenProjector
from ._ravel import as_parameters
from ._result import FitResult
from ._setup import initial_opt_state
from ._step import Progress, count_non_finite
from ._stop import StopReason
from ._typing import PyTree, whole_number
from ._watched import Seen, better, choose, watch

# Fewer steps than these share a program with others; the losses of more would not fit.
_LEAST_ROWS = 256
_MOST_ROWS = 2**24


def solve(
    trainer: Any, solver: Any, batch: Any, max_steps: int, mesh: Mesh | None
) -> FitResult[Any, Any]:
    """Solves for the parameters. The documentation is that of `Trainer.solve`."""
    encoded, rows = checked_solver(solver, max_steps, "max_steps")
    batch, there, place = as_batch(batch), trainer, placement(trainer, mesh)
    if place is not None:
        batch, there = place.batch(batch, "batch"), place.put(trainer)
    with context(place):
        bare, start = there._bare(), Start.of(there)
        goal = jnp.asarray(np.int32(max_steps))
        end = _run(bare, there.projector, start, batch, encoded, goal, rows)
        end = end if place is None else place.home(end)
        return _result(trainer, bare, batch, end)


def checked_solver(solver: Any, max_steps: int, argument: str) -> tuple[Closure, int]:
    """Checks a solver, and the number of its steps.

    **Returns:**

    The solver as a pytree, and how many losses to make room for.
    """
    max_steps = whole_number(max_steps, argument, least=1)
    if max_steps > _MOST_ROWS:
        raise ValueError(
            f"`{argument}` is {max_steps}, but at most {_MOST_ROWS} losses are kept. "
            "Solve several times, each time from the trainer of the last result."
        )
    _check_solver(solver)
    rows = max(_LEAST_ROWS, 1 << (max_steps - 1).bit_length())
    return Closure.encode(solver), rows


class Start(NamedTuple):
    """Where a solver begins, and the best before it did."""

    latent: PyTree
    best: PyTree
    state: PyTree
    loss: Float[Array, ""]
    is_validated: Bool[Array, ""]

    @classmethod
    def of(cls, trainer: Any) -> "Start":
        """Takes out of a trainer what `_bare` leaves out."""
        old: Progress = trainer._progress
        return cls(
            old.latent, old.best, old.best_state, old.best_loss, old.is_validated
        )


class End(NamedTuple):
    """Where a solver arrived, and how."""

    params: PyTree
    latent: PyTree
    best: PyTree
    best_state: PyTree
    best_loss: Float[Array, ""]
    step_count: Int[Array, ""]
    losses: Float[Array, " rows"]
    steps: Int[Array, ""]
    reason: Int[Array, ""]
    in_vain: Bool[Array, ""]
    stumble: PyTree
    """The parameters that the solver ended at, if they are finite."""


# As the compiled program numbers them.
REASONS = (
    StopReason.NON_FINITE,
    StopReason.DIVERGED,
    StopReason.FAILED,
    StopReason.CONVERGED,
    StopReason.MAX_STEPS,
)


def run_solver(
    trainer: Any,
    projector: EigenProjector | None,
    held: Start,
    batch: Any,
    encoded: Closure,
    goal: Int[Array, ""],
    rows: int,
) -> End:
    """Solves, within a compiled program.

    **Arguments:**

    - `trainer`: bare, so that programs are shared.
    - `projector`: of the trainer that is not.
    - `held`: its start.
    - `batch`: what the methods are given.
    - `encoded`, `rows`: the solver, and the room for its losses.
    - `goal`: how many steps it may take.
    """
    solver, latent = encoded.decode(), held.latent
    _check_class(trainer, solver)
    as_parameters(trainer.params)
    # That of the loss, but for a trainer made while `jax_enable_x64` was off.
    key, dtype = step_key(trainer), jnp.result_type(float)

    def to_params(point: PyTree) -> PyTree:
        if projector is None:
            return cast_like(point, trainer.params)
        return projector.to_params(cast_like(point, latent))

    def scored(point: PyTree, _: Any) -> tuple[Array, Seen]:
        there = live(trainer, to_params(point))
        loss = score(there, batch, key).loss.astype(dtype)
        return loss, Seen(loss, point, jnp.array(True))

    def residuals(point: PyTree, _: Any) -> tuple[Array, Seen]:
        there = live(trainer, to_params(point))
        vector = real_residuals(there, batch, key).astype(dtype)
        if defined(trainer) == ("residuals",):
            loss = 0.5 * jnp.sum(jnp.square(vector))
        else:
            loss = score(there, batch, key).loss.astype(dtype)
        return vector, Seen(loss, point, jnp.array(True))

    # Solvers mix what they are given with numbers of the default precision.
    start = trainer.params if projector is None else latent
    start = jax.tree.map(lambda leaf: leaf.astype(dtype), start)
    solver = watch(solver, goal, jnp.zeros(rows, dtype))
    options: Any = {"has_aux": True, "max_steps": None, "throw": False}
    if isinstance(solver, optx.AbstractMinimiser):
        ended = optx.minimise(scored, solver, start, **options)
    else:
        ended = optx.least_squares(residuals, solver, start, **options)
    state, stats = ended.state, ended.stats

    # A solver reports what it has left behind: the last point is yet to be scored.
    last = scored(ended.value, None)[1].loss
    best, best_loss = better(ended.value, last, state.best, state.best_loss)
    sound = all_finite((ended.value, last))
    point = choose(sound, ended.value, best)
    why = [~sound | state.is_broken, stats["diverged"], stats["failed"], stats["done"]]
    # The score of a validation is not to be compared with a loss.
    held_loss = jnp.where(held.is_validated, jnp.inf, held.loss)
    all_best, all_best_loss = better(to_params(best), best_loss, held.best, held_loss)
    is_new = all_best_loss < held_loss
    stumble = choose(all_finite(ended.value), ended.value, best)
    return End(
        params=to_params(point),
        latent=None if projector is None else cast_like(point, latent),
        best=all_best,
        best_state=choose(is_new, trainer.state, held.state),
        best_loss=all_best_loss.astype(held.loss.dtype),
        step_count=trainer.step_count + state.steps,
        losses=state.losses,
        steps=state.steps,
        reason=jnp.argmax(jnp.stack([*why, jnp.array(True)])),
        in_vain=~(best_loss < state.losses[0]),
        stumble=to_params(stumble),
    )


_run = program(run_solver)


def _result(trainer: Any, bare: Any, batch: Any, end: End) -> FitResult[Any, Any]:
    """Turns the end of a solve into what a fit returns."""
    old: Progress = trainer._progress
    start, losses, steps, reason, in_vain = jax.device_get(
        (old.step_count, end.losses, end.steps, end.reason, end.in_vain)
    )
    reason, counts = REASONS[reason], old.nan_counts
    if is_suspect(reason, in_vain):
        # What the solver stumbled over, it does not say.
        bad = _find_bad(bare, end.stumble, batch)
        unexplained = reason is StopReason.NON_FINITE and not np.any(bad)
        last = jnp.asarray(start + max(steps - 1, 0))
        counts = count_non_finite(counts, jnp.append(bad, unexplained), last)
        reason = StopReason.NON_FINITE if np.any(bad) else reason
    progress = dataclasses.replace(
        old,
        params=end.params,
        latent=end.latent,
        opt_state=initial_opt_state(trainer.optimiser, end.params, end.latent),
        best=end.best,
        best_state=end.best_state,
        best_loss=end.best_loss,
        is_validated=jnp.asarray(np.bool_(False)),
        nan_counts=counts,
        step_count=end.step_count,
        stopped=jnp.asarray(np.bool_(False)),
    )
    history = History(np.arange(start, start + steps), losses[:steps])
    result = FitResult(trainer._at(progress), history, reason)
    if reason is StopReason.NON_FINITE and trainer.nan_policy.raises:
        raise result.trainer._non_finite_error(result)
    return result


def is_suspect(reason: StopReason, in_vain: Any) -> bool:
    """Whether a value that is not finite may be why a solver ended so."""
    if reason is StopReason.MAX_STEPS:
        return bool(in_vain)
    return reason is not StopReason.CONVERGED


def find_bad(trainer: Any, params: PyTree, batch: Any) -> Bool[Array, " columns"]:
    """Tells whether the loss, and the gradient of each leaf, is not finite."""
    key = step_key(trainer)

    def scored(params: PyTree) -> Array:
        there = live(trainer, params)
        return score(there, batch, key).loss

    loss, grads = jax.value_and_grad(scored)(params)
    return jnp.stack([~all_finite(x) for x in (loss, *jax.tree.leaves(grads))])


_find_bad = program(find_bad)


def _check_solver(solver: Any) -> None:
    is_solver = isinstance(
        solver, optx.AbstractMinimiser | optx.AbstractLeastSquaresSolver
    )
    if not is_solver:
        told = solver if isinstance(solver, str | type) else type(solver)
        raise TypeError(
            f"`solver` is {told!r}, not a minimiser or a least-squares solver of "
            "Optimistix. Give one, such as `optx.BFGS(rtol=1e-8, atol=1e-8)` or "
            "`optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)`; an Optax transformation "
            "is for `fit`."
        )


def _check_class(trainer: Any, solver: Any) -> None:
    """Checks what depends on classes alone, so that it is enough to do it once."""
    name = type(trainer).__name__
    is_minimiser = isinstance(solver, optx.AbstractMinimiser)
    if not is_minimiser and "residuals" not in defined(trainer):
        raise TypeError(
            f"`solver` is a {type(solver).__name__}, which minimises a sum of squares, "
            f"but `{name}` does not define `residuals`. Define it, or use a minimiser, "
            "such as `optx.BFGS(rtol=1e-8, atol=1e-8)`."
        )
    for hook in ("transform_grads", "constrain"):
        if trainer._overrides(hook):
            raise ValueError(
                f"`{name}` defines `{hook}`, which a solver of Optimistix knows "
                "nothing of. Use `fit`; or write the constraint into the model, for "
                "instance with the logarithm of a positive parameter."
            )

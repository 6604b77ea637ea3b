"""The program of `solve`: a solver of Optimistix on what a trainer fits."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from .._boundary import PyTree, whole_number
from .._closure import Closure
from .._curvature import Mode, Subject, choose_mode, gradient, traced
from .._minimum import Local, has_jacobian, measure, minimised, what_falls
from .._policy import StopReason, all_finite
from .._program import program
from .._projection import EigenProjector
from .._step import (
    AbstractTrainer,
    Progress,
    bijections_of,
    defined,
    from_free_coordinates,
    live,
    overrides,
    priors_of,
    progress_of,
    pushed,
    real_residuals,
    score,
    step_key,
    warn_of_sums,
)
from .._tree import as_parameters, cast_like, choose, ravel, ravel_size, unravel
from .box import Box
from .tracked_solver import Seen, better, joins, keeps_score, track

# The least number of losses to make room for, so that short solves share a program; and
# the most.
_LEAST_ROWS = 256
_MOST_ROWS = 2**24


# The reasons for which another round is of no use.
IS_OVER = (StopReason.NON_FINITE, StopReason.MAX_STEPS)


class Problem(NamedTuple):
    """What is solved, without the point to start from.

    `encoded` is the solver, and `rows` the room for its losses. `jac` is the mode of
    differentiation, `None` for the one that works. If its Jacobian `is_shared`, it is
    left to `derive`, whose program other methods share.
    """

    batch: Any
    encoded: Closure
    rows: int
    jac: Mode | None
    is_shared: bool = False


SOLVERS = optx.AbstractMinimiser, optx.AbstractLeastSquaresSolver
Solver = (
    optx.AbstractMinimiser[Any, Any, Any]
    | optx.AbstractLeastSquaresSolver[Any, Any, Any, Any]
)


def checked_solver(solver: Any, max_steps: int, argument: str) -> tuple[Closure, int]:
    """Checks a solver, and the number of its steps.

    Returns the solver as a pytree, and how many losses to make room for.
    """
    max_steps = whole_number(max_steps, argument, least=1)
    if max_steps > _MOST_ROWS:
        raise ValueError(
            f"`{argument}` is {max_steps}, but at most {_MOST_ROWS} losses are kept. "
            "Solve several times, each time from the trainer of the last result."
        )
    if isinstance(solver, type) and issubclass(solver, SOLVERS):
        raise TypeError(
            f"`solver` is the class `{solver.__name__}`. Give an instance: "
            f"`{solver.__name__}(rtol=1e-8, atol=1e-8)`."
        )
    if not isinstance(solver, SOLVERS):
        raise TypeError(
            f"`solver` is of type `{type(solver).__name__}`, not a minimiser or a "
            "least-squares solver of Optimistix. Give one, such as "
            "`optx.BFGS(rtol=1e-8, atol=1e-8)` or "
            "`optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)`; an Optax transformation "
            "is for `fit`."
        )
    inner: Any = solver
    while hasattr(inner, "solver"):  # such as `optx.BestSoFarMinimiser`
        inner = inner.solver
    if isinstance(inner, optx.GoldenSearch):
        raise TypeError(
            "`solver` is `GoldenSearch`, which looks for the minimum of one number "
            "between two ends, and has no start. Give another minimiser, such as "
            "`optx.BFGS(rtol=1e-8, atol=1e-8)`, and the ends as `bounds=` of the "
            "trainer."
        )
    rows = max(_LEAST_ROWS, 1 << (max_steps - 1).bit_length())
    return Closure.encode(solver), rows


class Start(NamedTuple):
    """Where a solver begins, and the best before it did."""

    latent: PyTree
    best: PyTree
    state: PyTree
    loss: Float[Array, ""]
    first: Float[Array, ""]
    """The loss where the first of several rounds began, NaN in the first."""

    @classmethod
    def of(cls, trainer: AbstractTrainer) -> "Start":
        """Takes out of a trainer what `stripped` leaves out."""
        return cls.at(progress_of(trainer))

    @classmethod
    def at(cls, old: Progress) -> "Start":
        # NumPy compiles nothing.
        none = np.full(old.best_loss.shape, np.nan, old.best_loss.dtype)
        first = jax.device_put(none)
        return cls(old.latent, old.best, old.best_state, old.best_loss, first)


class End(NamedTuple):
    """Where a solver ended, and how; for many, with a row for each."""

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
    first: Float[Array, ""]
    last: Float[Array, ""]
    """The loss at the beginning, and at the end."""
    local: Local | None
    """What the distance to the minimum is computed from; `None` for a Jacobian that is
    not computed yet."""
    is_settled: Bool[Array, ""]
    """Whether it is known which parameters are held at their bounds."""


def progress_at(
    end: End, old: Progress, opt_state: PyTree, nan_counts: Array
) -> Progress:
    """Returns the progress of a trainer whose solver has ended."""
    no = jax.device_put(np.zeros(old.stopped.shape, bool))
    return dataclasses.replace(
        old,
        params=end.params,
        latent=end.latent,
        opt_state=opt_state,
        best=end.best,
        best_state=end.best_state,
        best_loss=end.best_loss,
        nan_counts=nan_counts,
        step_count=end.step_count,
        stopped=no,
    )


def in_parameters(end: End, trainer: AbstractTrainer) -> End:
    """Returns the end of a solve in the parameters of the trainer that it began from.

    The solver moved the free coordinates of the trainer's bijections, if it has any.
    """
    return end if bijections_of(trainer) is None else _in_parameters(end, trainer)


@program
def _in_parameters(end: End, trainer: AbstractTrainer) -> End:
    old = progress_of(trainer)
    params, latent = from_free_coordinates(trainer, end.params, end.latent)
    forward = lambda free: from_free_coordinates(trainer, free, None)[0]
    is_new = end.best_loss < old.best_loss
    return end._replace(
        params=params,
        latent=latent,
        best=choose(is_new, forward(end.best), old.best),
        stumble=forward(end.stumble),
    )


# As the compiled program numbers them.
REASONS = (
    StopReason.NON_FINITE,
    StopReason.DIVERGED,
    StopReason.FAILED,
    StopReason.CONVERGED,
    StopReason.MAX_STEPS,
)


def run_solver(
    trainer: AbstractTrainer,
    projector: EigenProjector | None,
    held: Start,
    problem: Problem,
    goal: Int[Array, ""],
) -> End:
    """Solves, within a compiled program, with at most `goal` steps.

    The trainer is stripped, so that programs are shared; `projector` and `held` are the
    projector and the start of the whole trainer.
    """
    batch, encoded, rows, jac, is_shared = problem
    solver, latent, name = encoded.decode(), held.latent, type(trainer).__name__
    _check_class(trainer, solver)
    as_parameters(trainer.params)
    warn_of_sums(trainer, batch)
    # The dtype of the loss, unless the trainer was made while `jax_enable_x64` was off.
    key, dtype = step_key(trainer), jnp.result_type(float)

    kind = what_falls(trainer, is_least_squares(solver))
    value = minimised(trainer, batch, kind)
    box = Box.around(trainer, value)

    # Solvers mix their arguments with numbers of the default precision.
    inner = trainer.params if projector is None else latent
    start = jax.tree.map(lambda leaf: leaf.astype(dtype), inner)
    is_joined = joins(solver, start)
    start = ravel(start) if is_joined else start

    def apart(point: PyTree) -> PyTree:
        return unravel(point, inner) if is_joined else cast_like(point, inner)

    def to_free(point: PyTree) -> PyTree:
        free = apart(point)
        return free if projector is None else projector.to_params(free)

    def to_params(point: PyTree) -> PyTree:
        return to_free(point) if box is None else box.within(to_free(point))

    def seen(loss: Array, point: PyTree) -> Seen:
        # Under `jax.disable_jit` a constant would come back as a Python boolean.
        return Seen(loss, point, jnp.ones_like(loss, bool))

    def scored(point: PyTree, _: Any) -> tuple[Array, Seen]:
        at_point = live(trainer, to_params(point))
        loss = score(at_point, batch, key).loss.astype(dtype)
        return loss, seen(loss, point)

    def residuals(point: PyTree, _: Any) -> tuple[Array, Seen]:
        at_point = live(trainer, to_params(point))
        vector = real_residuals(at_point, batch, key).astype(dtype)
        if defined(trainer) == ("residuals",):
            loss = 0.5 * jnp.sum(jnp.square(vector))
        else:
            loss = score(at_point, batch, key).loss.astype(dtype)
        if box is not None:
            vector = jnp.concatenate([vector, box.rows(to_free(point)).astype(dtype)])
        return vector, seen(loss, point)

    own = lambda fn: traced(lambda point: fn(point, None)[0], start)
    if is_least_squares(solver):
        fn, subject = residuals, Subject(f"`residuals` of `{name}`", jac)
        options = {"jac": choose_mode(own(fn), start, subject)}
    else:
        fn, subject = scored, Subject(f"The loss of `{name}`", jac)
        mode = choose_mode(own(fn), start, subject, ("bwd", "fwd"))
        options = {"autodiff_mode": mode}
    room = jnp.zeros(rows, dtype)
    ended, is_done, result = track(fn, solver, start, options, room, goal)

    # A solver reports the points that it has left, and not yet the last one.
    if keeps_score(solver):
        last = ended.state.aux.loss
    else:
        last = scored(ended.point, None)[1].loss
    best, best_loss = better(ended.point, last, ended.best, ended.best_loss)
    is_finite = all_finite((ended.point, last))
    point = choose(is_finite, ended.point, best)
    params, best_params = to_params(ended.point), to_params(best)
    at_end = live(trainer, choose(is_finite, params, best_params))
    why = [
        ~is_finite | ended.is_broken,
        result == optx.RESULTS.nonlinear_divergence,
        result != optx.RESULTS.successful,
        is_done,
    ]
    all_best, all_best_loss = better(best_params, best_loss, held.best, held.loss)
    is_new = all_best_loss < held.loss
    first = jnp.where(jnp.isnan(held.first), ended.losses[0], held.first)
    last = jnp.where(is_finite, last, best_loss)
    local, held_then = None, pushed(at_end, value)
    is_left = is_shared and box is None and kind == "residuals"
    if is_left:
        vector = jax.eval_shape(lambda: real_residuals(at_end, batch, key))
        is_left = has_jacobian(vector.size, ravel_size(trainer.params))
    if not is_left:
        local = measure(at_end, projector, batch, kind, first - last, held_then)
    end_params, is_settled = at_end.params, jnp.array(True)
    end_latent = None if projector is None else apart(point)
    if box is not None:
        args = to_free(point), end_params, held_then, local, value
        end_params, is_settled = box.ended(*args)
        if projector is not None:
            end_latent = cast_like(projector.to_latent(end_params), latent)
    return End(
        params=end_params,
        latent=end_latent,
        best=all_best,
        best_state=choose(is_new, trainer.state, held.state),
        best_loss=all_best_loss.astype(held.loss.dtype),
        step_count=trainer.step_count + ended.steps,
        losses=ended.losses,
        steps=ended.steps,
        reason=jnp.argmax(jnp.stack([*why, jnp.array(True)])),
        in_vain=~(best_loss < ended.losses[0]),
        stumble=choose(all_finite(ended.point), params, best_params),
        first=first,
        last=last,
        local=local,
        is_settled=is_settled,
    )


run = program(run_solver, in_order=True)


def is_suspect(reason: StopReason, in_vain: Any) -> bool:
    """Whether non-finite values may be why a solver ended so."""
    if reason is StopReason.MAX_STEPS:
        return bool(in_vain)
    return reason not in (
        StopReason.CONVERGED,
        StopReason.STALLED,
        StopReason.NO_MINIMUM,
        StopReason.INTERRUPTED,
    )


def find_bad(
    trainer: AbstractTrainer, params: PyTree, batch: Any
) -> Bool[Array, " columns"]:
    """Returns whether the loss, and the gradient of each leaf, is not finite."""
    key = step_key(trainer)

    def at_flat(flat: Array) -> Array:
        return score(live(trainer, unravel(flat, params)), batch, key).loss

    flat = ravel(params)
    scored = traced(at_flat, flat)
    try:
        slope = gradient(scored, flat, Subject("", is_quiet=True))
    except TypeError:
        # Without derivatives only the loss can be checked.
        slope = jnp.zeros_like(flat)
    grads = jax.tree.leaves(unravel(slope, params))
    return jnp.stack([~all_finite(x) for x in (scored(flat), *grads)])


find_bad_alone = program(find_bad)


def is_least_squares(solver: Any) -> bool:
    """Whether a solver minimises the sum of squared residuals."""
    return isinstance(solver, optx.AbstractLeastSquaresSolver)


def require_squares(trainer: AbstractTrainer, solver: Any) -> None:
    """Refuses a least-squares solver where a prior is no sum of squares."""
    priors = priors_of(trainer)
    if is_least_squares(solver) and priors is not None and priors.others:
        path, prior = next(iter(priors.others.items()))
        raise ValueError(
            f"`solver` is a {type(solver).__name__}, which minimises a sum of squares, "
            f"and the prior of {path!r} is no `vn.Normal`, which has a residual for "
            f"each element, but a {type(prior.decode()).__name__}. Use a minimiser, "
            "such as `optx.BFGS(1e-8, 1e-8)`, which takes any prior."
        )


def _check_class(trainer: AbstractTrainer, solver: Any) -> None:
    """Checks what depends on classes alone, once for each program."""
    name = type(trainer).__name__
    if is_least_squares(solver) and "residuals" not in defined(trainer):
        raise TypeError(
            f"`solver` is a {type(solver).__name__}, which minimises a sum of squares, "
            f"but `{name}` does not define `residuals`. Define it, or use a minimiser, "
            "such as `optx.BFGS(rtol=1e-8, atol=1e-8)`."
        )
    require_squares(trainer, solver)
    for hook in ("transform_grads", "constrain"):
        if overrides(trainer, hook):
            raise ValueError(
                f"`{name}` defines `{hook}`, which solvers of Optimistix do not "
                "support. Use `fit`; or write the constraint into the model, for "
                "instance with the logarithm of a positive parameter."
            )

"""A solver of Optimistix that keeps what a fit keeps: the losses and the best."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from .._boundary import PyTree
from .._policy import all_finite
from .._tree import choose

_SCORED = (optx.AbstractGaussNewton, optx.AbstractQuasiNewton)


def keeps_score(solver: Any) -> bool:
    """Whether a solver evaluates its first point, and keeps what it saw at the last.

    Those of these families do: their state has the auxiliary output of the point they
    are at. Their search must accept the first point, as those of Optimistix do. Each
    evaluation beside the solver's own takes as long to compile.
    """
    is_own = lambda part: type(part).__module__.startswith("optimistix.")
    return isinstance(solver, _SCORED) and is_own(solver) and is_own(solver.search)


class Seen(NamedTuple):
    """What a solved function returns beside its value.

    It names the point, as solvers differ in which evaluation they report when; and
    `is_seen`, as they report zeros before the first.
    """

    loss: Float[Array, ""]
    point: PyTree
    is_seen: Bool[Array, ""]


class TrackedState(eqx.Module):
    """The state of a solver, with the losses and the best point so far."""

    inner: Any
    steps: Int[Array, ""]
    losses: Float[Array, " rows"]
    best: PyTree
    best_loss: Float[Array, ""]
    is_broken: Bool[Array, ""]


class _Tracked(optx.AbstractIterativeSolver):
    """Takes the steps of another solver, up to the count `goal`.

    The goal is an array, so that one program serves any number of steps. The auxiliary
    output of the function must be a `Seen`.
    """

    solver: Any
    goal: Int[Array, ""]
    losses: Float[Array, " rows"]
    rtol: float | int
    atol: float | int
    norm: Callable[[PyTree], Array]

    def init(
        self,
        fn: Any,
        y: PyTree,
        args: Any,
        options: dict[str, Any],
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> TrackedState:
        best_loss = jnp.full((), jnp.inf, self.losses.dtype)
        # Not every solver looks at its first point before it moves on.
        if not keeps_score(self.solver):
            _, seen = fn(y, args)
            _, best_loss = better(y, seen.loss, y, best_loss)
        return TrackedState(
            inner=self.solver.init(fn, y, args, options, f_struct, aux_struct, tags),
            steps=jnp.zeros_like(self.goal),
            losses=self.losses,
            best=y,
            best_loss=best_loss,
            is_broken=jnp.array(False),
        )

    def step(
        self,
        fn: Any,
        y: PyTree,
        args: Any,
        options: dict[str, Any],
        state: TrackedState,
        tags: frozenset[object],
    ) -> tuple[PyTree, TrackedState, Seen]:
        new_y, inner, seen = self.solver.step(fn, y, args, options, state.inner, tags)
        loss = jnp.where(seen.is_seen, seen.loss, state.best_loss)
        best, best_loss = better(seen.point, loss, state.best, state.best_loss)
        # A non-finite trial point is harmless; a non-finite iterate is not.
        is_iterate = eqx.tree_equal(seen.point, y) | eqx.tree_equal(seen.point, new_y)
        is_lost = seen.is_seen & is_iterate & ~jnp.isfinite(loss)
        new_state = TrackedState(
            inner=inner,
            steps=state.steps + 1,
            losses=state.losses.at[state.steps].set(loss),
            best=best,
            best_loss=best_loss,
            is_broken=is_lost | ~all_finite(new_y),
        )
        return new_y, new_state, seen

    def terminate(
        self,
        fn: Any,
        y: PyTree,
        args: Any,
        options: dict[str, Any],
        state: TrackedState,
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        # `postprocess` reports failure: some versions go on in spite of it.
        done, result = self.solver.terminate(fn, y, args, options, state.inner, tags)
        is_over = state.is_broken | (state.steps >= self.goal)
        failed = result != optx.RESULTS.successful
        return done | failed | is_over, optx.RESULTS.successful

    def postprocess(
        self,
        fn: Any,
        y: PyTree,
        aux: Seen,
        args: Any,
        options: dict[str, Any],
        state: TrackedState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[PyTree, Seen, dict[str, Any]]:
        inner = state.inner
        done, own = self.solver.terminate(fn, y, args, options, inner, tags)
        y, aux, _ = self.solver.postprocess(
            fn, y, aux, args, options, inner, tags, result
        )
        failed = own != optx.RESULTS.successful
        diverged = own == optx.RESULTS.nonlinear_divergence
        return y, aux, {"done": done, "failed": failed, "diverged": diverged}


class TrackedMinimiser(_Tracked, optx.AbstractMinimiser):
    """A minimiser that keeps its losses and its best point."""


class TrackedLeastSquares(_Tracked, optx.AbstractLeastSquaresSolver):
    """A least-squares solver that keeps its losses and its best point."""


def tracked(
    solver: Any, goal: Int[Array, ""], losses: Float[Array, " rows"]
) -> TrackedMinimiser | TrackedLeastSquares:
    """Wraps a solver, to take at most `goal` steps."""
    is_minimiser = isinstance(solver, optx.AbstractMinimiser)
    kind = TrackedMinimiser if is_minimiser else TrackedLeastSquares
    return kind(
        solver=solver,
        goal=goal,
        losses=losses,
        rtol=solver.rtol,
        atol=solver.atol,
        norm=solver.norm,
    )


def better(
    point: PyTree, loss: Float[Array, ""], best: PyTree, best_loss: Float[Array, ""]
) -> tuple[PyTree, Float[Array, ""]]:
    """Returns the point of the lower loss, and the loss, if both are finite."""
    is_better = (loss < best_loss) & all_finite((loss, point))
    return choose(is_better, (point, loss), (best, best_loss))

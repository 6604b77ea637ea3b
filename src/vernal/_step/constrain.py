"""`constrain` where a projector or a preconditioner couples the parameters."""

import functools as ft
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Int

from .._boundary import PyTree, warn
from .._closure import Closure
from .._constraints import Bijections
from .._pickling import content_of
from .._projection import EigenProjector, Unchanged
from .._tree import by_path, cast_like, paths, require_alike
from .abstract_trainer import (
    AbstractTrainer,
    bounds_of,
    in_free_coordinates,
    overrides,
    template_of,
)
from .objective import live

Clip = Callable[[PyTree], PyTree]
"""A function from parameters to constrained parameters."""

# For this many iterations all elements on the wrong side of a bound change sides at
# once. After that only one does, which always ends.
_TOGETHER = 10
_MOST_CHANGES = 100


def clip_of(trainer: AbstractTrainer, given: str) -> Clip:
    """Returns a trainer's `constrain`, and its bounds, as a function of the parameters.

    What `constrain` returns is checked, and is moved to the bounds if it is outside.
    """
    bounds = bounds_of(trainer)
    if not overrides(trainer, "constrain") and bounds is not None:
        return bounds.clip

    def clip(params: PyTree) -> PyTree:
        template = template_of(trainer)
        model = template.join(params)
        constrained = live(trainer, params).constrain(model)
        require_alike(constrained, model, "what `constrain` returns", given)
        new = template.trained(constrained)
        if template.bijections is not None:
            new = template.bijections.moved(params, template.trained(model), new)
        new = cast_like(new, params)
        return new if bounds is None else bounds.clip(new)

    return clip


def project(
    clip: Clip, projector: EigenProjector | None, params: PyTree
) -> tuple[PyTree, Bool[Array, ""]]:
    r"""Projects parameters onto the bounds of `clip`, and says whether it moves them.

    In the metric $F$ of the projector, `None` if nothing is coupled: the solution of

    $$\min_z\ (z - x)^\top F (z - x), \quad z \text{ within the bounds},$$

    which is $z = x + F^{-1} \mu$. The multipliers $\mu$ are zero where $z$ is within
    the bounds, and push inwards where it is on a bound. Principal pivoting finds the
    elements on a bound. See Júdice and Pires, *A block principal pivoting algorithm for
    large-scale strictly monotone linear complementarity problems*, Computers &
    Operations Research 21 (1994).
    """
    clipped = clip(params)
    active = jax.tree.map(jnp.not_equal, clipped, params)
    is_clipped = ft.reduce(jnp.logical_or, map(jnp.any, jax.tree.leaves(active)))
    if projector is None:
        return clipped, is_clipped
    # Of each element: any positive number will do.
    scale = lambda e: jnp.where(jnp.isfinite(e) & (e > 0), e, jnp.ones_like(e))
    scales = jax.tree.map(scale, projector.standard_errors())
    masked = lambda tree, mask: jax.tree.map(
        lambda x, m: jnp.where(m, x, 0), tree, mask
    )
    over = optax.tree.div

    def solved(active: PyTree, bounds: PyTree) -> tuple[PyTree, PyTree]:
        """Holds the active elements at their bounds, and moves the others with them."""

        def product(scaled: PyTree) -> PyTree:
            moved = projector.precondition(over(masked(scaled, active), scales))
            return masked(over(moved, scales), active)

        gap = optax.tree.sub(bounds, params)
        tol = 16 * max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params))
        scaled, _ = jax.scipy.sparse.linalg.cg(
            product, masked(over(gap, scales), active), tol=tol, maxiter=200
        )
        forces = over(masked(scaled, active), scales)
        free = jax.tree.map(jnp.add, params, projector.precondition(forces))
        held = jax.tree.map(jnp.where, active, bounds, free)
        return cast_like(held, params), forces

    def body(state: _Pivoting) -> _Pivoting:
        point, forces = solved(state.active, state.bounds)
        # An element stays on its bound if the multiplier pushes inwards.
        # Twice, since the square of a scale may overflow.
        pull = optax.tree.mul(optax.tree.mul(forces, scales), scales)
        probe = cast_like(optax.tree.sub(point, pull), params)
        bounds = clip(probe)
        # An element that leaves its bound becomes free before it can meet the other.
        outside = jax.tree.map(
            lambda new, at, old, is_on: (new != at) & (~is_on | (new == old)),
            *(bounds, probe, state.bounds, state.active),
        )
        changed = jax.tree.map(jnp.not_equal, outside, state.active)
        is_over = ~ft.reduce(jnp.logical_or, map(jnp.any, jax.tree.leaves(changed)))
        is_early = state.changes < _TOGETHER
        pick = lambda all_of_them, one: jnp.where(is_early, all_of_them, one)
        flip = jax.tree.map(pick, changed, _first_alone(changed))
        return _Pivoting(
            jax.tree.map(jnp.where, flip, outside, state.active),
            jax.tree.map(jnp.where, flip, bounds, state.bounds),
            jax.tree.map(jnp.where, flip, probe, state.probe),
            is_over,
            state.changes + 1,
        )

    start = _Pivoting(active, clipped, params, ~is_clipped, jnp.asarray(0))
    goes_on = lambda state: ~state.is_over & (state.changes < _MOST_CHANGES)
    # The set of active elements has no derivative; the point has one.
    fixed = lax.stop_gradient
    found = lax.while_loop(goes_on, lambda s: fixed(body(fixed(s))), fixed(start))
    point, _ = solved(found.active, clip(lax.stop_gradient(found.probe)))
    return clip(point), is_clipped


class _Pivoting(NamedTuple):
    active: PyTree
    bounds: PyTree
    probe: PyTree
    is_over: Bool[Array, ""]
    changes: Int[Array, ""]


def _first_alone(flags: PyTree) -> PyTree:
    """Keeps only the first flag that is set."""
    flat, unravel = ravel_pytree(flags)
    return unravel(flat & (jnp.arange(flat.size) == jnp.argmax(flat)))


def coupled(trainer: AbstractTrainer, clip: Clip) -> EigenProjector | None:
    """Returns the projector in whose metric `clip` must be a projection, if any.

    Refuses a `precondition` that couples what `constrain` changes.
    """
    metrics = preconditioners(trainer.optimiser)
    if trainer.projector is None and not metrics:
        return None
    touched = _touched(clip, trainer.params)
    name = "`constrain`" if overrides(trainer, "constrain") else "`bounds`"
    for projector in metrics:
        if names := sorted(touched & _mixed(projector)):
            raise ValueError(
                f"{name} changes {', '.join(map(repr, names[:5]))}, and "
                "`precondition` mixes that with other elements: the fit would not end "
                "at the best point that the constraint allows. Give the projector to "
                "the trainer instead, as `projector=`, where `constrain` is a "
                "projection in its metric; or make it with "
                "`EigenProjector.from_blocks`, where a constrained number has a block "
                "of its own; or write the constraint into the model."
            )
    projector = trainer.projector
    if projector is None or not touched & _mixed(projector):
        return None
    return projector


def check_coordinates(optimiser: Any, bijections: Bijections | None) -> None:
    """Refuses a `precondition` in other coordinates than those that a fit moves.

    These are free coordinates where there is a bijection, and parameters elsewhere.
    """
    free = () if bijections is None else bijections.maps
    for projector in preconditioners(optimiser):
        moved = [name for name in paths(projector.origin) if name in free]
        if moved and not projector.is_of_free:
            raise ValueError(
                "`optimiser` has a `precondition` by a projector of the parameters, "
                f"and the fit moves the free coordinates of {moved[0]!r}, which has a "
                "bijection in `bounds`. Take `trainer.whiten(batch).projector`, of a "
                "trainer with these `bounds`."
            )
        if projector.is_of_free and not free:
            raise ValueError(
                "`optimiser` has a `precondition` by a projector of free coordinates, "
                "made by a trainer with a bijection in `bounds`, and this one has "
                "none. Take `trainer.whiten(batch).projector`, of a trainer without it."
            )


def preconditioners(optimiser: Any) -> list[EigenProjector]:
    """Returns the projectors of the `precondition`s in an optimiser."""
    found: list[EigenProjector] = []
    waiting, seen = [optimiser], {}
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        kind = type(part)
        if kind is EigenProjector:
            found.append(part)
        elif kind is Closure:
            waiting.append(part.decode())
        elif kind is types.FunctionType:
            for cell in part.__closure__ or ():
                waiting += content_of(cell)
        elif kind is types.MethodType:
            waiting.append(part.__self__)
        elif kind is ft.partial:
            waiting += [part.func, *part.args]
        elif issubclass(kind, eqx.Module | dict):
            waiting += (part if issubclass(kind, dict) else vars(part)).values()
        elif issubclass(kind, tuple | list):
            waiting += part
    return found


# The states of Optax's transformations that move an element by the gradients of others,
# and the field that has an array for each parameter which they move so.
_MIXING = {
    "ScaleByLBFGSState": ("an L-BFGS", "params"),
    "MuonState": ("Muon", "mu"),
    "GaLoreState": ("GaLore", "projector"),
}


def refuse_mixing(trainer: AbstractTrainer) -> None:
    """Refuses an optimiser that moves what is free together with what is held."""
    if (bounds := bounds_of(trainer)) is None:
        return
    bounded = bounds.low.keys() | bounds.high.keys()
    is_mixing = lambda node: type(node).__name__ in _MIXING
    for node in jax.tree.leaves(trainer.opt_state, is_leaf=is_mixing):
        if not is_mixing(node):
            continue
        what, field = _MIXING[type(node).__name__]
        moved = by_path(getattr(node, field)).items()
        names = {name for name, leaf in moved if leaf.size}
        # An L-BFGS may be in a latent space, which has no names.
        if what == "an L-BFGS" or names & bounded:
            raise ValueError(
                f"`optimiser` is {what}, which knows of no `bounds`: it would not end "
                "at the best point within them. Use a solver, "
                "`trainer.solve(optx.LBFGS(1e-8, 1e-8), batch)`, or an optimiser such "
                "as Adam for what has bounds."
            )


def warn_of_line_search(trainer: AbstractTrainer) -> None:
    """Warns of an optimiser that does not know what `constrain` does of its steps."""
    kinds = "ScaleByLBFGSState", "Linesearch"
    is_one = lambda node: any(kind in type(node).__name__ for kind in kinds)
    nodes = jax.tree.leaves(trainer.opt_state, is_leaf=is_one)
    if overrides(trainer, "constrain") and any(map(is_one, nodes)):
        warn(
            "`constrain` changes the parameters after each update, which an L-BFGS or "
            "a line search in `optimiser` does not know of: the fit may stop short of "
            "the best point. For limits give `bounds` and use a solver, "
            "`trainer.solve(optx.BFGS(1e-8, 1e-8), batch)`; for the rest an optimiser "
            "such as Adam."
        )


def check_elementwise(
    trainer: AbstractTrainer, template: Callable[[], AbstractTrainer] | None = None
) -> None:
    """Refuses a `constrain` that cannot be projected, before a fit begins.

    If a projector couples what it changes, it must clip each element to an interval.
    It is tried at some points around the current one. Of many trainers, `template`
    returns one.
    """
    is_coupled = trainer.projector is not None and overrides(trainer, "constrain")
    if not is_coupled or isinstance(trainer.step_count, Tracer):
        return
    trainer = in_free_coordinates(trainer if template is None else template())
    clip = clip_of(trainer, "what it was given")
    if coupled(trainer, clip) is None:
        return
    flat, unravel = ravel_pytree(trainer.params)
    random = np.random.default_rng(0)
    spread = 2 * (1 + np.abs(flat))
    # On both sides of zero, and not at round numbers.
    places = _PLACES + random.uniform(-0.2, 0.2, (len(_PLACES), flat.size))
    points = np.asarray(np.asarray(flat) + np.asarray(spread) * places, flat.dtype)
    image = lambda x: np.asarray(ravel_pytree(clip(unravel(jnp.asarray(x))))[0])
    images = np.stack([image(point) for point in points])
    is_same = lambda a, b: np.allclose(a, b, rtol=1e-5, equal_nan=True)
    # The indices of any two elements differ in at least one bit.
    for bit in range(max(flat.size - 1, 1).bit_length()):
        mask = (np.arange(flat.size) >> bit) % 2 == 0
        mixed = image(np.where(mask, points[0], points[-1]))
        if not is_same(mixed, np.where(mask, images[0], images[-1])):
            raise ValueError(
                "`constrain` mixes elements of the parameters, as a normalisation "
                f"does, {_REFUSAL}"
            )
    # Clipping to an interval keeps the order, stretches nothing, and does nothing the
    # second time.
    rises, steps = np.diff(images, axis=0), np.diff(points, axis=0)
    is_other = (rises < 0) | (rises > steps * (1 + 1e-3))
    if is_other.any() or not is_same(image(images[0]), images[0]):
        raise ValueError(
            "`constrain` does more than clip, as a reflection, a wrapping or a "
            f"shrinkage does, {_REFUSAL}"
        )


# The points at which a constraint is tried, in units of the parameters.
_PLACES = np.array([-3.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0])[:, None]

_REFUSAL = (
    "and `projector` couples them: the fit would not end at the best point that the "
    "constraint allows. Beside a projector, `constrain` may clip each element by "
    "itself, to an interval. Write the constraint into the model, or use "
    "`EigenProjector.from_blocks` without a block for what is constrained."
)


def _touched(clip: Clip, params: PyTree) -> set[str]:
    """Returns the names of the parameters that `clip` may change."""
    program = jax.make_jaxpr(lambda leaves: jax.tree.leaves(clip(unflatten(leaves))))
    unflatten = jax.tree.structure(params).unflatten
    jaxpr = program(jax.tree.leaves(params)).jaxpr
    pairs = zip(paths(params), jaxpr.invars, jaxpr.outvars, strict=True)
    return {name for name, before, after in pairs if before is not after}


def _mixed(projector: EigenProjector) -> set[str]:
    """Returns the names of the parameters that the projector couples to others."""
    names = paths(projector.origin)
    pairs = zip(projector.blocks, projector.whitenings, strict=True)
    return {
        names[index]
        for block, whitening in pairs
        if not isinstance(whitening, Unchanged) and whitening.latent_size > 1
        for index in block
    }

"""Whether a trainer can be used: one, of this precision, whole, and at one point."""

import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import REMEDY, PyTree, is_traced, is_wide, is_x64_on
from .._constraints import Bijections
from .._optimiser import ParamOptimiserState
from .._program import Version, program, version_of_flat
from .._projection import EigenProjector
from .._tree import by_path, is_alike, is_inexact, shape_and_dtype
from .abstract_trainer import (
    AbstractTrainer,
    bijections_of,
    bounds_of,
    is_made,
    member_axes,
    note_made,
    priors_of,
    progress_of,
    template_of,
    to_params,
)
from .construct import check_class, initial_progress
from .opt_state import fits
from .progress import Progress


def require_one(trainer: AbstractTrainer, name: str) -> None:
    """Refuses a stacked trainer in what is for one, and one that cannot be used."""
    require_precision(trainer)
    refuse_stacked(trainer, name)
    require_sound(trainer)


def require_precision(trainer: AbstractTrainer) -> None:
    """Refuses a trainer that was made in float64 while JAX computes in float32."""
    # What users have put there need not be an array.
    is_of_64_bits = is_wide(getattr(trainer.best_loss, "dtype", None))
    if is_of_64_bits and not is_x64_on():
        raise ValueError(
            f"`{type(trainer).__name__}` was made in float64, while `jax_enable_x64` "
            "was on, and now it is off: JAX would compute in float32. Turn it on for "
            f"all of it, by {REMEDY}; or make the trainer here."
        )


def refuse_stacked(trainer: AbstractTrainer, name: str) -> None:
    """Refuses a trainer of many, whose numbers would be taken for those of one."""
    if np.ndim(trainer.step_count):
        size, kind = len(trainer.step_count), type(trainer).__name__
        raise TypeError(
            f"`{name}`: this `{kind}` is stacked, with {size} members, and `{name}` "
            "is for one. `fit_many` fits them all; `result.trainer(0)` is one of them, "
            "and the result has their `errors`, `report` and `table`. In a program of "
            "your own, map over the members, by `eqx.filter_vmap`."
        )


def require_sound(trainer: AbstractTrainer) -> None:
    """Refuses a trainer that was changed so that its parts do not fit each other.

    What vernal has made is not looked at again.
    """
    if not is_made(trainer):
        require_parts(trainer)
        refuse_strays(trainer)


def require_parts(trainer: AbstractTrainer) -> None:
    """Refuses parts that do not fit each other, such as a state of another optimiser.

    It looks at structures, shapes and dtypes alone, and computes nothing. What was
    found to fit is not looked at again.
    """
    leaves, structure = jax.tree.flatten(trainer)
    kinds = tuple(map(shape_and_dtype, leaves))
    known = _fitting.setdefault(version_of_flat(leaves, structure), set())
    if kinds in known:
        return
    check_class(trainer, trainer.key, trainer.state, priors_of(trainer))
    if misfit := _misfit(trainer):
        raise ValueError(
            f"`{type(trainer).__name__}`: {misfit}. Change a trainer by "
            "`trainer.replace(model=..., optimiser=..., nan_policy=...)`, which keeps "
            "its parts together, not by `eqx.tree_at` or `jax.tree.map`; or make a new "
            "one."
        )
    known.add(kinds)


# By the code that a version is of: in a loop a user may change a trainer at each turn.
_fitting: weakref.WeakKeyDictionary[Version, set[Any]] = weakref.WeakKeyDictionary()


def _misfit(trainer: AbstractTrainer) -> str:
    """Says which part does not fit the others; empty if all do."""
    old, parts = progress_of(trainer), template_of(trainer)
    for path, leaf in by_path(old.params).items():
        if not (hasattr(leaf, "dtype") and is_inexact(leaf)):
            kind = f"{getattr(leaf, 'dtype', type(leaf).__name__)}"
            return f"`trainer.params` is {kind} at {path!r}, not an array of floats"
    kinds = [0 if kind == "trained" else None for kind in parts.kinds]
    if jax.tree.structure(old.params) != jax.tree.structure(
        parts.structure.unflatten(kinds)
    ):
        return "`trainer.params` has another structure than its model"
    begun = _begun
    if np.ndim(old.step_count):
        begun = eqx.filter_vmap(begun, in_axes=(member_axes(old.step_count),))
    # As it was made: a number is of another dtype with `jax_enable_x64`.
    is_wide = getattr(old.best_loss, "dtype", None) == np.float64
    try:
        with jax.enable_x64(is_wide):
            new = eqx.filter_eval_shape(begun, trainer)
    except Exception:  # what a fit meets, it raises itself
        return ""
    for name, own in vars(new).items():
        if not _is_like(name, getattr(old, name), own):
            return (
                f"`trainer.{name}` has another structure, shape or dtype than its "
                "parameters, optimiser and policy need"
            )
    return ""


def _begun(trainer: AbstractTrainer) -> Progress:
    """Returns the progress with which a trainer would begin at its parameters."""
    params, bijections = trainer.params, bijections_of(trainer)
    latent = None if bijections is None else bijections.inverse(params)
    if trainer.projector is not None:
        latent = trainer.projector.to_latent(params if latent is None else latent)
    return initial_progress(trainer, params, latent, trainer.state)


def _is_like(name: str, old: Any, new: Any) -> bool:
    if name == "opt_state":
        if jax.tree.structure(old) == jax.tree.structure(new):
            # There may be a number that a user has put there.
            kept = lambda leaf, like: leaf if hasattr(leaf, "dtype") else like
            old = jax.tree.map(kept, old, new)
        return _tells_itself(old, new) or fits(old, new)
    if name == "best_loss":
        return is_inexact(old) and np.shape(old) == new.shape
    # Within a fit that keeps no best there is none.
    return is_alike(old, new) or (old is None and name.startswith("best"))


def _tells_itself(old: Any, new: Any) -> bool:
    """Whether two states are of other rules, of which `ParamOptimiser.update` tells."""
    if not all(isinstance(state, ParamOptimiserState) for state in (old, new)):
        return False
    if jax.tree.structure(old) == jax.tree.structure(new):
        return False
    has, needs = (set(zip(x.paths, x.shapes, strict=True)) for x in (old, new))
    return needs <= has


def refuse_strays(trainer: AbstractTrainer) -> None:
    """Refuses a point that is another in the coordinates, or outside of its bounds."""
    strays, progress = strays_of(trainer), progress_of(trainer)
    if strays:
        shown = ", ".join(map(repr, strays[:5]))
        raise ValueError(
            f"`{type(trainer).__name__}`: `trainer.params` and `trainer.latent`, the "
            f"coordinates that the optimiser moves, are two points: they differ in "
            f"{shown}. One was changed without the other, as by `eqx.tree_at`. Change "
            "parameters by `trainer.replace(model=...)`, which changes both."
        )
    _refuse_outside(trainer)
    if strays is not None or progress.latent is None:
        note_made(progress)


def _refuse_outside(trainer: AbstractTrainer) -> None:
    """Refuses parameters, or a best, outside of their bounds."""
    progress, bounds = progress_of(trainer), bounds_of(trainer)
    points = progress.params, progress.best
    if bounds is None or not _are_known((bounds, points)):
        return
    shape = progress.step_count.shape
    axes = member_axes(progress.step_count) if shape else lambda _: None
    for index in np.ndindex(shape):
        row = lambda x, i=index: np.asarray(x)[i] if axes(x) == 0 else x
        own, *rows = jax.tree.map(row, (bounds, *points))
        for point in rows:
            own.required(point)


# The room is large where parameters are far from the origin of a projector.
_CLOSER = 4 / 3


def strays_of(trainer: AbstractTrainer) -> list[str] | None:
    """Lists the parameters that are elsewhere than the coordinates say.

    Returns `None` where that is not known: within a program, and where another process
    has the arrays. Numbers are compared by NumPy, for which nothing is compiled.
    """
    old, projector = progress_of(trainer), trainer.projector
    bijections, rank = bijections_of(trainer), old.step_count.ndim
    params, free = old.params, old.latent
    if free is None or not _are_known((free, params)):
        return None
    axes = member_axes(old.step_count) if rank else None
    each = lambda fn: eqx.filter_vmap(fn, in_axes=axes) if rank else fn
    if projector is not None:
        free = each(to_params)(projector, free)
    again, back, mapped = free, params, frozenset[str]()
    if bijections is not None:
        again, back = each(_both_ways)(bijections, free, params)
        mapped = bijections.maps.keys()
    # In a function that JAX traces, so is what it calls.
    if not _are_known((again, back)):
        return None
    values, frees = map(_wide, (params, free))
    rooms = list(map(abs, frees))
    if projector is not None:
        rooms = _reach(projector, frees, rank)
    strays = []
    columns = by_path(params).items(), values, _wide(again), frees, _wide(back), rooms
    for (path, leaf), x, y, at, there, room in zip(*columns, strict=True):
        tolerance = float(jnp.finfo(leaf.dtype).eps) ** 0.5
        inner = tuple(range(rank, x.ndim))
        # A map returns an array up to rounding of its largest element.
        size = abs(x).max(inner, keepdims=True, initial=0) if path in mapped else abs(x)
        with np.errstate(invalid="ignore"):
            # After a fit, either may be NaN.
            is_off = np.any(abs(x - y) > tolerance * size)
            is_near = np.all(abs(at - there) <= tolerance**_CLOSER * room)
        if is_off and not is_near:
            strays.append(path)
    return strays


@program
def _both_ways(
    bijections: Bijections, free: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    return bijections.forward(free), bijections.inverse(params)


def _are_known(tree: PyTree) -> bool:
    is_here = lambda leaf: leaf.is_fully_addressable or leaf.is_fully_replicated
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return not is_traced(tree) and all(map(is_here, arrays))


def _wide(tree: PyTree) -> list[Any]:
    kind = lambda leaf: complex if np.iscomplexobj(leaf) else float
    return [np.asarray(leaf).astype(kind(leaf)) for leaf in jax.tree.leaves(tree)]


def _reach(projector: EigenProjector, frees: list[Any], rank: int) -> list[Any]:
    """Returns the size of the terms that are summed for each element.

    Rounding is this times the precision. A move is a sum along directions that are
    orthonormal in the units of a whitening, and its terms may cancel.
    """
    starts, found = _wide(projector.origin), list(frees)
    for whitening, block in zip(projector.whitenings, projector.blocks, strict=True):
        units = np.asarray(whitening.scale).astype(float)
        moves = [abs(frees[i] - starts[i]) for i in block]
        moves = [move.reshape(*move.shape[:rank], -1) for move in moves]
        ends = np.cumsum([move.shape[-1] for move in moves])[:-1]
        most = (np.concatenate(moves, -1) / units).max(-1, keepdims=True, initial=0)
        for i, reach in zip(block, np.split(most * units, ends, axis=-1), strict=True):
            found[i] = abs(starts[i]) + reach.reshape(frees[i].shape)
    return found

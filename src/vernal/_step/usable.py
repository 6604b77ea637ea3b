"""Whether a trainer can be used: one, of this precision, and at one point."""

from typing import Any
from weakref import WeakValueDictionary

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from .._boundary import PyTree, is_traced
from .._constraints import Bijections, is_close, tolerance_of
from .._program import program
from .._projection import EigenProjector
from .._tree import by_path
from .abstract_trainer import AbstractTrainer, bijections_of, progress_of
from .precision import require_precision
from .progress import Progress
from .replace import member_axes


def require_one(trainer: AbstractTrainer, name: str) -> None:
    """Refuses a stacked trainer in what is for one, and one that cannot be used."""
    require_precision(trainer)
    refuse_stacked(trainer, name)
    require_one_point(trainer)


def refuse_stacked(trainer: AbstractTrainer, name: str) -> None:
    """Refuses a trainer of many, whose numbers would be taken for those of one."""
    if trainer.step_count.ndim:
        size, kind = len(trainer.step_count), type(trainer).__name__
        raise TypeError(
            f"`{name}`: this `{kind}` is stacked, with {size} members, and `{name}` "
            "is for one. `fit_many` fits them all; `result.trainer(0)` is one of them, "
            "and the result has their `errors`, `report` and `table`. In a program of "
            "your own, map over the members, by `eqx.filter_vmap`."
        )


# What is known to be at one point, so that no step of a loop has to be waited for.
_known = WeakValueDictionary[int, Progress]()


def require_one_point(trainer: AbstractTrainer) -> None:
    """Refuses parameters that were changed without the coordinates that a fit moves."""
    progress = progress_of(trainer)
    if _known.get(id(progress)) is progress:
        return
    strays = strays_of(trainer)
    if strays:
        shown = ", ".join(map(repr, strays[:5]))
        raise ValueError(
            f"`{type(trainer).__name__}`: `trainer.params` and `trainer.latent`, the "
            f"coordinates that the optimiser moves, are two points: they differ in "
            f"{shown}. One was changed without the other, as by `eqx.tree_at`. Change "
            "parameters by `trainer.replace(model=...)`, which changes both."
        )
    note_one_point(trainer)


def note_one_point(trainer: AbstractTrainer) -> None:
    """Notes that the parameters of a trainer were made of its coordinates."""
    progress = progress_of(trainer)
    if progress.latent is not None:
        _known[id(progress)] = progress


def strays_of(trainer: AbstractTrainer) -> list[str]:
    """Lists the parameters that are elsewhere than the coordinates say.

    Within a program they are not known, and none is listed.
    """
    old = progress_of(trainer)
    if old.latent is None or is_traced(old.latent, old.params):
        return []
    parts = trainer.projector, bijections_of(trainer), old.latent, old.params
    flags = _strays(parts, old.step_count)
    # In a function that JAX traces, so is the program.
    if is_traced(flags):
        return []
    return [path for path, flag in flags.items() if np.any(flag)]


@program
def _strays(
    parts: tuple[Any, ...], step_count: Int[Array, "*members"]
) -> dict[str, Bool[Array, "*members"]]:
    if not step_count.ndim:
        return _flags(*parts)
    return eqx.filter_vmap(_flags, in_axes=member_axes(step_count))(*parts)


def _flags(
    projector: EigenProjector | None,
    bijections: Bijections | None,
    latent: PyTree,
    params: PyTree,
) -> dict[str, Bool[Array, ""]]:
    """Returns which parameters are not those of a latent point, up to rounding."""
    free, reaches = latent, {}
    if projector is not None:
        free = projector.to_params(latent)
        reaches = by_path(projector.reach(free)).by_name()
    again = free if bijections is None else bijections.forward(free)
    maps = {} if bijections is None else bijections.maps
    again, flags = by_path(again).by_name(), {}
    for path, x in by_path(params).items():
        if path in maps:
            flags[path] = ~is_close(x, again[path])
        else:
            size = jnp.abs(x) + reaches.get(path, 0)
            # After a fit, either may be NaN.
            flags[path] = jnp.any(jnp.abs(again[path] - x) > tolerance_of(x) * size)
    return flags

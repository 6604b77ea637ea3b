"""Whether the parts of a trainer fit each other, which users may have changed apart."""

import weakref
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._optimiser import ParamOptimiserState
from .._program import Version, version_of_flat
from .._tree import by_path, is_alike, is_inexact, shape_and_dtype, strong
from .abstract_trainer import (
    AbstractTrainer,
    bijections_of,
    member_axes,
    priors_of,
    progress_of,
    template_of,
)
from .construct import check_class, initial_opt_state
from .opt_state import fits
from .progress import Progress, initial_progress


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
    opt_state = initial_opt_state(trainer.optimiser, params, latent)
    policy_state = jax.tree.map(strong, trainer.nan_policy.init(params))
    return initial_progress(params, latent, opt_state, policy_state, trainer.state)


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

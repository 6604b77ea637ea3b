"""A trainer with other parts: what of its state still fits is kept."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .._boundary import PyTree
from .._optimiser import ParamOptimiser, as_transform
from .._policy import NanPolicy
from .._projection import EigenProjector
from .._step import (
    Parts,
    carried_over,
    check_arguments,
    check_ruled,
    check_state,
    checked_model,
    fit_projector,
    initial_opt_state,
    refuse_names_in_latent_space,
)
from .._tree import cast_alike, is_alike, parameters, strong


def replace(
    trainer: Any,
    model: Any,
    optimiser: optax.GradientTransformation | None,
    nan_policy: NanPolicy | None,
    state: PyTree,
) -> dict[str, Any]:
    """Finds the fields of `Trainer.replace`, which has the documentation."""
    if trainer.step_count.ndim:
        return _replace_each(trainer, model, optimiser, nan_policy, state)
    old, parts, transform = trainer._progress, trainer._parts, trainer.optimiser
    new: dict[str, Any] = {"stopped": jnp.zeros_like(old.stopped)}
    params, latent = old.params, old.latent
    if model is not None:
        model = checked_model(model)
        if jax.tree.structure(model) != parts.structure:
            raise ValueError(
                "`model` has another structure than the one that is fitted. For "
                "another model, make a new trainer."
            )
        kinds = [0 if kind == "trained" else None for kind in parts.kinds]
        params = cast_alike(
            parameters(model, kinds),
            params,
            "`model`",
            "the one that is fitted",
            "For {} parameters, make a new trainer.",
        )
        parts = Parts(model, kinds)
        if trainer.projector is not None:
            latent = trainer.projector.to_latent(params)
            params = trainer.projector.to_params(latent)
        infinite = jnp.full_like(old.best_loss, jnp.inf)
        new |= {"params": params, "latent": latent, "best": params}
        new |= {"best_state": old.state, "best_loss": infinite}
    if state is not None:
        check_state(state)
        whose, remedy = "the one that the trainer has", "Make a new trainer for it."
        new["state"] = cast_alike(state, old.state, "`state`", whose, remedy)
        if model is not None:
            new["best_state"] = new["state"]
    if optimiser is not None:
        transform = as_transform(optimiser, "optimiser")
        refuse_names_in_latent_space(trainer.projector, transform)
        check_ruled(transform, params)
        fresh = initial_opt_state(transform, params, latent)
        new["opt_state"] = carried_over(trainer, params, latent, fresh)
    policy = trainer.nan_policy
    if nan_policy is not None:
        check_arguments(nan_policy, None, None)
        policy = nan_policy
        fresh = jax.tree.map(strong, policy.init(params))
        if not is_alike(old.policy_state, fresh):
            new["policy_state"] = fresh
    return {
        "optimiser": transform,
        "nan_policy": policy,
        "_parts": parts,
        "_progress": dataclasses.replace(old, **new),
    }


def _replace_each(
    trainer: Any, model: Any, optimiser: Any, nan_policy: Any, state: PyTree
) -> dict[str, Any]:
    """Finds the fields for each member of a stacked trainer."""
    size = len(trainer.step_count)
    # What all members share may have no rows.
    own = lambda leaf: 0 if eqx.is_array(leaf) and leaf.shape[:1] == (size,) else None
    if optimiser is not None:
        optimiser = as_transform(optimiser, "optimiser")
    rows = eqx.if_array(0)
    found = eqx.filter_vmap(replace, in_axes=(own, rows, own, own, rows))(
        trainer, model, optimiser, nan_policy, state
    )
    for name, new in {"optimiser": optimiser, "nan_policy": nan_policy}.items():
        old = getattr(trainer, name)
        found[name] = old if new is None else _with_rows(new, old, size)
    if model is None:
        found["_parts"] = trainer._parts
    return found


def _with_rows(new: Any, old: Any, size: int) -> Any:
    """Gives new configuration a row for each member, where the old has them."""
    leaves = jax.tree.leaves(old)
    have = [leaf.shape[:1] == (size,) for leaf in leaves if eqx.is_array(leaf)]
    rows = lambda x: x if x.shape[:1] == (size,) else jnp.stack([x] * size)
    return jax.tree.map(rows, new) if all(have) else new


def reproject(
    trainer: Any,
    projector: EigenProjector | None,
    optimiser: optax.GradientTransformation | None,
) -> dict[str, Any]:
    """Finds the fields of `Trainer.reproject`, which has the documentation."""
    check_arguments(trainer.nan_policy, projector, None)
    transform = trainer.optimiser
    if optimiser is not None:
        transform = as_transform(optimiser, "optimiser")
    elif isinstance(transform, ParamOptimiser) and projector is not None:
        transform = transform if projector._has_names else None
    params = trainer.params
    constrained = trainer._overrides("constrain")
    projector, latent = fit_projector(
        projector, params, transform, constrained=constrained
    )
    check_ruled(transform, params)
    if projector is not None:
        params = projector.to_params(latent)
    progress = dataclasses.replace(
        trainer._progress,
        params=params,
        latent=latent,
        opt_state=initial_opt_state(transform, params, latent),
    )
    return {"optimiser": transform, "projector": projector, "_progress": progress}

"""Trainers with another model, optimiser, policy or projector."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._boundary import PyTree
from .._optimiser import ParamOptimiser, as_transform
from .._policy import NanPolicy
from .._projection import EigenProjector
from .._tree import atoms, by_path, cast_alike, is_alike, parameters, strong
from .abstract_trainer import (
    AbstractTrainer,
    TrainerT,
    bijections_of,
    bounds_of,
    changed,
    from_free_coordinates,
    in_free_coordinates,
    is_constrained,
    member_axes,
    priors_of,
    progress_of,
    template_of,
    to_params,
)
from .constrain import check_elementwise
from .construct import (
    check_arguments,
    check_ruled,
    check_state,
    checked_model,
    encode,
    fit_projector,
    initial_opt_state,
    refuse_names_in_latent_space,
    refuse_rules_of_tied,
)
from .model_template import ModelTemplate
from .opt_state import carried_over


def replaced_fields(
    trainer: AbstractTrainer,
    model: Any,
    optimiser: optax.GradientTransformation | None,
    nan_policy: NanPolicy | None,
    state: PyTree,
) -> dict[str, Any]:
    """Returns the fields that `Trainer.replace` changes."""
    if trainer.step_count.ndim:
        return _replace_each(trainer, model, optimiser, nan_policy, state)
    old, parts = progress_of(trainer), template_of(trainer)
    transform = trainer.optimiser
    new: dict[str, Any] = {"stopped": jnp.zeros_like(old.stopped)}
    params, latent, bounds = old.params, old.latent, bounds_of(trainer)
    free, projector = in_free_coordinates(trainer).params, trainer.projector
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
        parts = ModelTemplate(model, kinds, parts.ties)
        if bounds is not None:
            params = bounds.required(params)
        if (priors := priors_of(trainer)) is not None:
            params = priors.required(parts.join(params), params)
        bijections = bijections_of(trainer)
        free = params if bijections is None else bijections.required(params)
        latent = None if bijections is None else free
        if projector is not None:
            projector, latent = encode(projector, free)
            if bounds is None:
                free = projector.to_params(latent)
                params, _ = from_free_coordinates(trainer, free, latent)
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
        _check_rules(trainer, transform, params, free)
        new["opt_state"] = carried_over(trainer, transform, params, latent)
    policy = trainer.nan_policy
    if nan_policy is not None:
        check_arguments(nan_policy, None, None)
        policy = nan_policy
        fresh = jax.tree.map(strong, policy.init(params))
        is_other = _classes(policy) != _classes(trainer.nan_policy)
        if is_other or not is_alike(old.policy_state, fresh):
            new["policy_state"] = fresh
    return {
        "optimiser": transform,
        "nan_policy": policy,
        "projector": projector,
        "_template": parts,
        "_progress": dataclasses.replace(old, **new),
    }


def _check_rules(
    trainer: AbstractTrainer, optimiser: Any, params: PyTree, free: PyTree
) -> None:
    """Refuses rules that would train other leaves of the model than are trained."""
    other = f"make a new trainer, `{type(trainer).__name__}(trainer.model, ...)`"
    check_ruled(optimiser, params, free, bijections_of(trainer), other)
    if not isinstance(optimiser, ParamOptimiser):
        return
    model, parts, old = trainer.model, template_of(trainer), trainer.optimiser
    owners = optimiser.owners(model)
    refuse_rules_of_tied(optimiser, owners, model, parts.ties)
    if not isinstance(old, ParamOptimiser):
        return
    # Where the old rules own a leaf, it was left out by `train`, and is again.
    left_out = old.owners(model, filtered=True)
    tied = () if parts.ties is None else parts.ties.indices
    named = [*map(_is_named, optimiser.selectors.decode()), False]
    paths = [path for path, _ in by_path(model).items()]
    thawed = [
        paths[index]
        for index, (kind, owner) in enumerate(zip(parts.kinds, owners, strict=True))
        if kind != "trained" and index not in tied
        if owner is not None and named[owner] and left_out[index] is None
    ]
    if thawed:
        raise ValueError(
            f"`optimiser` has a rule for {', '.join(map(repr, thawed[:5]))}, which is "
            f"not trained, and which leaves are stays. To train it, {other}."
        )


def _classes(policy: NanPolicy) -> list[Any]:
    """Names the classes of a policy and of those that it is composed of."""
    inner = [part for part in vars(policy).values() if isinstance(part, NanPolicy)]
    return [type(policy).__qualname__, *map(_classes, inner)]


def _is_named(selector: Any) -> bool:
    """Whether a selector names leaves, rather than those that are there."""
    parts = atoms(selector, "optimiser")
    return all(isinstance(part, str) and "*" not in part for part in parts)


def _replace_each(
    trainer: AbstractTrainer, model: Any, optimiser: Any, nan_policy: Any, state: PyTree
) -> dict[str, Any]:
    """Returns the fields for each member of a stacked trainer."""
    if optimiser is not None:
        optimiser = as_transform(optimiser, "optimiser")
    if model is not None:
        model = _of_each(checked_model(model), trainer)
    config = {"optimiser": optimiser, "nan_policy": nan_policy}
    for name, new in config.items():
        config[name] = None if new is None else _with_rows(new, trainer, name)
    rows = eqx.if_array(0)
    axes = member_axes(trainer.step_count), rows, rows, rows, rows
    given = model, *config.values(), state
    found = eqx.filter_vmap(replaced_fields, in_axes=axes)(trainer, *given)
    for name, new in config.items():
        found[name] = getattr(trainer, name) if new is None else new
    if model is None:
        found |= {"_template": template_of(trainer), "projector": trainer.projector}
    elif trainer.projector is not None:
        # Of which all members may share one.
        found["projector"] = eqx.tree_at(
            lambda p: p.whitenings, found["projector"], trainer.projector.whitenings
        )
    return found


def _of_each(model: Any, trainer: AbstractTrainer) -> Any:
    """Gives a model of one member, by its parameters, a row for each."""
    parts = template_of(trainer)
    if jax.tree.structure(model) != parts.structure:
        return model  # which is refused for each
    shapes, before = (
        {path: np.shape(leaf) for path, leaf in by_path(tree).items()}
        for tree in (parts.trained(model), trainer.params)
    )
    size = len(trainer.step_count)
    if shapes == {path: shape[1:] for path, shape in before.items()}:
        rows = lambda x: jnp.stack([x] * size) if eqx.is_array(x) else x
        return jax.tree.map(rows, model)
    for path, shape in before.items():
        if shapes[path] != shape:
            raise ValueError(
                f"`model` has an array of shape {shapes[path]} at {path!r}, and the "
                f"{size} members of the trainer have one of shape {shape}. Give all "
                "arrays a row for each member, or give the model of one."
            )
    return model


def _with_rows(new: Any, trainer: AbstractTrainer, name: str) -> Any:
    """Gives a new configuration a row for each member, where it has none already.

    Arrays of the configuration before have rows, as in `optimiser.with_scale(...)`.
    """
    size, old = len(trainer.step_count), getattr(trainer, name)
    (leaves, structure), (olds, before) = map(jax.tree.flatten, (new, old))
    known = {id(leaf) for leaf in olds}
    shapes = [leaf.shape if eqx.is_array(leaf) else None for leaf in olds]
    shapes = shapes if structure == before else [None] * len(leaves)
    pairs = [
        (leaf, shape)
        for leaf, shape in zip(leaves, shapes, strict=True)
        if eqx.is_array(leaf) and id(leaf) not in known and leaf.shape != shape
    ]
    is_of_one = all(shape and leaf.shape == shape[1:] for leaf, shape in pairs)
    if not is_of_one and all(leaf.shape[:1] == (size,) for leaf, _ in pairs):
        raise ValueError(
            f"`{name}` has an array of shape {pairs[0][0].shape}, and the trainer has "
            f"{size} members: a row for each, or the same for all? Arrays of the one "
            "before do not tell. Replace it in each of a list of trainers, and fit "
            f"these: `[result.trainer(i).replace({name}=...) for i in "
            "range(len(result))]`."
        )
    others = {id(leaf) for leaf, _ in pairs}
    rows = lambda x: jnp.stack([x] * size) if id(x) in others else x
    return jax.tree.map(rows, new)


def reproject(
    trainer: TrainerT,
    projector: EigenProjector | None,
    optimiser: optax.GradientTransformation | None,
) -> TrainerT:
    """Implements `Trainer.reproject`."""
    check_arguments(trainer.nan_policy, projector, None)
    transform = trainer.optimiser
    if optimiser is not None:
        transform = as_transform(optimiser, "optimiser")
    elif isinstance(transform, ParamOptimiser) and projector is not None:
        transform = transform if projector.has_names else None
    params, free = trainer.params, in_free_coordinates(trainer).params
    bounds, constrained = bounds_of(trainer), is_constrained(trainer)
    projector, latent = fit_projector(
        projector, free, transform, constrained=constrained
    )
    _check_rules(trainer, transform, params, free)
    if projector is not None and bounds is None:
        # With bounds, rounding would move them off.
        free = to_params(projector, latent)
        params, _ = from_free_coordinates(trainer, free, latent)
    elif projector is None and bijections_of(trainer) is not None:
        latent = free
    progress = dataclasses.replace(
        progress_of(trainer),
        params=params,
        latent=latent,
        opt_state=initial_opt_state(transform, params, latent),
    )
    trainer = changed(
        trainer, optimiser=transform, projector=projector, _progress=progress
    )
    check_elementwise(trainer)
    return trainer

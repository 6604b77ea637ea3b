"""The state of a trainer, as it is saved and put into another one like it."""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._boundary import PyTree, nearest_names
from .._optimiser import other_maker, state_makers
from .._step import (
    AbstractTrainer,
    Progress,
    beginning,
    bijections_of,
    bounds_of,
    changed,
    initial_progress,
    member_axes,
    priors_of,
    progress_of,
    settled,
    strays_of,
    template_of,
    with_progress,
)
from .._tree import (
    Kind,
    MismatchError,
    NamedArray,
    from_arrays,
    require_alike_kinds,
    to_arrays,
)
from .positions import BEGUN, OPT_STATE, Meaning, positions

T = TypeVar("T")

# The fields that each name of `reset` stands for.
_RESETTABLE = {
    "opt_state": ("opt_state",),
    "policy_state": ("policy_state",),
    "best": ("best", "best_state", "best_loss", "is_validated", "scored_on"),
    "nan_report": ("nan_counts",),
    "state": ("state",),
    "step_count": ("step_count",),
}

_UNKNOWN = Meaning()


def snapshot(trainer: AbstractTrainer) -> dict[str, NamedArray]:
    """Returns all that a fit changes: parameters, moments, counts, best, projector.

    Configuration (frozen leaves, rates, policies) is not a part of it.
    """
    return to_arrays(_state(trainer))


def initial_hyperparams(trainer: AbstractTrainer) -> dict[str, NamedArray]:
    """Returns the hyperparameters in an optimiser's state at its beginning.

    Saved beside a snapshot, they show which of them a program has changed since.
    """
    return to_arrays({BEGUN: beginning(trainer)})


def _state(trainer: AbstractTrainer) -> OrderedDict[str, PyTree]:
    progress = progress_of(trainer)
    # The parameters come first, so that errors name what a user knows about.
    names = [field.name for field in dataclasses.fields(progress)]
    state = OrderedDict((name, getattr(progress, name)) for name in names)
    state["projector"] = trainer.projector
    return state


def kinds(arrays: Mapping[str, NamedArray]) -> dict[str, Kind]:
    return {path: leaf.kind for path, leaf in arrays.items()}


def beneath(leaves: Mapping[str, T], *fields: str) -> dict[str, T]:
    """Returns the leaves whose path begins with one of the fields."""
    return {path: leaf for path, leaf in leaves.items() if _field(path) in fields}


def without(leaves: Mapping[str, T], *fields: str) -> dict[str, T]:
    """Returns the leaves whose path begins with none of the fields."""
    return {path: leaf for path, leaf in leaves.items() if _field(path) not in fields}


def _field(path: str) -> str:
    return path.partition(".")[0]


def require_restorable(
    saved: Mapping[str, Kind],
    trainer: AbstractTrainer,
    source: str,
    reset: Iterable[str] = (),
    meaning: Meaning = _UNKNOWN,
) -> tuple[str, ...]:
    """Checks that a snapshot fits a trainer, from the kinds of its leaves alone.

    The state of each rule is `in_place`. It returns the fields that are not restored:
    those of `reset`, the state of a NaN policy if the snapshot has that of another
    policy, and what the snapshot lacks.
    """
    own = kinds(snapshot(trainer) | initial_hyperparams(trainer))
    changed = _changed_hyperparams(saved, own)
    fields = set()
    for name in reset:
        if name not in _RESETTABLE:
            raise ValueError(
                f"`reset` names {name!r}, which cannot be reset. "
                f"{nearest_names(name, list(_RESETTABLE))}"
            )
        fields |= set(_RESETTABLE[name])
    saved = {path: kind for path, kind in saved.items() if path not in changed}
    saved |= {path: kind for path, kind in own.items() if path in changed}
    saved, own = without(saved, BEGUN), without(own, BEGUN)
    if beneath(saved, "policy_state") != beneath(own, "policy_state"):
        fields.add("policy_state")
    if "scored_on" not in saved:
        # Files of earlier versions do not say.
        fields.add("scored_on")
    _require_whitened_alike(saved, own, source)
    require_alike_kinds(without(saved, *fields), without(own, *fields), source)
    if OPT_STATE not in fields:
        _require_same_meaning(meaning, trainer, source)
    return tuple(fields)


def _require_whitened_alike(
    saved: Mapping[str, Kind], own: Mapping[str, Kind], source: str
) -> None:
    """Refuses a trainer that is whitened where the other is not.

    Their coordinates, and with these the optimiser's moments, have other shapes.
    """
    if beneath(saved, "params") != beneath(own, "params"):
        return
    there, here = (bool(beneath(leaves, "projector")) for leaves in (saved, own))
    if there and not here:
        raise MismatchError(
            f"{source} holds a trainer with a projector, as `whiten` makes one, and "
            "the trainer here has none. Whiten it as the other was: to `load`, give "
            "`like.whiten(batch)`. Its numbers come from what was saved."
        )
    if here and not there:
        raise MismatchError(
            f"{source} holds a trainer without a projector, and the one here has been "
            "whitened. Take it as it was before `whiten`: to `load`, give `like` "
            "itself, and whiten what it returns."
        )


def _require_same_meaning(
    meaning: Meaning, trainer: AbstractTrainer, source: str
) -> None:
    """Refuses a state that looks like that of the optimiser and is of another one."""
    if meaning.made_by is None:
        return
    makers = state_makers(trainer.optimiser, meaning.rules(trainer))
    if (found := other_maker(meaning.made_by, makers)) is None:
        return
    there, here = found
    rule = f" of the rule {here.rule!r}" if here.rule else ""
    raise MismatchError(
        f"{source} holds the state of another optimiser{rule}: of `{there.name}`, not "
        f"of `{here.name}`. The two look alike, and their numbers need not mean the "
        "same. Make the optimiser as it was. `load` can also leave its state out, with "
        '`reset="opt_state"`.'
    )


def restore(
    saved: Mapping[str, NamedArray],
    trainer: AbstractTrainer,
    source: str,
    reset: Iterable[str] = (),
    meaning: Meaning = _UNKNOWN,
) -> Any:
    """Puts a snapshot, and `initial_hyperparams` if saved, into a trainer like its own.

    The state of each rule is `in_place`. Raises a `MismatchError` if the model or the
    optimiser is another.
    """
    own = {BEGUN: beginning(trainer)}
    saved = _in_rows(saved, to_arrays(own))
    fields = require_restorable(kinds(saved), trainer, source, reset, meaning)
    saved = _with_own_hyperparams(saved, trainer)
    like = _state(trainer)
    for name in fields:
        del like[name]
    state = from_arrays(without(saved, *fields, BEGUN), like, source)
    before = beneath(saved, BEGUN)
    if "opt_state" in state and before and kinds(before) == kinds(to_arrays(own)):
        before = from_arrays(before, own, source)
        state["opt_state"] = settled(state["opt_state"], before[BEGUN], own[BEGUN])
    projector = state.pop("projector")
    if "nan_counts" in state:
        # A column for each parameter, between those of the loss and of the update.
        columns = positions(saved, to_arrays(like), "params")
        if columns != sorted(columns):
            order = np.array([0, *(1 + i for i in columns), 1 + len(columns)])
            state["nan_counts"] = state["nan_counts"][..., order]
    if fields:
        state |= _initial_fields(trainer, state, fields)
    progress = Progress(**state)
    trainer = with_progress(trainer, progress, projector=projector)
    if not progress.step_count.ndim:
        _require_within(trainer, source)
    return trainer


def require_each_within(trainer: AbstractTrainer, source: str) -> None:
    """Refuses a member of a stacked trainer outside of its bounds and priors.

    All arrays have a row for each. In a fit of many, those that members share do not.
    """
    _require_one_point(trainer, source)
    if bounds_of(trainer) is None and priors_of(trainer) is None:
        return
    axes = member_axes(trainer.step_count)
    flags = eqx.filter_vmap(_is_within, in_axes=(axes,))(trainer)
    for index in np.flatnonzero(~np.asarray(flags)):
        of_one = lambda x, i=index: x[i] if axes(x) == 0 else x
        _require_within(jax.tree.map(of_one, trainer), f"{source}, member {index},")


def _is_within(trainer: AbstractTrainer) -> Bool[Array, ""]:
    """Whether parameters are within the bounds and priors of the script."""
    progress, is_within = progress_of(trainer), jnp.array(True)
    if (priors := priors_of(trainer)) is not None:
        is_within &= priors.allow(template_of(trainer).join(progress.best))
    if (bounds := bounds_of(trainer)) is not None:
        is_within &= bounds.contain(progress.params) & bounds.contain(progress.best)
    return is_within


def _require_within(trainer: AbstractTrainer, source: str) -> None:
    """Refuses parameters outside of the bounds and priors of the script."""
    progress = progress_of(trainer)
    priors, bounds = priors_of(trainer), bounds_of(trainer)
    try:
        if priors is not None:
            # The last update of a fit may have left their support; its best has not.
            best = template_of(trainer).join(progress.best)
            priors.required(best, progress.best)
        if bounds is not None:
            bounds.required(progress.params)
            bounds.required(progress.best)
    except ValueError as error:
        raise MismatchError(
            f"{source} has a fit at parameters that this program does not allow. Give "
            "the bounds and priors that it was saved with, or begin from another "
            f"start. {error}"
        ) from error
    _require_one_point(trainer, source)


def _require_one_point(trainer: AbstractTrainer, source: str) -> None:
    if bijections_of(trainer) is not None and strays_of(trainer):
        raise MismatchError(
            f"{source} has free coordinates of another bijection than that in "
            "`bounds`. Load it with the bijection that it was saved with; to go on "
            "with another one, make a new trainer of that model."
        )


def _changed_hyperparams(
    saved: Mapping[str, Kind], own: Mapping[str, Kind]
) -> set[str]:
    """Returns the hyperparameters that only one of the two has, or of another kind."""
    changed = set()
    for path in beneath(saved, BEGUN) | beneath(own, BEGUN):
        in_state = f"opt_state{path.removeprefix(BEGUN)}"
        # The first files do not have the initial values.
        is_known = (path in saved) == (in_state in saved)
        if is_known and any(saved.get(p) != own.get(p) for p in (path, in_state)):
            changed |= {path, in_state}
    return changed


def _in_rows(
    saved: Mapping[str, NamedArray], own: Mapping[str, NamedArray]
) -> dict[str, NamedArray]:
    """Gives first values a row for each member, as they have here.

    Earlier files have one value where the members shared it.
    """
    rows = dict(saved)
    for path in saved.keys() & own.keys():
        (kind, array), shape = saved[path], own[path].kind.shape
        if shape and kind.shape == shape[1:]:
            array = np.stack([np.asarray(array)] * shape[0])
            rows[path] = NamedArray(kind._replace(shape=shape), array)
    return rows


def _with_own_hyperparams(
    saved: Mapping[str, NamedArray], trainer: AbstractTrainer
) -> dict[str, NamedArray]:
    """Takes changed hyperparameters from the program, whose configuration they are."""
    own, merged = snapshot(trainer) | initial_hyperparams(trainer), dict(saved)
    for path in _changed_hyperparams(kinds(saved), kinds(own)):
        old, new = merged.pop(path, None), own.get(path)
        if new is None:
            continue
        if old is not None and old.kind.shape == new.kind.shape:
            # Only the dtype is another: a callback may have changed the number since.
            new = new._replace(array=np.asarray(old.array).astype(new.kind.dtype))
        merged[path] = new
    return merged


def _initial_fields(
    trainer: AbstractTrainer, restored: Mapping[str, PyTree], fields: tuple[str, ...]
) -> dict[str, PyTree]:
    """Returns fields as those of a trainer that has not taken a step."""
    params, latent = restored["params"], restored["latent"]
    state = trainer.state if "state" in fields else restored["state"]
    if "opt_state" not in fields:
        trainer = changed(trainer, optimiser=None)
    initial = initial_progress
    if trainer.step_count.ndim:
        rows = eqx.if_array(0)
        axes = member_axes(trainer.step_count), rows, rows, rows
        initial = eqx.filter_vmap(initial, in_axes=axes)
    new = initial(trainer, params, latent, state)
    return {name: getattr(new, name) for name in fields}

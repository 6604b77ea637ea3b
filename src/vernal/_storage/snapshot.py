"""What of a trainer is state, to be kept and put into another one like it."""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from .._boundary import PyTree, nearest_names
from .._step import (
    AbstractTrainer,
    Progress,
    beginning,
    initial_opt_state,
    initial_progress,
    progress_of,
    settled,
    with_progress,
)
from .._tree import (
    Kind,
    NamedArray,
    from_arrays,
    require_alike_kinds,
    strong,
    to_arrays,
)

# What can start anew, and the fields that it stands for.
_ANEW = {
    "opt_state": ("opt_state",),
    "policy_state": ("policy_state",),
    "best": ("best", "best_state", "best_loss", "is_validated"),
    "nan_report": ("nan_counts",),
    "state": ("state",),
    "step_count": ("step_count",),
}


# What stands before the paths of the hyperparameters that an optimiser began with.
_BEGUN = "begun"


def snapshot(trainer: AbstractTrainer) -> dict[str, NamedArray]:
    """Lists all that a fit changes: parameters, moments, counts, best, projector.

    What is frozen, the rates and the policies are configuration: they are no part of
    it.
    """
    return to_arrays(_state(trainer))


def begun(trainer: AbstractTrainer) -> dict[str, NamedArray]:
    """Lists the hyperparameters in an optimiser's state, as it begins with them.

    Kept beside a snapshot, they tell which of them the program has changed since.
    """
    return to_arrays({_BEGUN: beginning(trainer)})


def _state(trainer: AbstractTrainer) -> OrderedDict[str, PyTree]:
    progress: Progress = progress_of(trainer)
    # In order, the parameters first: what differs there is what a user knows about.
    names = [field.name for field in dataclasses.fields(progress)]
    state = OrderedDict((name, getattr(progress, name)) for name in names)
    state["projector"] = trainer.projector
    return state


def kinds(arrays: Mapping[str, NamedArray]) -> dict[str, Kind]:
    """Tells what kind of leaf each one is."""
    return {path: leaf.kind for path, leaf in arrays.items()}


def require_restorable(
    kept: Mapping[str, Kind],
    trainer: AbstractTrainer,
    source: str,
    anew: Iterable[str] = (),
) -> tuple[str, ...]:
    """Checks that a snapshot fits a trainer, from the kinds of its leaves alone.

    **Returns:**

    The fields that are not restored, but start anew: those of `anew`, and the state of
    a NaN policy if it was another policy's.
    """
    own = kinds(snapshot(trainer) | begun(trainer))
    others = _set_otherwise(kept, own)
    kept = {path: kept[path] for path in kept if path not in others}
    kept |= {path: own[path] for path in own if path in others}
    kept = _without(kept, (_BEGUN,))
    fields = set()
    for name in (anew,) if isinstance(anew, str) else anew:
        if name not in _ANEW:
            raise ValueError(
                f"`reset` names {name!r}, which cannot start anew. "
                f"{nearest_names(name, list(_ANEW))}"
            )
        fields |= set(_ANEW[name])
    expected = _without(own, (_BEGUN,))
    if _beneath(kept, "policy_state") != _beneath(expected, "policy_state"):
        fields.add("policy_state")
    require_alike_kinds(_without(kept, fields), _without(expected, fields), source)
    return tuple(fields)


def restore(
    kept: Mapping[str, NamedArray],
    trainer: AbstractTrainer,
    source: str,
    anew: Iterable[str] = (),
) -> Any:
    """Puts a snapshot into a trainer of the same model and the same optimiser.

    **Arguments:**

    - `kept`: what `snapshot` returned, and `begun` if it is there.
    - `trainer`: where the configuration comes from.
    - `source`: what an error calls the place where it was kept.
    - `anew`: what is to start anew instead.

    **Raises:**

    - `MismatchError`: if the model or the optimiser is another; it names the leaves
        that differ.
    """
    fields = require_restorable(kinds(kept), trainer, source, anew)
    kept = _with_own_settings(kept, snapshot(trainer) | begun(trainer))
    like = _state(trainer)
    for name in fields:
        del like[name]
    state = from_arrays(_without(kept, (*fields, _BEGUN)), like, source)
    before, own = _beneath(kept, _BEGUN), {_BEGUN: beginning(trainer)}
    if "opt_state" in state and before and kinds(before) == kinds(to_arrays(own)):
        before = from_arrays(before, own, source)
        state["opt_state"] = settled(state["opt_state"], before[_BEGUN], own[_BEGUN])
    projector, params = state.pop("projector"), state["params"]
    if fields:
        own_state = trainer.state if "state" in fields else state["state"]
        state |= _fresh(trainer, params, state["latent"], own_state, fields)
    return with_progress(trainer, Progress(**state), projector=projector)


def _set_otherwise(kept: Mapping[str, Kind], own: Mapping[str, Kind]) -> set[str]:
    """Finds the hyperparameters that one of the two has not, or of another kind."""
    others = set()
    for path in _beneath(kept, _BEGUN) | _beneath(own, _BEGUN):
        in_state = f"opt_state{path.removeprefix(_BEGUN)}"
        # Of the first files it is not known what they began with.
        is_known = (path in kept) == (in_state in kept)
        if is_known and any(kept.get(p) != own.get(p) for p in (path, in_state)):
            others |= {path, in_state}
    return others


def _with_own_settings(
    kept: Mapping[str, NamedArray], own: Mapping[str, NamedArray]
) -> dict[str, NamedArray]:
    """Takes those of the program: what a user sets is configuration."""
    mine = dict(kept)
    for path in _set_otherwise(kinds(kept), kinds(own)):
        there, here = mine.pop(path, None), own.get(path)
        if here is None:
            continue
        if there is not None and there.kind.shape == here.kind.shape:
            # Of another dtype alone: a callback may have changed the number since.
            here = here._replace(array=np.asarray(there.array).astype(here.kind.dtype))
        mine[path] = here
    return mine


def _fresh(
    trainer: AbstractTrainer,
    params: PyTree,
    latent: PyTree,
    state: PyTree,
    fields: tuple[str, ...],
) -> dict[str, PyTree]:
    """Makes fields as those of a trainer that has not taken a step."""
    opt_state = None
    if "opt_state" in fields:
        opt_state = initial_opt_state(trainer.optimiser, params, latent)
    policy_state = jax.tree.map(strong, trainer.nan_policy.init(params))
    new = initial_progress(params, latent, opt_state, policy_state, state)
    return {name: getattr(new, name) for name in fields}


def _beneath(paths: Mapping[str, Any], field: str) -> dict[str, Any]:
    return {path: paths[path] for path in paths if path.split(".")[0] == field}


def _without(paths: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    left_out = set(fields)
    return {path: paths[path] for path in paths if path.split(".")[0] not in left_out}

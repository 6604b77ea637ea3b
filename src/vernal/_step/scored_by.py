"""By what a best was scored, beside the data: losses of other code do not compare."""

import inspect
import weakref
from typing import Any

from .._pickling import digest_of
from .._program import Version, version_of
from .abstract_trainer import (
    AbstractTrainer,
    TrainerT,
    bounds_of,
    overrides,
    own_fields,
    priors_of,
    progress_of,
    stripped,
    template_of,
)
from .objective import defined

# What a class may override, and what then decides which parameters a fit ends at.
_HOOKS = "constrain", "evaluate"

# The code of a trainer as it was when its best was scored, by the id of its mark, as
# long as that array lives: with the trainer, and with what is made of it. A version is
# of one process, so that no file can hold it.
_noted: dict[int, tuple[weakref.ref[Any], Version]] = {}


def scored_parts(trainer: AbstractTrainer) -> dict[str, Any]:
    """Returns what a loss depends on beside the parameters and the data.

    Of the code it has only that of the trainer's own methods.
    """
    priors = priors_of(trainer)
    return {
        "fields": own_fields(trainer),
        "frozen": template_of(trainer).untrained,
        "bounds": bounds_of(trainer),
        # Others may have their numbers in another order in each process.
        "priors": None if priors is None else priors.normal,
        "code": method_digests(trainer) | hook_digests(trainer),
    }


def method_digests(trainer: AbstractTrainer) -> dict[str, str | None]:
    """Returns a digest of the code of each method that a loss comes from."""
    return {name: _digest(trainer, name) for name in defined(trainer)}


def hook_digests(trainer: AbstractTrainer) -> dict[str, str | None]:
    """Returns a digest of the code of each hook that a class overrides."""
    own = [name for name in _HOOKS if overrides(trainer, name)]
    return {name: _digest(trainer, name) for name in own}


def _digest(trainer: AbstractTrainer, name: str) -> str | None:
    fn = inspect.unwrap(getattr(type(trainer), name))
    if (code := getattr(fn, "__code__", None)) is None:
        return None
    first, *others = code.co_consts or (None,)
    if first is not None and first == fn.__doc__:
        code = code.replace(co_consts=(None, *others))
    return digest_of(code).hex()


def noted(trainer: TrainerT) -> TrainerT:
    """Returns a trainer whose best has been scored, and notes its code."""
    mark = progress_of(trainer).scored_on
    if (place := id(mark)) not in _noted:
        gone = weakref.ref(mark, lambda _: _noted.pop(place, None))
        _noted[place] = gone, version_of(stripped(trainer))
    return trainer


def is_of_other_code(trainer: AbstractTrainer) -> bool:
    """Whether the code of a trainer is another than its best was scored by."""
    _, version = _noted.get(id(progress_of(trainer).scored_on), (None, None))
    return version is not None and version is not version_of(stripped(trainer))

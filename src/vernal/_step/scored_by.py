"""By what a best was scored, beside the data: losses of other code do not compare."""

import inspect
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from .._closure import Same, words_in
from .._pickling import digest_of, is_library
from .._program import hash_of_code
from .abstract_trainer import (
    AbstractTrainer,
    TrainerT,
    bijections_of,
    bounds_of,
    overrides,
    own_fields,
    priors_of,
    progress_of,
    template_of,
)
from .objective import METHODS, defined

# What a class may override, and what then decides which parameters a fit ends at.
_HOOKS = "constrain", "evaluate"

# A hash of the code of a trainer as it was when its best was scored, by the id of its
# mark, as long as that array lives. It is of one process, so that no file can hold it.
_noted: dict[int, tuple[weakref.ref[Any], int]] = {}


def scored_parts(
    trainer: AbstractTrainer, by_validation: bool = False
) -> dict[str, Any]:
    """Returns what a loss, or a score, depends on beside the parameters and the data.

    Of the code it has only that of the trainer's own methods.
    """
    priors, (methods, hooks) = priors_of(trainer), digests(trainer)
    if not by_validation:
        hooks.pop("evaluate", None)
    return {
        "fields": own_fields(trainer),
        "frozen": template_of(trainer).untrained,
        "bounds": bounds_of(trainer),
        # Others may have their numbers in another order in each process.
        "priors": None if priors is None else priors.normal,
        "code": methods | hooks,
    }


Digests = dict[str, str | None]


def digests(trainer: AbstractTrainer) -> tuple[Digests, Digests]:
    """Returns digests of the code that a loss comes from, and of the class's hooks."""
    hooks = [name for name in _HOOKS if overrides(trainer, name)]
    of = lambda names: {name: _digest(trainer, name) for name in names}
    return of(defined(trainer)), of(hooks)


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
    if id(progress_of(trainer).scored_on) not in _noted:
        _note(trainer, _code(trainer))
    return trainer


def noted_as(trainer: TrainerT, other: AbstractTrainer) -> TrainerT:
    """Returns a trainer whose best was scored with that of another one."""
    if (known := _noted.get(id(progress_of(other).scored_on))) is not None:
        _note(trainer, known[1])
    return trainer


def _note(trainer: AbstractTrainer, code: int) -> None:
    mark = progress_of(trainer).scored_on
    place = id(mark)
    _noted[place] = weakref.ref(mark, lambda _: _noted.pop(place, None)), code


def is_of_other_code(trainer: AbstractTrainer) -> bool:
    """Whether the code of a trainer is another than its best was scored by."""
    known = _noted.get(id(progress_of(trainer).scored_on))
    return known is not None and known[1] != _code(trainer)


def _code(trainer: AbstractTrainer) -> int:
    """Returns a hash of what the code of a loss is, and reads, beside arrays."""
    read = tuple(map(Same, _read(type(trainer))))
    others = template_of(trainer), bijections_of(trainer), priors_of(trainer)
    return hash_of_code((read, own_fields(trainer), others))


def _read(kind: type) -> Iterator[Any]:
    """Yields what a loss reads of its class; not what a method for a plot reads."""
    names, todo = set[str](), [*METHODS, *_HOOKS]
    bases = [vars(base) for base in kind.__mro__ if not is_library(base)]
    while todo:
        if (name := todo.pop()) in names:
            continue
        names.add(name)
        for members in bases:
            if name in members:
                yield (member := members[name])
                todo += _names_in(member)


def _names_in(member: Any) -> Iterable[str]:
    fn = getattr(member, "fget", None) or getattr(member, "__func__", member)
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return () if code is None else words_in(code)

"""By what a best was scored: losses of other code, or other data, do not compare.

The mark of `data_mark` knows arrays, numbers and text. What else the data have, such as
functions or objects of the user's own, is known by what a program reads of it.
"""

import inspect
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from .._closure import Same, words_in
from .._data import Source
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
from .data_mark import in_source
from .objective import METHODS, defined

# What a class may override, and what then decides which parameters a fit ends at.
_HOOKS = "constrain", "evaluate"

# A hash of the code by which a best was scored, as it was then, by the id of its mark,
# as long as that array lives; `None` for many that differ. It is of one process, so
# that no file can hold it.
_noted: dict[int, tuple[weakref.ref[Any], int | None]] = {}


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


def noted(trainer: TrainerT, code: int) -> TrainerT:
    """Returns a trainer, and notes the code by which its best is scored."""
    _note(trainer, code)
    return trainer


def noted_as(trainer: TrainerT, *others: AbstractTrainer) -> TrainerT:
    """Returns a trainer whose best was scored with that of other ones."""
    marks = (id(progress_of(other).scored_on) for other in others)
    if codes := {_noted[mark][1] for mark in marks if mark in _noted}:
        _note(trainer, codes.pop() if len(codes) == 1 else None)
    return trainer


def _note(trainer: AbstractTrainer, code: int | None) -> None:
    mark = progress_of(trainer).scored_on
    place = id(mark)
    _noted[place] = weakref.ref(mark, lambda _: _noted.pop(place, None)), code


def is_of_other_code(trainer: AbstractTrainer, code: int) -> bool:
    """Whether the best of a trainer is known to be scored by other code."""
    known = _noted.get(id(progress_of(trainer).scored_on))
    return known is not None and known[1] != code


def code_of(trainer: AbstractTrainer, source: Source) -> int:
    """Returns a hash of what the code of a loss is, and reads, beside arrays.

    It reads the trainer, and the source of its data.
    """
    read = tuple(map(Same, _read(type(trainer))))
    others = template_of(trainer), bijections_of(trainer), priors_of(trainer)
    return hash_of_code((read, own_fields(trainer), others, in_source(source)))


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

"""By what a best was scored: losses of other code, or other data, do not compare.

The mark of `data_mark` knows arrays, numbers and text. What else the data have, such as
functions or objects of the user's own, is known by what a program reads of it.
"""

import inspect
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

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


class Scorer(NamedTuple):
    """What a best was scored by, as hashes that only this process would find again.

    - `code`: that of the code of the loss, and of what it reads in the trainer.
    - `data`: that of the data, beside arrays.
    """

    code: int
    data: int


# What scored a best, or that of each member, by the id of its mark, as long as that
# array lives.
_noted: dict[int, tuple[weakref.ref[Any], tuple[Scorer | None, ...]]] = {}


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


def scorer_of(trainer: AbstractTrainer, source: Source) -> Scorer:
    """Returns what scores a trainer on a source of data, as it is now."""
    return Scorer(code_of(trainer), data_code_of(source))


def data_code_of(source: Source) -> int:
    """Returns a hash of what data are beside arrays, and of what their code reads."""
    return hash_of_code(in_source(source))


def code_of(trainer: AbstractTrainer) -> int:
    """Returns a hash of what the code of a loss is, and reads, beside arrays."""
    read = tuple(map(Same, _read(type(trainer))))
    others = template_of(trainer), bijections_of(trainer), priors_of(trainer)
    return hash_of_code((read, own_fields(trainer), others))


def noted(trainer: TrainerT, scorer: Scorer) -> TrainerT:
    """Returns a trainer, and notes what scores its best."""
    _note(trainer, (scorer,))
    return trainer


def noted_as(trainer: TrainerT, *others: AbstractTrainer) -> TrainerT:
    """Returns a trainer whose best was scored as those of others: its members."""
    if any(scorers := [x for other in others for x in _scorers_of(other)]):
        _note(trainer, tuple(scorers))
    return trainer


def noted_as_member(trainer: TrainerT, stacked: AbstractTrainer, i: int) -> TrainerT:
    """Returns a trainer whose best was scored as that of a member of many."""
    scorers = _scorers_of(stacked)
    scorer = scorers[i if len(scorers) > 1 else 0]
    return trainer if scorer is None else noted(trainer, scorer)


def _note(trainer: AbstractTrainer, scorers: tuple[Scorer | None, ...]) -> None:
    mark = progress_of(trainer).scored_on
    place = id(mark)
    _noted[place] = weakref.ref(mark, lambda _: _noted.pop(place, None)), scorers


def _scorers_of(trainer: AbstractTrainer) -> tuple[Scorer | None, ...]:
    """Returns what scored a best, if that is known; one may stand for all members."""
    known = _noted.get(id(progress_of(trainer).scored_on))
    return (None,) if known is None else known[1]


def is_of_other_code(trainer: AbstractTrainer) -> bool:
    """Whether the best of a trainer was scored by other code than that of now."""
    known = [scorer.code for scorer in _scorers_of(trainer) if scorer is not None]
    return bool(known) and {code_of(trainer)} != {*known}


def is_scored_otherwise(
    trainer: AbstractTrainer, scorer: Scorer
) -> bool | Bool[np.ndarray, " members"]:
    """Whether a best, or that of each member, was scored by something else."""
    flags = np.array([known not in (None, scorer) for known in _scorers_of(trainer)])
    return flags if flags.size > 1 else bool(flags.all())


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

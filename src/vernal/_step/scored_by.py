"""By what a best was scored: losses of other code, or other data, do not compare.

A mark knows arrays, numbers and text, and goes into files. What else the data have,
such as functions or objects of the user's own, is known by what a program reads of it.
"""

import dataclasses
import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from .._boundary import OfObjects, PyTree, is_traced
from .._closure import Same, words_in
from .._data import Minibatches, Source, Stream
from .._pickling import digest_of, is_library
from .._program import chosen, hash_of_code
from .._tree import LeafSum, choose, leaf_sums, row_sums
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
from .progress import UNKNOWN, Best, Progress, held_best

# Stands for batches that Python hands over one by one: these compare.
_ONE_BY_ONE = "one by one", 1


def data_mark(source: Source, parts: Mapping[str, Any]) -> int:
    """Returns a number for all that the losses of a fit depend on beside the model.

    This is the source of its batches, and the parts of a trainer that score them.
    """
    seen = in_source(source)
    seen = _ONE_BY_ONE if is_traced(seen) else seen
    parts = compared(seen, parts)
    (mark,) = _marks(leaf_sums((seen, {} if is_traced(parts) else parts)), 1)
    return mark


def compared(seen: Any, parts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Picks the parts that count: of single batches, as of `step`, only own fields."""
    return {"fields": parts["fields"]} if seen is _ONE_BY_ONE else parts


def in_source(source: Source) -> Any:
    """Returns what the batches of a source are made of."""
    if isinstance(source, Stream):
        return _ONE_BY_ONE
    if isinstance(source, Minibatches):
        return {"minibatches of": source.arrays, "size": source.size}
    return source.batch


def marks_of_rows(rows: PyTree, shared: PyTree, members: int) -> list[int]:
    """Returns the mark of each of many members, each of which has a row.

    `rows` and `shared` are pairs as `data_mark` makes of a source and its parts, with
    `None` for the arrays that the other one has.
    """
    sums = leaf_sums(shared) + row_sums(eqx.filter(rows, eqx.is_array))
    return _marks(sums, members)


def _marks(sums: list[LeafSum], members: int) -> list[int]:
    sums = sorted(sums, key=lambda leaf: (leaf.path, leaf.kind))
    names = zlib.crc32(repr([leaf[:2] for leaf in sums]).encode())
    columns = [np.broadcast_to(np.asarray(leaf.total), members) for leaf in sums]
    table = np.stack(columns, axis=1) if columns else np.zeros((members, 0))
    rows = table.astype(np.uint32)
    return [max(zlib.crc32(row.tobytes(), names), 1) for row in rows]


BATCH_BY_BATCH = _marks(leaf_sums((_ONE_BY_ONE, {})), 1)[0]
"""The mark of the batches of single steps."""


def begun_on(
    progress: Progress,
    marks: Any,
    by_validation: bool,
    stopped: Any,
    is_scored_otherwise: bool | Bool[np.ndarray, " members"],
    on_host: Callable[[Array], np.ndarray],
) -> Progress:
    """Returns the progress for a fit that scores on data with these marks.

    A best of other data, or code, or that was scored otherwise, is dropped. Of a member
    that has `stopped` only its loss is: it has no other best.
    """
    known, validated = map(on_host, (progress.scored_on, progress.is_validated))
    is_other = (known != UNKNOWN) & ((known != marks) | is_scored_otherwise)
    is_other |= validated != by_validation
    marked = jax.device_put(np.asarray(marks, known.dtype))
    if not is_other.any():
        return dataclasses.replace(progress, scored_on=marked)
    infinite = np.full(known.shape, np.inf, progress.best_loss.dtype)
    new = Best(progress.params, progress.state, jax.device_put(infinite))
    old = held_best(progress)._replace(best_loss=new.best_loss)
    best = _chosen(is_other, _chosen(is_other & stopped, old, new), held_best(progress))
    return dataclasses.replace(
        progress,
        **best._asdict(),
        is_validated=jax.device_put(np.full(known.shape, by_validation)),
        scored_on=marked,
    )


def _chosen(flags: Any, new: Best, old: Best) -> Best:
    """Takes the new rows where they are flagged."""
    if flags.all() or not flags.any():
        return new if flags.any() else old
    return choose(flags, new, old)


def stepped_on(
    progress: Progress, mark: int | UInt32[Array, ""], is_scored_otherwise: Any = False
) -> Progress:
    """Does the same within a program, of one trainer, unless that has stopped."""
    mark, known = jnp.asarray(mark, jnp.uint32), progress.scored_on
    is_other = (known != UNKNOWN) & ((known != mark) | is_scored_otherwise)
    is_other |= progress.is_validated
    is_other &= ~progress.stopped
    best = chosen(
        is_other,
        lambda: Best(
            progress.params, progress.state, jnp.full_like(progress.best_loss, jnp.inf)
        ),
        lambda: held_best(progress),
        reads=held_best(progress),
    )
    return dataclasses.replace(
        progress,
        **best._asdict(),
        is_validated=progress.is_validated & ~is_other,
        scored_on=jnp.where(progress.stopped, known, mark),
    )


# What a class may override, and what then decides which parameters a fit ends at.
_HOOKS = "constrain", "evaluate"


class Scorer(NamedTuple):
    """What a best was scored by, as hashes that only this process would find again.

    - `code`: that of the code of the loss, and of what it reads in the trainer.
    - `data`: that of the data, beside arrays.
    """

    code: int
    data: int


# What scored a best, or that of each member, by its mark, as long as that array lives.
_noted = OfObjects[tuple[Scorer | None, ...]]()


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
    _noted.put(progress_of(trainer).scored_on, (scorer,))
    return trainer


def noted_as(trainer: TrainerT, *others: AbstractTrainer) -> TrainerT:
    """Returns a trainer whose best was scored as those of others: its members."""
    if any(scorers := [x for other in others for x in _scorers_of(other)]):
        _noted.put(progress_of(trainer).scored_on, tuple(scorers))
    return trainer


def noted_as_member(trainer: TrainerT, stacked: AbstractTrainer, i: int) -> TrainerT:
    """Returns a trainer whose best was scored as that of a member of many."""
    scorers = _scorers_of(stacked)
    scorer = scorers[i if len(scorers) > 1 else 0]
    return trainer if scorer is None else noted(trainer, scorer)


def _scorers_of(trainer: AbstractTrainer) -> tuple[Scorer | None, ...]:
    """Returns what scored a best, if that is known; one may stand for all members."""
    return _noted.get(progress_of(trainer).scored_on) or (None,)


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

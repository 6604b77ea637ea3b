"""What of a model is not trained, by which `load` notices another one."""

import json
from collections.abc import Mapping
from typing import Any

import jax

from .._step import AbstractTrainer, member_axes, template_of
from .._tree import is_part, row_sums, to_arrays
from .origin import STATIC, sums, sums_of_statics

# A header with more could be longer than that of a file may be.
_MOST_BYTES = 2**19


def untrained(trainer: AbstractTrainer) -> dict[str, list[Any]] | None:
    """Returns checksums of what is not trained, by path; `None` if they are too many.

    A leaf has several, one of which it shares with each that is the same, and none if
    they depend on how it is split over processes.
    """
    tree = template_of(trainer).untrained
    whole = jax.tree.map(lambda x: None if is_part(x) else x, tree)
    marks: dict[str, list[Any]] = {path: [] for path in to_arrays(tree)}
    found = sums(whole) | sums_of_statics(tree)
    marks |= {path: [mark] for path, mark in found.items()}
    if trainer.step_count.ndim:
        # What all members share may have a row for each of them, or one for all.
        axes = member_axes(trainer.step_count)
        rows = jax.tree.map(lambda x: None if axes(x) is None else x, whole)
        for path, kind, totals in row_sums(rows):
            if (totals == totals[0]).all():
                marks[path].append([str(kind), int(totals[0])])
    return marks if len(json.dumps(marks)) <= _MOST_BYTES else None


def as_untrained(header: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """Reads it from a header, in which anything may be."""
    marks = header.get("untrained")
    return None if marks is None else {p: [*own] for p, own in marks.items()}


def others(
    old: dict[str, list[Any]] | None, new: dict[str, list[Any]] | None
) -> list[str]:
    """Lists the paths of what differs, if both are known."""
    if old is None or new is None:
        return []
    return [path for path in old | new if not _is_same(old.get(path), new.get(path))]


def _is_same(old: list[Any] | None, new: list[Any] | None) -> bool:
    if old is None or new is None:
        # A static field may be new, or have had a function.
        marks = old or new or []
        return all(isinstance(mark, list) and mark[:1] == [STATIC] for mark in marks)
    return not old or not new or any(mark in new for mark in old)

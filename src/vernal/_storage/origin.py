"""What a fit is of, by which a checkpoint, or a file, of another fit is noticed."""

import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from .._closure import plain_statics
from .._data import Minibatches, Source, Whole
from .._step import (
    AbstractTrainer,
    bounds_of,
    digests,
    member_axes,
    own_fields,
    priors_of,
    template_of,
)
from .._tree import is_part, leaf_sums, row_sums, to_arrays

_STATIC = "static"
"""The kind of a static field, among those of arrays."""

# A header with more checksums could be longer than that of a file may be.
_MOST_BYTES = 2**19

_SAID = {
    "model": "with another value of {!r}, which is not trained",
    "model_statics": "with another value of {!r}, which is not trained",
    "fields": "with another field `{}` of the trainer",
    "field_statics": "with another field `{}` of the trainer",
}


def origin(trainer: AbstractTrainer, source: Source) -> dict[str, Any]:
    """Returns checksums of all that a fit is of beside its parameters, for JSON."""
    (methods, hooks), data, order = digests(trainer), None, None
    model, fields = template_of(trainer).untrained, own_fields(trainer)
    if isinstance(source, Minibatches):
        data = sums(source.arrays)
        order = sums({"key": source.key}) | {"size": [_STATIC, source.size]}
    elif isinstance(source, Whole):
        data = sums(source.batch)
    return {
        "class": type(trainer).__name__,
        # Another version of Python compiles the same text to other code.
        "methods": {"python": "{}.{}".format(*sys.version_info), **methods},
        "hooks": hooks,
        "priors": _of_priors(trainer),
        "bounds": sums(bounds_of(trainer)),
        "model": sums(model),
        "model_statics": sums_of_statics(model),
        "fields": sums(fields),
        "field_statics": sums_of_statics(fields),
        "data": data,
        "order": order,
    }


def _of_priors(trainer: AbstractTrainer) -> dict[str, Any]:
    priors = priors_of(trainer)
    if priors is None:
        return {}
    # NumPyro's distributions have their numbers in another order in each process.
    others = {
        path: [type(prior.decode()).__name__, *sorted(sums(prior).values(), key=str)]
        for path, prior in priors.others.items()
    }
    return others | sums(priors.normal)


def sums(tree: Any) -> dict[str, Any]:
    """Returns checksums of leaves, by path."""
    return {path: [str(kind), total] for path, kind, total in leaf_sums(tree)}


def sums_of_statics(tree: Any) -> dict[str, Any]:
    """Returns checksums of the static fields that have a plain value, by path."""
    return {
        path: [_STATIC, zlib.crc32(ascii(value).encode())]
        for path, value in plain_statics(tree).items()
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yields in words how a fit differs from an earlier one."""
    if old["class"] != new["class"]:
        yield f"of the class `{old['class']}`"
    before, now = old["methods"], new["methods"]
    if before["python"] == now["python"]:
        # Checkpoints of earlier versions do not say.
        before, now = before | old.get("hooks", new["hooks"]), now | new["hooks"]
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                yield f"with another `{name}`"
    for name in ("priors", "bounds"):
        if old.get(name, new[name]) != new[name]:
            yield f"with other `{name}`"
    for name, said in _SAID.items():
        if (path := _other(old.get(name), new[name])) is not None:
            yield said.format(path)
    if (path := _other(old["data"], new["data"])) is not None:
        yield "of other data (`data` differs" + (f" at {path!r})" if path else ")")
    # Nor do those of earlier versions say.
    if (path := _other(old.get("order"), new["order"])) is not None:
        yield f"with another `{path}` of `Minibatches`"


def _other(before: Any, now: Any) -> str | None:
    """Finds the path of an array that differs, if both are known."""
    if before is None or now is None:
        return None
    paths = (p for p in (*now, *before) if not _is_same(before.get(p), now.get(p)))
    return next(paths, None)


def _is_same(old: Any, new: Any) -> bool:
    if old is None or new is None:
        # Other versions of a library may have fewer static fields.
        known = old if new is None else new
        return known is not None and known[0] == _STATIC
    # Earlier versions had no checksum where a process has only a part of an array.
    return old[0] == new[0] and (None in (old[1], new[1]) or old[1] == new[1])


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
    return [path for path in old | new if not _is_one(old.get(path), new.get(path))]


def _is_one(old: list[Any] | None, new: list[Any] | None) -> bool:
    if old is None or new is None:
        # A static field may be new, or have had a function.
        marks = old or new or []
        return all(isinstance(mark, list) and mark[:1] == [_STATIC] for mark in marks)
    return not old or not new or any(mark in new for mark in old)

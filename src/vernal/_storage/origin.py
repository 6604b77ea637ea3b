"""What a fit is of, by which a checkpoint, or a file, of another fit is noticed."""

import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
from .._tree import by_path, is_part, leaf_sums, row_sums, to_arrays

_STATIC = "static"
"""The kind of a static field, among those of arrays."""

# A header with more checksums could be longer than that of a file may be.
_MOST_BYTES = 2**19

# Of each parameter the means of so many pieces, and their first elements, say where a
# fit begins.
_PIECES = 8

# By so much of its size a start may differ: machines round what they compute.
_ROUNDED = 1e-4

_SAID = {
    "model": "with another value of {!r}, which is not trained",
    "model_statics": "with another value of {!r}, which is not trained",
    "fields": "with another field `{}` of the trainer",
    "field_statics": "with another field `{}` of the trainer",
}


def origin(
    trainer: AbstractTrainer, source: Source, validation: Any = None
) -> dict[str, Any]:
    """Returns checksums of all that a fit is of, and a sketch of its start, for JSON.

    `validation` is the batch of the validation, if there is one.
    """
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
        "validation": None if validation is None else sums(validation),
        "key": sums(trainer.key),
        "step": int(np.max(jax.device_get(trainer.step_count))),
        "start": _sketches(trainer.params),
    }


def _sketches(params: Any) -> dict[str, list[float]]:
    """Returns what is told of the start of each parameter, by path."""
    named = by_path(params).items()
    found = {path: _sketch(array) for path, array in named if not is_part(array)}
    return {path: sketch for path, sketch in found.items() if np.isfinite(sketch).all()}


def _sketch(array: Any) -> list[float]:
    """Returns how far others may be apart, the root mean square, and some numbers."""
    numbers = np.asarray(array).ravel()
    if np.iscomplexobj(numbers):
        numbers = np.concatenate([np.real(numbers), np.imag(numbers)])
    pieces = np.array_split(numbers, _PIECES)
    pieces = [piece.astype(np.float64) for piece in pieces if piece.size]
    squares = sum(float(piece @ piece) for piece in pieces)
    size = (squares / max(numbers.size, 1)) ** 0.5
    apart = size * max(_ROUNDED, 16 * float(jnp.finfo(numbers.dtype).eps))
    firsts = [float(piece[0]) for piece in pieces]
    return [apart, size, *(float(piece.mean()) for piece in pieces), *firsts]


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
    if (path := _other(old.get("validation"), new["validation"])) is not None:
        yield "scored on other data (`validation` differs" + (
            f" at {path!r})" if path else ")"
        )
    if _other(old.get("key"), new["key"]) is not None:
        yield "with another `key`"
    if old.get("step") == new["step"] and (path := _moved(old["start"], new["start"])):
        yield f"from another start ({path!r} of the model differs)"


def _moved(before: Mapping[str, list[float]], now: Mapping[str, list[float]]) -> str:
    """Finds the path of a parameter that starts elsewhere."""
    for path in filter(before.__contains__, now):
        (one, *old), (other, *new) = before[path], now[path]
        is_alike = len(old) == len(new)  # else an error tells of the shapes
        if is_alike and np.abs(np.subtract(old, new)).max() > max(one, other):
            return path
    return ""


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

"""What a fit is of, by which a checkpoint of another fit is noticed."""

import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from .._closure import plain_statics
from .._data import Minibatches, Source, Stream, Whole
from .._step import (
    AbstractTrainer,
    bounds_of,
    digests,
    own_fields,
    priors_of,
    template_of,
)
from .._tree import leaf_sums

STATIC = "static"
"""The kind of a static field, among those of arrays."""

_SAID = {
    "model": "with another value of {!r}, which is not trained",
    "model_statics": "with another value of {!r}, which is not trained",
    "fields": "with another field `{}` of the trainer",
    "field_statics": "with another field `{}` of the trainer",
}


def origin(trainer: AbstractTrainer, source: Source) -> dict[str, Any]:
    """Returns checksums of all that a fit is of beside its parameters, for JSON."""
    (methods, hooks), data = digests(trainer), None
    model, fields = template_of(trainer).untrained, own_fields(trainer)
    if not isinstance(source, Stream):
        arrays = source.batch if isinstance(source, Whole) else source.arrays
        data = sums(arrays)
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
        "order": _order(source),
    }


def _order(source: Source) -> dict[str, Any] | None:
    """Returns what the order of minibatches comes from, `None` without any."""
    if not isinstance(source, Minibatches):
        return None
    return sums({"key": source.key}) | {"size": [STATIC, source.size]}


def _of_priors(trainer: AbstractTrainer) -> dict[str, Any]:
    priors = priors_of(trainer)
    if priors is None:
        return {}
    # NumPyro's distributions have their numbers in another order in each process.
    others = {
        path: [
            type(prior.decode()).__name__,
            *sorted(sums(prior).values(), key=str),
        ]
        for path, prior in priors.others.items()
    }
    return others | sums(priors.normal)


def sums(tree: Any) -> dict[str, Any]:
    """Returns checksums of leaves, by path."""
    return {path: [str(kind), total] for path, kind, total in leaf_sums(tree)}


def sums_of_statics(tree: Any) -> dict[str, Any]:
    """Returns checksums of the static fields that have a plain value, by path."""
    return {
        path: [STATIC, zlib.crc32(ascii(value).encode())]
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
        return known is not None and known[0] == STATIC
    # Earlier versions had no checksum where a process has only a part of an array.
    return old[0] == new[0] and (None in (old[1], new[1]) or old[1] == new[1])

"""What a fit is of, by which a checkpoint of another fit is noticed."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from .._data import Source, Stream, Whole
from .._step import (
    AbstractTrainer,
    bounds_of,
    digests,
    own_fields,
    priors_of,
    template_of,
)
from .._tree import leaf_sums


def origin(trainer: AbstractTrainer, source: Source) -> dict[str, Any]:
    """Returns checksums of all that a fit is of beside its parameters, for JSON."""
    (methods, hooks), data = digests(trainer), None
    if not isinstance(source, Stream):
        arrays = source.batch if isinstance(source, Whole) else source.arrays
        data = _sums(arrays)
    return {
        "class": type(trainer).__name__,
        # Another version of Python compiles the same text to other code.
        "methods": {"python": "{}.{}".format(*sys.version_info), **methods},
        "hooks": hooks,
        "priors": _of_priors(trainer),
        "bounds": _sums(bounds_of(trainer)),
        "model": _sums(template_of(trainer).untrained),
        "fields": _sums(own_fields(trainer)),
        "data": data,
    }


def _of_priors(trainer: AbstractTrainer) -> dict[str, Any]:
    priors = priors_of(trainer)
    if priors is None:
        return {}
    # NumPyro's distributions have their numbers in another order in each process.
    others = {
        path: [
            type(prior.decode()).__name__,
            *sorted(_sums(prior).values(), key=str),
        ]
        for path, prior in priors.others.items()
    }
    return others | _sums(priors.normal)


def _sums(tree: Any) -> dict[str, Any]:
    return {path: [str(kind), total] for path, kind, total in leaf_sums(tree)}


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
    if (path := _other(old.get("model"), new["model"])) is not None:
        yield f"with another value of {path!r}, which is not trained"
    if (path := _other(old.get("fields"), new["fields"])) is not None:
        yield f"with another field `{path}` of the trainer"
    if (path := _other(old["data"], new["data"])) is not None:
        yield "of other data (`data` differs" + (f" at {path!r})" if path else ")")


def _other(before: Any, now: Any) -> str | None:
    """Finds the path of an array that differs, if both are known."""
    if before is None or now is None:
        return None
    paths = (p for p in (*now, *before) if not _is_same(before.get(p), now.get(p)))
    return next(paths, None)


def _is_same(old: Any, new: Any) -> bool:
    if old is None or new is None:
        return False
    # Earlier versions had no checksum where a process has only a part of an array.
    return old[0] == new[0] and (None in (old[1], new[1]) or old[1] == new[1])

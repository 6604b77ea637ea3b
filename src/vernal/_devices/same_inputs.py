"""Fingerprints, by which processes find out whether they were given the same."""

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax

from .._boundary import PyTree, unaddressed
from .._program import Version, version_of
from .._step import AbstractTrainer, advance, live, score, step_key
from .._tree import checksum, to_arrays
from .placement import AbstractPlacement
from .processes import Peers

# Larger arrays that a step returned are not copied from the devices for the next one.
_MAX_BYTES = 4_096

_programs: weakref.WeakKeyDictionary[Version, str] = weakref.WeakKeyDictionary()


# Where there is one process: quick, since every step asks for it.
_ALONE = contextlib.nullcontext(lambda *_, **others: None)


def fingerprint(text: Any) -> str:
    """Hashes a text, without the addresses of objects in it."""
    return hashlib.sha256(unaddressed(str(text)).encode()).hexdigest()


def leaf_fingerprints(tree: PyTree, max_bytes: int | None = None) -> dict[str, str]:
    """Returns the kind and the checksum of each array of a tree, by path.

    There is no checksum where a process has only a part of an array, or where an array
    on devices of several processes has more than `max_bytes`.
    """
    arrays = to_arrays(tree)
    cheap = {p: leaf for p, leaf in arrays.items() if _is_cheap(leaf.array, max_bytes)}
    sums = {path: checksum(leaf.array) for path, leaf in cheap.items()}
    return {path: f"{leaf.kind} {sums.get(path)}" for path, leaf in arrays.items()}


def _is_cheap(array: Any, max_bytes: int | None) -> bool:
    is_local = not isinstance(array, jax.Array) or array.is_fully_addressable
    return is_local or max_bytes is None or array.nbytes <= max_bytes


def same_inputs(
    entrance: str, place: AbstractPlacement
) -> contextlib.AbstractContextManager[Callable[..., None]]:
    """Gives a function that raises if another process has other inputs.

    Call it as `require_same(trainer, batch, **others)` before the processes compute
    together; for many trainers, with the shapes of a single one as `like`. If a process
    raises before that, the others raise too.
    """
    if place.mesh is None:
        return _ALONE
    peers = Peers(place.mesh, entrance)
    return _among(peers) if peers.are_many else _ALONE


@contextlib.contextmanager
def _among(peers: Peers) -> Iterator[Callable[..., None]]:

    def require_same(
        trainer: AbstractTrainer, batch: Any, like: Any = None, /, **others: Any
    ) -> None:
        given = {
            "class": type(trainer).__qualname__,
            **{name: _short(other) for name, other in others.items()},
            "trainer": leaf_fingerprints(trainer, _MAX_BYTES),
            "batch": leaf_fingerprints(batch, _MAX_BYTES),
            "program": _program_fingerprint(*(like or (trainer, batch))),
        }
        peers.require_same(given)

    with peers:
        yield require_same


def _short(other: Any) -> Any:
    return other if other is None or isinstance(other, int) else fingerprint(other)


def _program_fingerprint(trainer: AbstractTrainer, batch: Any) -> str:
    version = version_of((trainer, batch))
    known = _programs.get(version)
    if known is None:
        jaxpr = eqx.filter_make_jaxpr(_compute)(trainer, batch)[0]
        known = _programs[version] = fingerprint(jaxpr)
    return known


def _compute(trainer: AbstractTrainer, batch: Any) -> Any:
    if trainer.optimiser is not None:
        return advance(trainer, batch)[0]
    return score(live(trainer, trainer.params), batch, step_key(trainer)).loss

"""How processes meet before `step` and `solve`, as they do before a fit."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx

from .._program import Version, version_of
from .._step import AbstractTrainer, advance, live, score, step_key
from .placement import Placement
from .processes import Peers, described, fingerprint

# Larger arrays that a step returned are not copied from the devices for the next one.
_MOST_BYTES = 4_096

_programs: weakref.WeakKeyDictionary[Version, str] = weakref.WeakKeyDictionary()

Agree = Callable[..., None]


@contextlib.contextmanager
def meeting(entrance: str, place: Placement | None) -> Iterator[Agree]:
    """Yields a function that raises where another process was given something else.

    Call it as `agree(trainer, batch, **others)` before the processes compute together;
    for many trainers, with the shapes of a single one as `like`. If a process raises
    before that, the others raise too.

    **Arguments:**

    - `entrance`: what the user has called, by name.
    - `place`: where it takes place.
    """
    peers = Peers(place and place.mesh, entrance)
    if not peers.are_many:
        yield lambda *_, **others: None
        return

    def agree(
        trainer: AbstractTrainer, batch: Any, like: Any = None, /, **others: Any
    ) -> None:
        given = {
            "class": type(trainer).__qualname__,
            **{name: _short(other) for name, other in others.items()},
            "trainer": described(trainer, _MOST_BYTES),
            "batch": described(batch, _MOST_BYTES),
            "program": _program(*(like or (trainer, batch))),
        }
        peers.require_same(given)

    with peers:
        yield agree


def _short(other: Any) -> Any:
    return other if other is None or isinstance(other, int) else fingerprint(other)


def _program(trainer: AbstractTrainer, batch: Any) -> str:
    """Returns a fingerprint of what is computed."""
    version = version_of((trainer, batch))
    known = _programs.get(version)
    if known is None:
        jaxpr = eqx.filter_make_jaxpr(_computed)(trainer, batch)[0]
        known = _programs[version] = fingerprint(jaxpr)
    return known


def _computed(trainer: AbstractTrainer, batch: Any) -> Any:
    if trainer.optimiser is not None:
        return advance(trainer, batch)[0]
    there = live(trainer, trainer.params)
    return score(there, batch, step_key(trainer)).loss

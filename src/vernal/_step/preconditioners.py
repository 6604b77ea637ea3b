"""The projectors within an optimiser, as `precondition` holds them."""

import functools as ft
import types
from typing import Any

import equinox as eqx

from .._closure import Closure
from .._constraints import Bijections
from .._pickling import content_of
from .._projection import EigenProjector
from .._tree import paths


def check_coordinates(optimiser: Any, bijections: Bijections | None) -> None:
    """Refuses a `precondition` in other coordinates than those that a fit moves.

    These are free coordinates where there is a bijection, and parameters elsewhere.
    """
    free = () if bijections is None else bijections.maps
    for projector in preconditioners(optimiser):
        moved = [name for name in paths(projector.origin) if name in free]
        if moved and not projector.is_of_free:
            raise ValueError(
                "`optimiser` has a `precondition` by a projector of the parameters, "
                f"and the fit moves the free coordinates of {moved[0]!r}, which has a "
                "bijection in `bounds`. Take `trainer.whiten(batch).projector`, of a "
                "trainer with these `bounds`."
            )
        if projector.is_of_free and not free:
            raise ValueError(
                "`optimiser` has a `precondition` by a projector of free coordinates, "
                "made by a trainer with a bijection in `bounds`, and this one has "
                "none. Take `trainer.whiten(batch).projector`, of a trainer without it."
            )


def preconditioners(optimiser: Any) -> list[EigenProjector]:
    """Returns the projectors of the `precondition`s in an optimiser."""
    found: list[EigenProjector] = []
    waiting, seen = [optimiser], {}
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        kind = type(part)
        if kind is EigenProjector:
            found.append(part)
        elif kind is Closure:
            waiting.append(part.decode())
        elif kind is types.FunctionType:
            for cell in part.__closure__ or ():
                waiting += content_of(cell)
        elif kind is types.MethodType:
            waiting.append(part.__self__)
        elif kind is ft.partial:
            waiting += [part.func, *part.args]
        elif issubclass(kind, eqx.Module | dict):
            waiting += (part if issubclass(kind, dict) else vars(part)).values()
        elif issubclass(kind, tuple | list):
            waiting += part
    return found

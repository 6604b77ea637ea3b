"""A warning of integers that index beyond a parameter."""

import weakref
from collections.abc import Callable
from typing import Any

import jax

from .._boundary import PyTree, integers_at_hand, spelled_leaves, warn_once
from .._program import LookUp, Version, jaxpr_of, look_ups, version_of
from .._tree import by_path, shape_and_dtype
from .abstract_trainer import AbstractTrainer
from .traced_loss import inputs_of, loss_at, places_of_arrays


def warn_of_look_ups(
    data: PyTree, name: str, seen: Callable[[], tuple[AbstractTrainer, Any]]
) -> None:
    """Warns, once for a class, of data that index beyond a parameter.

    Such as instruments that are numbered from 1. `seen` returns a trainer, and a batch
    of the data as it sees it, or their shapes.
    """
    integers = integers_at_hand(data).items()
    ends = {i: (int(x.min()), int(x.max())) for i, x in integers if x.size}
    if not ends:
        return
    trainer, batch = seen()
    shapes = [leaf.shape for leaf in jax.tree.leaves(trainer.params)]
    # Most models have no parameter that these could index.
    is_out = lambda low, high: any(low < -n or high >= n for n in sum(shapes, ()))
    if not any(is_out(*both) for both in ends.values()):
        return
    leaves, places = list(spelled_leaves(name, data)), places_of_arrays(batch)
    for found in sorted(_look_ups(trainer, batch, places)):
        place = places[found.integers]
        if beyond := _beyond(found, *ends.get(place, (found.low, found.high))):
            names, (end, edge) = by_path(trainer.params).names, beyond
            of, (where, _) = [repr(names[i]) for i in found.arrays], leaves[place]
            warn_once(
                f"{where} has numbers {end}, and indexes {' and '.join(of)} by them "
                f"along an axis of {found.size}, where {edge} that is within. JAX "
                "raises no error, and takes the nearest element. The first index is 0. "
                'If it is on purpose, write `array.at[index].get(mode="clip")`.',
                UserWarning,
                of=(warn_of_look_ups, weakref.ref(type(trainer)), where, found),
            )


def _beyond(found: LookUp, low: int, high: int) -> tuple[str, str] | None:
    """Says how far numbers from `low` to `high` go, and how far they may, if less."""
    if high > found.high:
        return f"up to {high}", f"{found.high} is the largest"
    if low < found.low:
        return f"down to {low}", f"{found.low} is the least"
    return None


def _look_ups(
    trainer: AbstractTrainer, batch: Any, places: list[int]
) -> frozenset[LookUp]:
    """Finds what arrays of a batch index; what is known is not looked for again."""
    kinds = tuple(map(shape_and_dtype, jax.tree.leaves((trainer, batch))))
    known = _known.setdefault(version_of((trainer, batch)), {})
    if kinds not in known:
        params, known[kinds] = trainer.params, frozenset()
        jaxpr = jaxpr_of(loss_at, params, trainer, batch)
        if jaxpr is not None:
            own = jaxpr.invars[: len(jax.tree.leaves(params))]
            known[kinds] = look_ups(jaxpr, inputs_of(jaxpr, places), own)
    return known[kinds]


# By the code that a version is of: a script may fit many times.
_known: weakref.WeakKeyDictionary[Version, dict[Any, frozenset[LookUp]]]
_known = weakref.WeakKeyDictionary()

"""A model taken apart: trained parameters, frozen arrays, and what is not an array."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._closure import Closure, StaticData, refuse_static_arrays
from .._constraints import Bijections, Ties
from .._pickling import PlainMethods, Portable
from .._tree import is_inexact, owned, strong


class ModelTemplate(Portable, PlainMethods, eqx.Module):
    """A model without its trained parameters.

    Arrays are leaves; everything else (functions, Python numbers, strings) is static
    and compared by value. So it goes through plain `jax.jit`, whatever leaves the model
    has.
    """

    frozen: tuple[Any, ...]
    others: Closure
    ties: Ties | None
    bijections: Bijections | Any
    """Where the parameters are coordinates, the maps to the model's own: `RealParts`
    for derivatives, else `Bijections`."""
    kinds: tuple[str, ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)
    statics: StaticData = eqx.field(static=True)

    def __init__(
        self, model: Any, owners: Sequence[int | None], ties: Ties | None = None
    ):
        """`owners` has `None` for each leaf of the model that is not trained."""
        leaves, self.structure = jax.tree.flatten(model)
        self.statics = StaticData(self.structure)
        self.ties, self.bijections = ties, None
        for index in () if ties is None else ties.indices:
            leaves[index] = strong(leaves[index])
        refuse_static_arrays(model)
        self.kinds = tuple(map(_kind, leaves, owners))
        pairs = list(zip(leaves, self.kinds, strict=True))
        of = lambda kind: [leaf for leaf, own in pairs if own == kind]
        self.frozen = tuple(map(owned, of("frozen")))
        self.others = Closure.encode(tuple(of("other")))

    def join(self, params: Any) -> Any:
        """Puts the model together again around the parameters."""
        if self.bijections is not None:
            params = self.bijections.forward(params)
        leaves = self._leaves(jax.tree.leaves(params))
        if self.ties is not None:
            leaves = self.ties.set(leaves, self.structure)
        return self.structure.unflatten(leaves)

    def _leaves(self, trained: Iterable[Any]) -> list[Any]:
        # `equinox.tree_at` has leaves in the place of empty tuples.
        frozen = self.frozen if "frozen" in self.kinds else ()
        parts = {"trained": trained, "frozen": frozen}
        parts["other"] = self.others.decode()
        sources = {kind: iter(leaves) for kind, leaves in parts.items()}
        return [next(sources[kind]) for kind in self.kinds]

    @property
    def untrained(self) -> Any:
        """The leaves that are neither trained nor follow others, `None` elsewhere."""
        leaves = self._leaves(itertools.repeat(None))
        for index in () if self.ties is None else self.ties.indices:
            leaves[index] = None
        return self.structure.unflatten(leaves)

    def trained(self, model: Any) -> Any:
        """Picks the model's own parameters out of another one of its structure."""
        leaves = zip(self.structure.flatten_up_to(model), self.kinds, strict=True)
        return self.structure.unflatten(
            [leaf if kind == "trained" else None for leaf, kind in leaves]
        )


def _kind(leaf: Any, owner: int | None) -> str:
    if owner is not None:
        return "trained"
    is_numeric = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufcV"
    # NumPy's scalars of integers stay as they are: one may be the size of an array.
    is_array = isinstance(leaf, jax.Array) or is_numeric or is_inexact(leaf)
    return "frozen" if is_array else "other"

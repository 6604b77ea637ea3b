"""Solvers that know of no bounds, on parameters that have some."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._boundary import PyTree
from .._constraints import Bounds, held_at
from .._step import AbstractTrainer, bounds_of, pushed
from .._tree import by_path


class Box(NamedTuple):
    """What a solver sees of bounds: the nearest point within, wherever it goes.

    Elements that are pushed against their bounds where it begins are held there. The
    others are free. One that leaves its interval has no derivative outside of it, so
    the solver finds the minimum of those that are left. Then the next round holds it,
    or lets it go again: an active-set method, whose last round solves for the free
    elements alone. See Nocedal and Wright, *Numerical Optimization* (2006), 16.5.
    """

    bounds: Bounds
    held: Mapping[str, Bool[Array, "..."]]
    start: PyTree

    @classmethod
    def around(
        cls, trainer: AbstractTrainer, value: Callable[[PyTree], Float[Array, ""]]
    ) -> "Box | None":
        """Finds what is held where a trainer is; `value` is what is minimised."""
        bounds = bounds_of(trainer)
        if bounds is None:
            return None
        return cls(bounds, pushed(trainer, value), trainer.params)

    def within(self, params: PyTree) -> PyTree:
        """Returns the nearest parameters within the bounds."""
        return held_at(self.bounds.clip(params), self.held, self.start)

    def rows(self, params: PyTree) -> Float[Array, " rows"]:
        """Returns a residual of zero for each element of a leaf with bounds.

        It has a derivative where the element has none: otherwise the Jacobian would
        have a column of zeros, which some solvers divide by.
        """
        named = by_path(params).by_name()
        still = {
            p: self.held[p] | out for p, out in self.bounds.outside(params).items()
        }
        moved = lambda x: x - jax.lax.stop_gradient(x)
        rows = [jnp.where(flags, moved(named[p]), 0) for p, flags in still.items()]
        return jnp.concatenate([row.ravel().astype(rows[0].dtype) for row in rows])

    def is_settled(
        self, params: PyTree, held: Mapping[str, Bool[Array, "..."]]
    ) -> Bool[Array, ""]:
        """Whether a solve that ended at `params` has found which elements to hold.

        They may be outside of the bounds. `held` are those that are pushed against
        their bounds there.
        """
        out = self.bounds.outside(params)
        same = [(held[p] == at) & (at | ~out[p]) for p, at in self.held.items()]
        return jnp.all(jnp.stack([jnp.all(flags) for flags in same]))

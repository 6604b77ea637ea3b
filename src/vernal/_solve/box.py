"""Solvers that know of no bounds, on parameters that have some."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._boundary import PyTree
from .._constraints import Bounds, held_at
from .._minimum import Curved, Local, Triangle, leaves_idle, rounding_of
from .._step import AbstractTrainer, bounds_of, pushed
from .._tree import by_path, choose, ravel, unravel

# The share of its distance at the start at which an element is next to a bound.
_NEXT_TO = float(np.finfo(np.float32).eps) ** 0.5


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
        outside = self.bounds.outside(params)
        x = ravel([named[p] for p in outside])
        held, out = (_flat(by[p] for p in outside) for by in (self.held, outside))
        return jnp.where(held | out, x - jax.lax.stop_gradient(x), 0)

    def ended(
        self,
        free: PyTree,
        params: PyTree,
        held: Mapping[str, Bool[Array, "..."]],
        local: Local | None,
        value: Callable[[PyTree], Float[Array, ""]],
    ) -> tuple[PyTree, Bool[Array, ""]]:
        """Returns where a solve ended, and whether it has found what is held.

        A solver whose steps beyond a bound are refused comes closer and closer to it.
        Elements that are close, and that a Newton step would move beyond their bounds,
        are moved there, unless the loss rises: at a symmetric point, where slopes
        vanish, a bound far away counts as close.

        **Arguments:**

        - `free`: the parameters as the solver has them, which may be outside.
        - `params`: the same within the bounds.
        - `held`: which elements are pushed against their bounds there.
        - `local`: the surroundings of `params`.
        - `value`: what is minimised.
        """
        outside, moved = self.bounds.outside(free), params
        flags = self.held, held, outside
        then, now, out = (_flat(by[p] for p in outside) for by in flags)
        is_same = jnp.all((now == then) & (then | ~out))
        if isinstance(local, (Triangle, Curved)):
            goal = unravel(ravel(params) - local.slope / local.scale, params)
            errors = unravel(1 / local.scale, params)
            near = self.bounds.snap(params, self.bounds.clip(goal), errors)
            before = value(params)
            is_as_low = value(near) <= before + rounding_of(before)
            moved = choose(is_as_low, near, params)
        return moved, is_same & jnp.all(ravel(moved) == ravel(params))


def _flat(flags: Iterable[Bool[Array, "..."]]) -> Bool[Array, " elements"]:
    return jnp.concatenate([*map(jnp.ravel, flags)])


def is_lost(bounds: Bounds, start: PyTree, end: PyTree, local: Any) -> bool:
    """Whether a solve in a whitened space may have ended far from the minimum.

    A long step there may end on a bound where other parameters have no effect, or next
    to one, by its distance at the start. `local` are the surroundings of the `end`.
    """
    before, after = by_path(start).by_name(), by_path(end).by_name()
    is_met = False
    for side in (bounds.low, bounds.high):
        for path, bound in side.items():
            gap, far = (
                abs(np.asarray(at[path]) - np.asarray(bound)) for at in (after, before)
            )
            is_met |= bool(np.any(gap == 0))
            if np.any((gap > 0) & (gap < _NEXT_TO * far) & np.isfinite(far)):
                return True
    return is_met and leaves_idle(local)

"""Intervals that parameters lie in."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._boundary import PyTree, is_traced
from .._pickling import PlainMethods, Portable
from .._tree import by_element, by_path, element_name
from .bijections import Bijections, as_bijection, is_bijection
from .owned import owned, replaced, require_wide

# In units of the standard error.
_CLOSE, _ROUNDING = 1e-3, 1e-5


class _Interval(NamedTuple):
    low: Array | None
    high: Array | None

    def clip(self, x: Array) -> Array:
        # Where it is on a bound, its derivative is one: it may leave it. NaN stays NaN.
        if self.low is not None:
            x = jnp.where(x < self.low, self.low, x)
        return x if self.high is None else jnp.where(x > self.high, self.high, x)

    def has_at(self, x: Array) -> tuple[Array, Array]:
        """Whether each element is at the lower, and at the upper bound."""
        no = jnp.zeros_like(x, bool)
        at_low = no if self.low is None else x <= self.low
        return at_low, no if self.high is None else x >= self.high


class Bounds(Portable, PlainMethods, eqx.Module):
    """The intervals of some parameters, by path.

    The bounds of a parameter have its dtype, and a shape that broadcasts to its own.
    """

    low: dict[str, Array]
    high: dict[str, Array]

    @classmethod
    def between(cls, low: PyTree, high: PyTree) -> "Bounds":
        """Makes bounds of all elements from two trees like the parameters."""
        return cls(by_path(low).by_name(), by_path(high).by_name())

    def clip(self, params: PyTree) -> PyTree:
        """Moves each element that is outside of its interval to the bound."""
        return replaced(params, self._each(_Interval.clip, params))

    def snap(self, params: PyTree, goal: PyTree, errors: PyTree) -> PyTree:
        """Moves elements to the bound that their goal is on, where they are close.

        A step that is scaled, as Adam's are, would come close to a bound and never be
        on it. Close is within a thousandth of the standard error.
        """

        def snapped(at: _Interval, x: Array, target: Array, error: Array) -> Array:
            is_close = jnp.abs(x - target) <= _CLOSE * error
            is_on = jnp.logical_or(*at.has_at(target))
            return jnp.where(is_on & is_close, at.clip(target), x)

        return replaced(params, self._each(snapped, params, goal, errors))

    def contain(self, params: PyTree, errors: PyTree | None = None) -> Bool[Array, ""]:
        """Whether each element is within its interval.

        With standard `errors`, up to rounding in their units.
        """
        own = {} if errors is None else by_path(errors).by_name()
        far = [
            jnp.abs(at.clip(x) - x) > _ROUNDING * own.get(path, jnp.zeros_like(x))
            for path, at, x in self._intervals(params)
        ]
        return ~jnp.any(jnp.stack([jnp.any(flags) for flags in far]))

    def outside(self, params: PyTree) -> dict[str, Bool[Array, "..."]]:
        """Finds the elements that are outside of their intervals, by path."""
        return self._each(lambda at, x: at.clip(x) != x, params)

    def pushed(self, params: PyTree, grads: PyTree) -> dict[str, Bool[Array, "..."]]:
        """Finds the elements at a bound where a lower loss is beyond it, by path."""

        def held(at: _Interval, x: Array, slope: Array) -> Array:
            at_low, at_high = at.has_at(x)
            is_pushed = jnp.where(slope > 0, at_low, at_high & (slope < 0))
            # An interval of one value holds its element whatever the slope.
            return is_pushed | (at_low & at_high)

        return self._each(held, params, grads)

    def required(self, params: PyTree) -> PyTree:
        """Returns parameters that are within their intervals; refuses any others."""
        for path, leaf in by_path(params).items():
            if path in self.low or path in self.high:
                _check(path, leaf, self.low.get(path), self.high.get(path))
        if is_traced(self, params):
            message = "A parameter is outside of its `bounds`."
            return eqx.error_if(params, ~self.contain(params), message)
        return params

    def limits(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Returns the bounds of each element, infinite where there is none."""
        named = by_path(params)
        return tuple(
            named.structure.unflatten(
                jnp.broadcast_to(side[path], x.shape)
                if path in side
                else jnp.full_like(x, unset)
                for path, x in named.items()
            )
            for side, unset in ((self.low, -jnp.inf), (self.high, jnp.inf))
        )

    def _each(
        self, fn: Callable[..., Array], params: PyTree, *others: PyTree
    ) -> dict[str, Array]:
        """Calls `fn(interval, x, *own)` for each parameter with bounds, by path."""
        named = [by_path(other).by_name() for other in others]
        intervals = self._intervals(params)
        rows = [(at, x, *(own[path] for own in named)) for path, at, x in intervals]
        names = [path for path, _, _ in intervals]
        return dict(zip(names, by_element(fn, rows), strict=True))

    def _intervals(self, params: PyTree) -> list[tuple[str, _Interval, Array]]:
        wide = lambda side, x: None if side is None else jnp.broadcast_to(side, x.shape)
        return [
            (path, _Interval(*(wide(s.get(path), x) for s in (self.low, self.high))), x)
            for path, x in by_path(params).items()
            if path in self.low or path in self.high
        ]


def held_at(
    params: PyTree, held: Mapping[str, Array], values: PyTree | None = None
) -> PyTree:
    """Holds elements, which have no derivative then, at their `values`."""
    named = by_path(params).by_name()
    at = named if values is None else by_path(values).by_name()
    rows = [(flags, at[path], named[path]) for path, flags in held.items()]
    pick = lambda flags, fixed, x: jnp.where(flags, jax.lax.stop_gradient(fixed), x)
    return replaced(params, dict(zip(held, by_element(pick, rows), strict=True)))


def flat_flags(
    flags: Mapping[str, Bool[Array, "..."]], params: PyTree
) -> Bool[Array, " D"]:
    """Joins flags by path into one vector like that of `ravel`; others are false."""
    every = [
        jnp.ravel(flags[path]) if path in flags else jnp.zeros(x.size, bool)
        for path, x in by_path(params).items()
    ]
    return jnp.concatenate(every)


def as_bounds(
    given: Any, model: PyTree, params: PyTree, reasons: Any
) -> tuple[Bounds | None, Bijections | None]:
    if given is None:
        return None, None
    trained = by_path(params).by_name()
    maps: dict[str, Any] = {}
    low: dict[str, Array] = {}
    high: dict[str, Array] = {}
    for path, interval in owned(given, "bounds", model, reasons).items():
        leaf = trained[path]
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"`bounds`: {path!r} is complex, and bounds are of reals. Write it as "
                "two real parameters."
            )
        if is_bijection(interval):
            maps[path] = as_bijection(interval, path, leaf)
            continue
        if not (isinstance(interval, tuple | list) and len(interval) == 2):
            kind = interval if isinstance(interval, type) else type(interval)
            raise TypeError(
                f"`bounds`: that of {path!r} is {interval!r} "
                f"({'a class of' if kind is interval else 'of'} {kind.__module__}), "
                "but must be a pair `(low, high)` of numbers or arrays, with `None` "
                "for no bound; or a bijection, such as a `vn.Bijection` or NumPyro's "
                "`biject_to(constraint)`."
            )
        for side, value, unset in zip(
            (low, high), interval, (-np.inf, np.inf), strict=True
        ):
            if value is None:
                continue
            bound = _as_bound(value, path, leaf)
            if is_traced(bound) or np.any(np.asarray(bound) != unset):
                side[path] = bound
    bounds = Bounds(low, high) if low or high else None
    return bounds, Bijections(maps) if maps else None


def _as_bound(value: Any, path: str, leaf: Array) -> Array:
    try:
        if isinstance(value, bool | str):
            raise TypeError
        if not isinstance(value, jax.Array):
            # What the dtype does not reach is infinite: no bound.
            with np.errstate(over="ignore"):
                value = np.asarray(value, leaf.dtype)
    except (TypeError, ValueError):
        raise TypeError(
            f"`bounds`: the bound {value!r} of {path!r} is no number."
        ) from None
    require_wide(value.shape, path, leaf, "`bounds`: a bound")
    return jnp.asarray(value, leaf.dtype)


def _check(path: str, leaf: Any, low: Any, high: Any) -> None:
    """Refuses bounds that are NaN or the wrong way round, and a start outside."""
    if is_traced(leaf, low, high):
        return
    start, least, most = np.broadcast_arrays(
        np.asarray(leaf),
        np.asarray(-np.inf if low is None else low, leaf.dtype),
        np.asarray(np.inf if high is None else high, leaf.dtype),
    )
    show = lambda i: f"({least.flat[i]:.6g}, {most.flat[i]:.6g})"
    name = lambda i: repr(element_name({path: leaf}, int(i)))
    # One that is NaN is not less either.
    for i in np.flatnonzero(~(least < most))[:1]:
        raise ValueError(
            f"`bounds`: those of {name(i)} are {show(i)}, but must be `(low, high)`, "
            "with `low < high`. To hold a parameter, leave it out of `train`."
        )
    for i in np.flatnonzero((start < least) | (start > most))[:1]:
        raise ValueError(
            f"`bounds`: {name(i)} starts at {start.flat[i]:.6g}, outside of its "
            f"bounds {show(i)}. Start within them, or on one of them."
        )

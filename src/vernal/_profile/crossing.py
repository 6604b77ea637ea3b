"""Where the likelihood has fallen by a given amount, for many elements at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._curvature import traced
from .._program import program
from .held import Point, Scan, solve_at

# How a search ended.
RUNNING, CROSSED, AT_BOUND, INFINITE, LOST = range(5)

# In standard errors.
_FARTHEST = 2.0**18
_LONGEST = 8.0

_TOLERANCE = 1e-6
_MOST_POINTS = 48
# Where interpolation is slow, halving is not.
_INTERPOLATIONS = 16


class Place(NamedTuple):
    """A point of a search: the distance, the excess there, and the parameters."""

    t: Float[Array, ""]
    excess: Float[Array, ""]
    flat: Float[Array, " D"]


class Search(NamedTuple):
    r"""A search along one side of one element.

    The distance $t$ is in standard errors. The excess
    $\sqrt{\Delta\chi^2} - \sqrt{q}$ is linear in it where the likelihood is normal.

    - `tried`: the number of points so far.
    - `base`: the minimum; `lowest`, the lowest point on the way; `last`, the last one.
    - `t`, `value`: the distance to try next, and the value of the element there.
    - `low`, `high`: the places between which the excess changes its sign.
    - `before`: the `low` before this one.
    - `weights`: of `low` and `high`, halved where one stays twice (the Illinois rule).
    - `was_low`: whether the last place was a new `low`.
    """

    tried: Int[Array, ""]
    base: Point
    lowest: Point
    last: Point
    t: Float[Array, ""]
    value: Float[Array, ""]
    low: Place
    before: Place
    high: Place
    weights: Float[Array, "2"]
    was_low: Bool[Array, ""]
    end: Int[Array, ""]


@program
def run_crossings(
    scan: Scan,
    index: Int[Array, " R"],
    side: Float[Array, " R"],
    quantile: Float[Array, ""],
) -> Search:
    """Searches on the lower (-1) or upper (1) side of each of these elements."""
    return jax.vmap(lambda i, s: _search(scan, i, s, jnp.sqrt(quantile)))(index, side)


def _search(
    scan: Scan, index: Int[Array, ""], side: Float[Array, ""], root: Float[Array, ""]
) -> Search:
    flat = scan.flat
    error = scan.metric.standard_errors()[index].astype(flat.dtype)
    low, high = scan.limits()
    bound = jnp.where(side > 0, high[index], low[index])
    solve = traced(
        lambda args: solve_at(scan, index[None], args[0][None], args[1]),
        (flat[0], jnp.stack([flat, flat])),
    )

    def body(state: Search) -> Search:
        is_first = state.tried == 0
        value = jnp.where(is_first, jnp.nan, state.value)
        point = solve((value, _tries(state)))
        base = jax.tree.map(
            lambda new, old: jnp.where(is_first, new, old), point, state.base
        )
        farthest = jnp.maximum(side * (bound - base.flat[index]) / error, 0)
        delta = 2 * (point.nll - base.nll)
        excess = jnp.sqrt(jnp.maximum(delta, 0)).astype(flat.dtype) - root
        excess = jnp.where(jnp.isfinite(excess), excess, jnp.inf)
        t = jnp.where(is_first, 0, state.t)
        place = Place(t, excess, point.flat)
        eps = jnp.finfo(flat.dtype).eps
        noise = jnp.maximum(_TOLERANCE, 16 * eps * (1 + jnp.abs(point.nll)))
        new, end = _updated(state, place, farthest, noise.astype(flat.dtype))
        is_lower = (point.nll < state.lowest.nll) | is_first
        at = base.flat[index] + side * error * new.t
        return new._replace(
            tried=state.tried + 1,
            base=base,
            lowest=jax.tree.map(
                lambda x, y: jnp.where(is_lower, x, y), point, state.lowest
            ),
            last=point,
            value=jnp.where(
                end != RUNNING,
                jnp.where(is_first, bound, state.value),
                jnp.where(new.t >= farthest, bound, at),
            ),
            end=end,
        )

    like = jax.eval_shape(solve, (flat[0], jnp.stack([flat, flat])))
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    zero, infinite = jnp.zeros_like(flat[0]), jnp.full_like(flat[0], jnp.inf)
    start = Place(zero, -root, flat)
    state = Search(
        tried=jnp.zeros_like(index),
        base=none,
        lowest=none,
        last=none,
        t=zero,
        value=jnp.full_like(zero, jnp.nan),
        low=start,
        before=start,
        high=Place(infinite, infinite, flat),
        weights=jnp.stack([-root, infinite]),
        was_low=jnp.array(True),
        end=jnp.zeros_like(index),
    )
    return jax.lax.while_loop(lambda s: s.end == RUNNING, body, state)


def _tries(state: Search) -> Float[Array, "2 D"]:
    """Returns where the others may start: where they were, and on a secant."""
    low, other = state.low, state.high
    has_high = jnp.isfinite(other.excess)
    t, flat = (
        jnp.where(has_high, x, y)
        for x, y in zip(
            (other.t, other.flat), (state.before.t, state.before.flat), strict=True
        )
    )
    gap = t - low.t
    ratio = jnp.where(gap != 0, (state.t - low.t) / jnp.where(gap != 0, gap, 1), 0)
    return jnp.stack([low.flat, low.flat + ratio * (flat - low.flat)])


def _updated(
    state: Search, place: Place, farthest: Float[Array, ""], noise: Float[Array, ""]
) -> tuple[Search, Int[Array, ""]]:
    """Takes a new place into account; returns also whether the search has ended."""
    choose = lambda flag, new, old: jax.tree.map(
        lambda x, y: jnp.where(flag, x, y), new, old
    )
    is_low = place.excess <= 0
    # The first is the minimum.
    is_step = state.tried > 0
    before = choose(is_low & is_step, state.low, choose(is_step, state.before, place))
    low = choose(is_low, place, state.low)
    high = choose(is_low, state.high, place)
    kept = state.weights * jnp.where(is_step & (is_low == state.was_low), 0.5, 1)
    weights = jnp.stack(
        [
            jnp.where(is_low, place.excess, kept[0]),
            jnp.where(is_low, kept[1], place.excess),
        ]
    )
    is_open = ~jnp.isfinite(high.t)
    # Beyond the last place, along the line through the last two.
    run = jnp.where(low.t > before.t, low.t - before.t, 1)
    rise = (low.excess - before.excess) / run
    ahead = low.t - low.excess / jnp.where(rise > 0, rise, jnp.nan)
    unit = jnp.ones_like(low.t)
    first = jnp.where(low.t > 0, _LONGEST * low.t, -low.excess * unit)
    ahead = jnp.where(jnp.isfinite(ahead), jnp.minimum(ahead, first), first)
    # Between two places.
    between = (low.t * weights[1] - high.t * weights[0]) / (weights[1] - weights[0])
    half = jnp.where(low.t > 0, 0.5 * (low.t + high.t), high.t / _LONGEST)
    is_good = (between > low.t) & (between < high.t)
    is_good &= state.tried < _INTERPOLATIONS
    between = jnp.where(is_good, between, half)
    t = jnp.where(is_open, jnp.minimum(ahead, farthest), between)

    eps = jnp.finfo(place.t.dtype).eps
    is_narrow = ~is_open & (high.t - low.t <= 8 * eps * high.t)
    is_narrow |= state.tried >= _MOST_POINTS
    ends = [
        (is_step & (jnp.abs(place.excess) <= noise), CROSSED),
        (is_low & (place.t >= farthest), AT_BOUND),
        (is_open & (low.t >= _FARTHEST), INFINITE),
        (is_narrow & jnp.isfinite(high.excess), CROSSED),
        (is_narrow, LOST),
    ]
    flags, kinds = zip(*ends, strict=True)
    end = jnp.select(list(flags), [jnp.asarray(k) for k in kinds], RUNNING)
    new = state._replace(
        t=t, low=low, before=before, high=high, weights=weights, was_low=is_low
    )
    return new, end.astype(state.end.dtype)

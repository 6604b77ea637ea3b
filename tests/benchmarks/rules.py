"""One Adam for each parameter: a rule each, against a transformation each by hand."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import vernal as vn

from .measure import Sides, Work


def by_hand(each: dict[str, Any]) -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        return {name: tx.init(params[name]) for name, tx in each.items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        out = {
            name: tx.update(updates[name], state[name], params[name])
            for name, tx in each.items()
        }
        return {n: u for n, (u, _) in out.items()}, {n: s for n, (_, s) in out.items()}

    return optax.GradientTransformation(init, update)


MAKES = {
    "`ParamOptimiser`": vn.ParamOptimiser,
    "`vn.partition`": lambda each: vn.partition(each, {name: name for name in each}),
    "`optax.partition`": lambda each: optax.partition(
        each, {name: name for name in each}
    ),
}


def sides(name: str, size: int, is_traced: bool) -> Sides:
    """One update, traced or called."""
    params = {f"p{i}": jnp.asarray(float(i)) for i in range(size)}

    def prepare(make: Any) -> Any:
        tx = make({name: optax.adam(1e-2) for name in params})
        state = tx.init(params)
        if is_traced:
            # A new function each time: JAX remembers the traces of one that it knows.
            trace = lambda: jax.make_jaxpr(lambda *args: tx.update(*args))
            return lambda: trace()(params, state, params) and None
        quickly = {"xla_backend_optimization_level": 0}
        lowered = jax.jit(tx.update).lower(params, state, params)
        compiled = lowered.compile(quickly)
        return lambda: compiled(params, state, params)

    return lambda: prepare(by_hand), lambda: prepare(MAKES[name])


def works() -> Iterator[Work]:
    for size in 100, 1_000:
        for name in MAKES:
            if "optax" in name and size > 100:
                continue  # it takes a minute
            for told in "traced", "called":
                yield Work(
                    f"rules-{size}",
                    f"{name}, {size:,} parameters of a rule each, an update {told}, "
                    "against a transformation each",
                    partial(sides, name, size, told == "traced"),
                    {"warm": None if "optax" in name else 1.5},
                    precisions=("float32",),
                    rounds=5,
                )

"""Which inputs of a function it turns into floats, as they are."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Var

from .host import inner_jaxprs

# What moves numbers, or takes some of them, and changes no more than their sign.
_MOVES = frozenset(
    (
        *("broadcast_in_dim", "concatenate", "copy", "expand_dims", "pad", "reshape"),
        *("optimization_barrier", "rev", "select_n", "slice", "split", "squeeze"),
        *("stack", "tile", "transpose", "unstack", "neg", "max", "reduce_max"),
        *("reduce_min",),
    )
)

# They take places, too: only the first of what they take is moved.
_TAKE = frozenset(("dynamic_slice", "gather"))

# What converts, by the parameter that says to which dtype: a product of matrices may
# convert what it multiplies.
_TO = {"convert_element_type": "new_dtype", "dot_general": "preferred_element_type"}


def turned_into_floats(jaxpr: Jaxpr, inputs: Mapping[Any, int]) -> set[int]:
    """Returns the places of the `inputs` that are converted to a dtype of floats.

    The sum, or the difference, of two is another number, and is not looked at.
    """
    found: set[int] = set()
    _follow(jaxpr, {var: {place} for var, place in inputs.items()}, found)
    return found


def _follow(jaxpr: Jaxpr, held: dict[Any, set[int]], found: set[int]) -> None:
    """Adds the inputs that each variable holds to `held`, converted ones to `found`."""
    of = lambda atom: held.get(atom, set()) if isinstance(atom, Var) else set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        moved = eqn.invars[:1] if name in _TAKE else eqn.invars
        inside = set[int]().union(*map(of, moved))
        to = eqn.params[_TO[name]] if name in _TO else None
        if to is not None and jnp.issubdtype(to, jnp.inexact):
            found |= inside
        elif name in _MOVES | _TAKE | {"convert_element_type"}:
            held.update(dict.fromkeys(eqn.outvars, inside))
        elif name == "sort":
            # What is sorted along with others is not theirs.
            held.update(zip(eqn.outvars, map(of, eqn.invars), strict=True))
        for inner in inner_jaxprs(eqn):
            # A function may take less than what its equation does, such as the index of
            # a branch: what it takes comes last.
            taken = zip(reversed(inner.invars), reversed(eqn.invars), strict=False)
            within = {var: of(atom) for var, atom in taken}
            _follow(inner, within, found)
            given = zip(reversed(eqn.outvars), reversed(inner.outvars), strict=False)
            for var, atom in given:
                if isinstance(atom, Var) and (more := within.get(atom)):
                    held[var] = of(var) | more

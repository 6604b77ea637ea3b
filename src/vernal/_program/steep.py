"""Where a function has no derivative, though it is finite."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .host import inner_jaxprs

# What has places without a finite derivative, and what users call it.
_SAID = {
    "sqrt": "`jnp.sqrt` (or a norm)",
    "rsqrt": "`jax.lax.rsqrt`",
    "cbrt": "`jnp.cbrt`",
    "pow": "a power, `**`,",
    "log": "`jnp.log`",
    "log1p": "`jnp.log1p`",
    "acos": "`jnp.arccos`",
    "asin": "`jnp.arcsin`",
    "atan2": "`jnp.arctan2` (or `jnp.angle`)",
    "acosh": "`jnp.arccosh`",
    "atanh": "`jnp.arctanh`",
    "div": "a division",
}

# What is a function of its own, whose equations are looked at.
_CALLS = frozenset(("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"))

Steep = dict[str, tuple[Any, ...]]
"""By a text: whether a derivative is not finite, and at which number."""


def steep(function: ClosedJaxpr, args: Sequence[Any]) -> Steep:
    """Evaluates a function of `args`, and says where its derivatives are not finite.

    There is an entry for each equation that may be so, in their order. Loops are not
    looked into, nor functions with derivatives of their own.
    """
    found: Steep = {}
    consts = [(x, False) for x in function.consts]
    _follow(function.jaxpr, consts, [(x, True) for x in args], found)
    return found


# A value, and whether it depends on the arguments.
_Seen = tuple[Any, bool]


def _follow(
    jaxpr: Jaxpr, consts: list[_Seen], args: list[_Seen], found: Steep
) -> list[_Seen]:
    """Evaluates equation by equation, and adds to `found`."""
    known: dict[Any, _Seen] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    of = lambda x: (x.val, False) if isinstance(x, Literal) else known[x]
    for eqn in jaxpr.eqns:
        own, name = list(map(of, eqn.invars)), eqn.primitive.name
        inner = inner_jaxprs(eqn)
        if name in _CALLS and len(inner) == 1 and not inner[0].constvars:
            results = _follow(inner[0], [], own, found)
        else:
            values, moves = [x for x, _ in own], [is_moved for _, is_moved in own]
            is_moved = any(moves) and name != "stop_gradient"
            if is_moved and name in _SAID:
                found[f"{len(found):05} {name}"] = _look(eqn, values, moves)
            made = _evaluated(eqn, values)
            results = [(x, is_moved) for x in made]
        known.update(zip(eqn.outvars, results, strict=True))
    return list(map(of, jaxpr.outvars))


def _evaluated(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    # In older versions of JAX it comes with the functions that it calls.
    found: Any = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    made = eqn.primitive.bind(*functions, *values, **params)
    return made if eqn.primitive.multiple_results else [made]


def _look(eqn: Any, values: list[Any], moves: list[bool]) -> tuple[Any, ...]:
    """Says whether the derivative of an element is not finite, and of what number."""
    moved = [x for x, is_moved in zip(values, moves, strict=True) if is_moved]

    def of_moved(*moved: Any) -> Any:
        left = iter(moved)
        whole = [
            next(left) if is_moved else x
            for x, is_moved in zip(values, moves, strict=True)
        ]
        return _evaluated(eqn, whole)[0]

    _, slopes = jax.jvp(of_moved, tuple(moved), tuple(map(jnp.ones_like, moved)))
    # Division is steep in what it divides by, other functions in what comes first.
    at = jnp.broadcast_to(
        jnp.asarray(values[eqn.primitive.name == "div"]), slopes.shape
    )
    is_bad = ~jnp.isfinite(slopes)
    for x in values:
        is_bad &= jnp.isfinite(x)
    return jnp.any(is_bad), at.ravel()[jnp.argmax(is_bad)]


def said_of_steep(found: Steep) -> str:
    """Names the first function whose derivative is not finite, and where; or nothing.

    What was found lies on the host.
    """
    for key, (is_bad, at) in sorted(found.items()):
        if is_bad:
            return f"{_SAID[key.split()[1]]} at {float(at):.6g}"
    return ""

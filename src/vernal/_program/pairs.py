"""Whether a function sums over all pairs of two arrays that are as long."""

import math
from typing import Any

from jax.extend.core import Jaxpr, Var

from .host import inner_jaxprs

# What has each element of its result from those at the same place.
_ELEMENTWISE = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "select_n"),
        *("integer_pow", "square", "pow", "sqrt", "rsqrt", "exp", "exp2", "expm1"),
        *("log", "log1p", "logistic", "tanh", "erf", "erfc", "lgamma", "add_any"),
        *("is_finite", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"),
        *("convert_element_type", "copy", "stop_gradient"),
    )
)
_RESHAPES = frozenset(("broadcast_in_dim", "reshape", "expand_dims"))

# What is known of an array: a vector that has been given another axis, as a row or as a
# column, another column, or one number everywhere. What belongs to pairs of a row and a
# column has the length of these.
_ROW, _MADE, _COLUMN, _FILLED = "row", "made", "column", "filled"
_Kind = str | int | None

# Among the lengths of what is summed: pairs that are meant.
_COMPARED = -1


def sums_over_pairs(jaxpr: Jaxpr) -> int | None:
    """Returns how long two arrays are of which all pairs are summed, if there are any.

    One is a column, of shape `(n, 1)`, and the other a vector, of shape `(n,)`, which
    broadcasts against it. A column that has been made from a vector, by `x[:, None]`,
    is one on purpose, and so are all pairs if some meet an array of their shape
    that is not of pairs itself, such as an image. Pairs may be flat, and joined to
    other arrays.
    """
    found: list[int] = []
    _follow(jaxpr, {}, found)
    return found[0] if found and _COMPARED not in found else None


def _follow(jaxpr: Jaxpr, known: dict[Any, str | int], found: list[int]) -> None:
    """Adds what is known of variables to `known`, and sums over pairs to `found`."""
    for eqn in jaxpr.eqns:
        own = [known.get(x) if isinstance(x, Var) else None for x in eqn.invars]
        shapes, name = list(map(_shape, eqn.invars)), eqn.primitive.name
        shape, kind = _shape(eqn.outvars[0]) if eqn.outvars else (), None
        pairs = [x for x in own if isinstance(x, int)]
        if name in _RESHAPES:
            kind = _reshaped(own[0], shapes[0], shape)
        elif name in _ELEMENTWISE:
            kind = _of_elements(own, shapes, shape)
            if pairs and (None, shape) in zip(own, shapes, strict=True):
                found.append(_COMPARED)
        elif name == "concatenate" and pairs:
            kind = pairs[0]
        elif name == "reduce_sum" and pairs and shape == ():
            found.append(pairs[0])
        if kind:
            known[eqn.outvars[0]] = kind
        for inner in inner_jaxprs(eqn):
            # What a function takes, and what it returns, comes last.
            taken = zip(reversed(inner.invars), reversed(own), strict=False)
            within = {var: kind for var, kind in taken if kind}
            _follow(inner, within, found)
            given = zip(reversed(eqn.outvars), reversed(inner.outvars), strict=False)
            known.update(
                {v: within[x] for v, x in given if isinstance(x, Var) and x in within}
            )


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _reshaped(own: _Kind, before: tuple[int, ...], after: tuple[int, ...]) -> _Kind:
    if isinstance(own, int) and after == (math.prod(before),):
        return own
    if math.prod(before) == 1:
        return _FILLED
    if len(before) == 1:
        return _ROW if after == (1, *before) else _MADE if after[1:] == (1,) else None
    return _kind_of(own, before) if len(before) == len(after) == 2 else None


def _kind_of(own: _Kind, shape: tuple[int, ...]) -> _Kind:
    """What is known of an array, by its shape too."""
    if math.prod(shape) == 1:
        return _FILLED
    return _COLUMN if own is None and shape[1:] == (1,) else own


def _of_elements(
    own: list[_Kind], shapes: list[tuple[int, ...]], shape: tuple[int, ...]
) -> _Kind:
    """Returns what is known of a result, given what is known of what it comes from."""
    kinds = set(map(_kind_of, own, shapes)) - {_FILLED}
    if not kinds:
        return _FILLED
    if kinds == {_ROW, _COLUMN} and len(shape) == 2 and shape[0] == shape[1]:
        return shape[0]
    pairs = [kind for kind in kinds if isinstance(kind, int)]
    if pairs and kinds <= {*pairs, _ROW, _COLUMN}:
        return pairs[0]
    return kinds.pop() if len(kinds) == 1 and len(shape) == 2 else None

"""What a function sums: all pairs of two arrays, or data that make a mean."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, Literal, Var

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
    _follow_pairs(jaxpr, {}, found)
    return found[0] if found and _COMPARED not in found else None


def _follow_pairs(jaxpr: Jaxpr, known: dict[Any, str | int], found: list[int]) -> None:
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
            _follow_pairs(inner, within, found)
            given = zip(reversed(eqn.outvars), reversed(inner.outvars), strict=False)
            known.update(
                {v: within[x] for v, x in given if isinstance(x, Var) and x in within}
            )


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


# What has a number for each of those that it takes, and nothing but that number.
_PASSES = frozenset(
    (
        *("convert_element_type", "copy", "expand_dims", "neg", "reshape", "squeeze"),
        "transpose",
    )
)
_ADDS = frozenset(("add", "add_any", "sub"))

# What calls its function otherwise than once, with all that it takes.
_LOOPS = frozenset(("scan", "while", "shard_map"))

# A sum of so few data, halved or quartered, may be no mean.
_FEW = 4

# The factors of a mean: half of it is one of squares.
_OF_MEANS = 0.5, 1.0


class _Sum(NamedTuple):
    """A sum over `size` elements that depend on data, times a number.

    The number is NaN where it is not known.
    """

    size: int
    factor: float

    def is_mean(self, sizes: set[int]) -> bool:
        if self.size <= _FEW or self.size not in sizes:
            return False
        shares = (abs(self.factor) * self.size / own for own in _OF_MEANS)
        return any(math.isclose(share, 1, rel_tol=1e-3) for share in shares)


_OTHER = _Sum(0, math.nan)


class _Known(NamedTuple):
    """What is known of a variable.

    - `is_data`: whether it depends on data.
    - `is_fitted`: whether it depends on anything but data and constants.
    - `sums`: the sums over data that it is the sum of, beside what else there is.
    - `number`: its value, of a constant.
    - `counted`: of how many elements it is the number for which a flag is true, or the
        sum of their weights; 1 for the flags.
    """

    is_data: bool = False
    is_fitted: bool = False
    sums: tuple[_Sum, ...] = ()
    number: float | None = None
    counted: int = 0


def mean_over(jaxpr: Jaxpr, inputs: Iterable[Any]) -> int | None:
    """Returns over how many data a scalar is a mean, if it is one.

    `inputs` are the data. It is one if all sums over them that it is made of, by
    additions and constant factors alone, are divided by the number of what they sum
    (the first lengths of an input, multiplied), or by the sum of its weights. What is
    summed beside it without data, such as a penalty, need not be a mean. A mean over
    anything else, such as samples, is none.
    """
    shapes = [_shape(var) for var in inputs]
    sizes = {math.prod(s[: i + 1]) for s in shapes for i in range(len(s))}
    known = dict.fromkeys(jaxpr.invars, _Known(is_fitted=True))
    known |= dict.fromkeys(inputs, _Known(is_data=True))
    (found,) = _follow_sums(jaxpr, known, sizes)
    sums = found.sums
    if not sums or not all(one.is_mean(sizes) for one in sums):
        return None
    return max(one.size for one in sums)


def _follow_sums(
    jaxpr: Jaxpr, known: dict[Any, _Known], sizes: set[int]
) -> list[_Known]:
    """Returns what is known of the results; adds that of other variables to `known`."""

    def of(atom: Any) -> _Known:
        if isinstance(atom, Literal):
            is_number = np.shape(atom.val) == () and np.isrealobj(atom.val)
            return _Known(number=float(atom.val)) if is_number else _Known()
        return known.get(atom, _Known())

    for eqn in jaxpr.eqns:
        own = list(map(of, eqn.invars))
        inner, name = inner_jaxprs(eqn), eqn.primitive.name
        is_call = len(inner) == 1 and len(inner[0].invars) == len(own)
        if is_call and name not in _LOOPS:
            found = _follow_sums(
                inner[0], dict(zip(inner[0].invars, own, strict=True)), sizes
            )
            known.update(zip(eqn.outvars, found, strict=False))
            continue
        of_what = {
            "is_data": any(one.is_data for one in own),
            "is_fitted": any(one.is_fitted for one in own),
        }
        for var in eqn.outvars:
            known[var] = _result(eqn, own, sizes)._replace(**of_what)
    return list(map(of, jaxpr.outvars))


def _result(eqn: Any, own: list[_Known], sizes: set[int]) -> _Known:
    """Returns what is known of the first result of an equation."""
    name, shape = eqn.primitive.name, _shape(eqn.outvars[0])
    if name in ("reduce_sum", "dot_general"):
        return _summed(eqn, own, sizes)
    if name in _PASSES:
        is_flag = eqn.invars[0].aval.dtype == bool
        return own[0]._replace(counted=1) if is_flag else own[0]
    # One number beside an array, such as a baseline, is no sum of its elements.
    pairs = zip(own, eqn.invars, strict=True)
    parts = [k if _shape(x) == shape else k._replace(sums=()) for k, x in pairs]
    sums = tuple(one for part in parts for one in part.sums)
    if name in _ADDS:
        # Data that are summed otherwise, such as by a loop.
        other = [k for k in parts if k.is_data and not k.sums] if not shape else []
        return _Known(sums=sums + (_OTHER,) * len(other))
    if name == "max" and (count := max(part.counted for part in own)) > 1:
        return _Known(counted=count)
    if name not in ("mul", "div") or not sums:
        return _Known()
    factors = [k.number for k in own if k.number is not None]
    if name == "div" and own[1].counted > 1:
        factor = 1 / own[1].counted
    elif not factors or (name == "div" and not own[1].number):
        factor = math.nan
    else:
        factor = 1 / factors[-1] if name == "div" else factors[-1]
    return _Known(sums=tuple(_Sum(one.size, one.factor * factor) for one in sums))


def _summed(eqn: Any, own: list[_Known], sizes: set[int]) -> _Known:
    """Returns what is known of a sum over some axes, or of a product of vectors."""
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    size = math.prod(before) // max(math.prod(after), 1)
    # A product with a matrix is no sum over data.
    is_sum = eqn.primitive.name == "reduce_sum" or after == ()
    is_count = own[0].counted == 1 or not any(one.is_fitted for one in own)
    counted = size if is_count and after == () else 0
    # Nor is a sum over what each datum has.
    if not is_sum or size == 1 or (after != () and size not in sizes):
        return _Known(counted=counted)
    if not any(one.is_data for one in own):
        return _Known(counted=counted)
    # A sum of sums, or of means, is no sum over data alone.
    factor = math.nan if any(one.sums for one in own) else 1.0
    return _Known(sums=(_Sum(size, factor),), counted=counted)


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())

"""Where the integers among the inputs of a function go: into floats, or an index."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, Var
from jax.lax import GatherScatterMode

from .host import inner_jaxprs

# What moves numbers, or takes some of them, and changes no more than their sign.
_PASSES = frozenset(
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
    _follow_numbers(jaxpr, {var: {place} for var, place in inputs.items()}, found)
    return found


def _follow_numbers(jaxpr: Jaxpr, held: dict[Any, set[int]], found: set[int]) -> None:
    """Adds the inputs that each variable holds to `held`, converted ones to `found`."""
    of = lambda atom: held.get(atom, set()) if isinstance(atom, Var) else set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        moved = eqn.invars[:1] if name in _TAKE else eqn.invars
        inside = set[int]().union(*map(of, moved))
        to = eqn.params[_TO[name]] if name in _TO else None
        if to is not None and jnp.issubdtype(to, jnp.inexact):
            found |= inside
        elif name in _PASSES | _TAKE | {"convert_element_type"}:
            held.update(dict.fromkeys(eqn.outvars, inside))
        elif name == "sort":
            # What is sorted along with others is not theirs.
            held.update(zip(eqn.outvars, map(of, eqn.invars), strict=True))
        for inner in inner_jaxprs(eqn):
            # A function may take less than what its equation does, such as the index of
            # a branch: what it takes comes last.
            taken = zip(reversed(inner.invars), reversed(eqn.invars), strict=False)
            within = {var: of(atom) for var, atom in taken}
            _follow_numbers(inner, within, found)
            given = zip(reversed(eqn.outvars), reversed(inner.outvars), strict=False)
            for var, atom in given:
                if isinstance(atom, Var) and (more := within.get(atom)):
                    held[var] = of(var) | more


# What moves integers, and keeps all of them.
_MOVES = frozenset(
    (
        *("broadcast_in_dim", "convert_element_type", "copy", "expand_dims"),
        *("reshape", "rev", "squeeze", "transpose"),
    )
)

# What they take changes from turn to turn, or is taken at some turns alone.
_LOOPS = frozenset(("scan", "while", "cond"))


class LookUp(NamedTuple):
    """An axis of which integers pick elements, without a word of what is beyond it.

    - `integers`: the place of the input that they are.
    - `low`, `high`: the least and the largest number that is within.
    - `size`: the length of the axis.
    - `arrays`: which inputs the array is, or is computed from.
    """

    integers: int
    low: int
    high: int
    size: int
    arrays: tuple[int, ...]


class _Index(NamedTuple):
    """The integers of an input; `least` to `most` was added to each of them.

    Brackets add the length of an axis to those that are negative.
    """

    integers: int
    least: int = 0
    most: int = 0


class _Known(NamedTuple):
    """What is known of variables.

    - `indices`: the integers that they hold; a list of those of several axes.
    - `arrays`: which inputs they are computed from.
    """

    indices: dict[Any, Any]
    arrays: dict[Any, frozenset[int]]

    def index_of(self, atom: Any) -> Any:
        return self.indices.get(atom) if isinstance(atom, Var) else None

    def arrays_of(self, *atoms: Any) -> frozenset[int]:
        known = (self.arrays.get(x, ()) for x in atoms if isinstance(x, Var))
        return frozenset[int]().union(*known)

    def tell(self, other: "_Known", atoms: Sequence[Any], names: Sequence[Any]) -> None:
        """Tells `other` what is known of `atoms`, which have other names there."""
        for atom, name in zip(atoms, names, strict=True):
            other.indices[name] = self.index_of(atom)
            other.arrays[name] = self.arrays_of(atom)


def look_ups(
    jaxpr: Jaxpr, integers: Mapping[Any, int], arrays: Sequence[Any]
) -> frozenset[LookUp]:
    """Finds where inputs of integers, as they are or shifted, index arrays.

    There JAX takes the nearest element for an index that is out of range. Where the
    function itself says what to take, by `array.at[index].get(mode=...)`, none is
    found; nor are those in loops, and of integers that are otherwise computed.
    """
    known = _Known(
        {var: _Index(place) for var, place in integers.items()},
        {var: frozenset((i,)) for i, var in enumerate(arrays)},
    )
    found: set[LookUp] = set()
    _follow_indices(jaxpr, known, found)
    return frozenset(found)


def _follow_indices(jaxpr: Jaxpr, known: _Known, found: set[LookUp]) -> None:
    for eqn in jaxpr.eqns:
        own = list(map(known.index_of, eqn.invars))
        arrays = tuple(sorted(known.arrays_of(*eqn.invars[:1])))
        for index, size in _indexed(eqn, own[1:]):
            if arrays and isinstance(index, _Index):
                ends = -index.most, size - 1 - index.least
                found.add(LookUp(index.integers, *ends, size, arrays))
        if (inner := _called(eqn)) is not None:
            within = _Known({}, {})
            known.tell(within, eqn.invars, inner.invars)
            _follow_indices(inner, within, found)
            within.tell(known, inner.outvars, eqn.outvars)
        else:
            known.arrays.update(
                dict.fromkeys(eqn.outvars, known.arrays_of(*eqn.invars))
            )
            known.indices.update(dict.fromkeys(eqn.outvars, _moved(eqn, own)))


def _called(eqn: Any) -> Jaxpr | None:
    """Returns the function that an equation calls once, with all that it takes."""
    inner = inner_jaxprs(eqn)
    if eqn.primitive.name in _LOOPS or len(inner) != 1:
        return None
    is_whole = len(inner[0].invars) == len(eqn.invars)
    return inner[0] if is_whole and len(inner[0].outvars) == len(eqn.outvars) else None


def _moved(eqn: Any, own: list[Any]) -> Any:
    """Returns which integers the results of an equation hold, if that is known."""
    name, known = eqn.primitive.name, [x for x in own if isinstance(x, _Index)]
    if name == "concatenate":
        # The indices of several axes, beside each other.
        last = eqn.outvars[0].aval.ndim - 1
        is_one = all(x.aval.shape[-1:] == (1,) for x in eqn.invars)
        return own if is_one and eqn.params["dimension"] == last else None
    if not known:
        return None
    if name in _MOVES:
        return known[0] if eqn.outvars[0].aval.dtype != jnp.bool_ else None
    if name == "select_n":
        # Whichever was added, both are of one number.
        is_one = known == own[1:] and len({x.integers for x in known}) == 1
        least, most = min(x.least for x in known), max(x.most for x in known)
        return known[0]._replace(least=least, most=most) if is_one else None
    added = [int(x.val) for x in eqn.invars if isinstance(x, Literal)]
    if len(added) != 1 or not (name == "add" or (name == "sub" and own[0])):
        return None
    shift, (index,) = added[0] if name == "add" else -added[0], known
    return index._replace(least=index.least + shift, most=index.most + shift)


def _indexed(eqn: Any, given: list[Any]) -> Iterator[tuple[Any, int]]:
    """Yields what picks one element of an axis, and the length of the axis.

    An index in brackets promises to be within the axis. With one number it is a slice,
    which is moved to be within, and which `jax.vmap` turns into a gather that leaves
    the axis in place.
    """
    if eqn.primitive.name == "dynamic_slice":
        axes = range(len(given))
    elif eqn.primitive.name == "gather":
        mode, numbers = eqn.params["mode"], eqn.params["dimension_numbers"]
        is_slice = mode == GatherScatterMode.CLIP and not numbers.collapsed_slice_dims
        if not (is_slice or mode == GatherScatterMode.PROMISE_IN_BOUNDS):
            return
        axes = numbers.start_index_map
        given = given[0] if isinstance(given[0], list) else given
    else:
        return
    if len(given) == len(axes):
        shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
        for index, axis in zip(given, axes, strict=True):
            if sizes[axis] == 1:
                yield index, shape[axis]

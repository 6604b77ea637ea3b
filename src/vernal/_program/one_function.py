"""Loops over small arrays, which XLA compiles to one function.

On a CPU, XLA calls a function for each operation, or for a few that it joins. In a loop
over small arrays the calls take longer than the arithmetic. XLA can also compile such
a loop as a whole, and does so for the smallest. A mark on a call asks it for others.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array

from .host import equations, inner_jaxprs

T = TypeVar("T")

# XLA looks for this mark on calls that it keeps. It is not documented, so only the
# versions that were tested get it. From JAX 0.12 on XLA makes one function of more
# loops by itself, but steps with a guard could then differ from others in the last bit.
_MARK = {"xla_cpu_small_call": "true", "inlineable": "false"}
BEFORE = (0, 13)

# How many bytes one pass of the loop may write. From some 80 kB on it is faster to call
# a function for each operation: they run on several threads.
MOST_BYTES = 2**16

# XLA calls a library for larger reductions, and for larger products of matrices, which
# it cannot do from one function.
_MOST_REDUCED = 2**12
_MOST_MULTIPLIED = 64
_LONGEST_SIDE = 7

_LOOPS = frozenset({"scan", "while"})

_REDUCTIONS = frozenset(
    {"argmax", "argmin", "pmin"}
    | {f"reduce_{name}" for name in ("and", "max", "min", "or", "prod", "sum", "xor")}
)

# What was compared with the other way. Not among them is what calls a library, such as
# a sort or a decomposition of a matrix, and what this way lacks, such as a scatter.
_OTHERS = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type
broadcast_in_dim ceil clamp closed_call complex concatenate cond conj
convert_element_type copy copy_p cos cosh cumlogsumexp cummax cummin cumprod cumsum
custom_jvp_call custom_vjp_call digamma div dynamic_slice dynamic_update_slice eq erf
erf_inv erfc exp exp2 expm1 floor gather ge gt imag integer_pow iota is_finite jit le
lgamma log log1p logistic lt max min mul ne neg nextafter not or pad pjit pow
random_bits random_fold_in random_seed random_split random_unwrap random_wrap real
reduce_precision rem reshape rev round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh slice split sqrt square
squeeze stack stop_gradient sub tan tanh threefry2x32 transpose unstack xor
"""
ALLOWED = _LOOPS | _REDUCTIONS | set(_OTHERS.split())


def is_switched_on() -> bool:
    """Whether loops may be compiled so: unless the user's environment forbids it."""
    asked = os.environ.get("VERNAL_ONE_FUNCTION", "1")
    if asked not in ("0", "1"):
        raise ValueError(
            f"The environment has `VERNAL_ONE_FUNCTION={asked}`. It must be 0 or 1."
        )
    return asked == "1" and jax.__version_info__ < BEFORE


def are_on_one_cpu(tree: Any) -> bool:
    """Whether every array of a tree is on one CPU, and no device is of another kind."""
    if jax.default_backend() != "cpu":
        return False
    if jax.device_count() == 1:
        return True
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return all(len(array.sharding.device_set) == 1 for array in arrays)


def is_refused(error: Exception) -> bool:
    """Whether XLA could not compile a function as one."""
    reasons = "UNIMPLEMENTED", "Failed to materialize symbols"
    return any(reason in str(error) for reason in reasons)


def as_one_function(fn: Callable[..., T], *args: Any) -> T | None:
    """Calls a function of arrays, a loop, within a program: XLA makes one function.

    `None` if that would not be faster, or is not possible.

    XLA ends the process where such a function has an argument that it does not use. So
    it also returns an element of each, and those are used here. Barriers hide from XLA
    what the arguments are: it would put constants into the function in their place.
    """
    traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    of_loops: list[int] = []
    _written(traced.jaxpr, of_loops)
    is_fast = max(of_loops, default=0) <= MOST_BYTES
    if not (is_fast and all(map(_is_allowed, equations(traced.jaxpr)))):
        return None
    given, count = [*traced.consts, *jax.tree.leaves(args)], len(traced.consts)

    def call(*given: Array) -> list[Array]:
        flat: Any = jaxpr_as_fun(_with_consts(traced, given[:count]))
        return [*flat(*given[count:]), *(jnp.ravel(x)[:1] for x in given)]

    first, *rest = jax.jit(call)(*lax.optimization_barrier(given))
    # The mark belongs to the call that the value comes from.
    returned = lax.optimization_barrier([set_xla_metadata(first, **_MARK), *rest])
    return jax.tree.structure(shapes).unflatten(returned[: -len(given)])


def _with_consts(traced: Any, consts: Sequence[Array]) -> Any:
    """Returns a function that was traced, with other constants."""
    if hasattr(traced, "with_consts"):
        return traced.with_consts(consts)
    # Before JAX 0.12 its class is around that of a function without constants.
    return type(traced)(traced.jaxpr, consts)


def _is_allowed(eqn: Any) -> bool:
    name, shapes = eqn.primitive.name, [value.aval.shape for value in eqn.invars]
    if name == "dot_general":
        return _is_tiny_product(eqn.params["dimension_numbers"], *shapes)
    if name in _REDUCTIONS:
        return math.prod(shapes[0]) < _MOST_REDUCED
    return name in ALLOWED


def _is_tiny_product(
    numbers: Any, left: tuple[int, ...], right: tuple[int, ...]
) -> bool:
    """Whether a product has a vector, or no sum, or is one of tiny matrices."""
    (contracted, _), (mapped, _) = numbers
    inner = math.prod(left[axis] for axis in contracted)
    each = inner * math.prod(left[axis] for axis in mapped)
    rows, columns = (math.prod(shape) // max(each, 1) for shape in (left, right))
    sizes = rows, columns, inner
    is_tiny = max(sizes) <= _LONGEST_SIDE and math.prod(sizes) <= _MOST_MULTIPLIED
    is_small = max(map(math.prod, (left, right))) < _MOST_REDUCED
    return is_small and (is_tiny or min(sizes) <= 1)


def _written(jaxpr: Any, of_loops: list[int]) -> int:
    """Counts the bytes that a function writes, without the loops in it.

    Those that one pass of each loop writes are appended to `of_loops`.
    """
    own = 0
    for eqn in jaxpr.eqns:
        inner = [_written(each, of_loops) for each in inner_jaxprs(eqn)]
        if eqn.primitive.name in _LOOPS:
            of_loops += inner
        elif inner:
            own += sum(inner)
        elif eqn.primitive.name == "dynamic_update_slice":
            own += _bytes(eqn.invars[1])  # the rest stays as it is
        else:
            own += sum(map(_bytes, eqn.outvars))
    return own


def _bytes(value: Any) -> int:
    return value.aval.size * value.aval.dtype.itemsize

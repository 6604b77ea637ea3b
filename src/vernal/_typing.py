"""The type-checker at the boundary, and the names its annotations share."""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from beartype import beartype
from jaxtyping import jaxtyped

P = ParamSpec("P")
R = TypeVar("R")

PyTree = Any
"""Any pytree: what its leaves must be, no annotation says."""

Params = Any
"""A pytree of parameters: arrays, with `None` where a leaf is left out."""


# Of the generators that JAX comes with: threefry, and the two of XLA.
_RAW = ((2,), (4,))


def checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Checks a public function's arguments against its jaxtyping annotations.

    The check runs in Python, when the function is called or traced: a compiled
    program pays nothing for it.
    """

    @functools.wraps(fn)
    def body(*args: P.args, **kwargs: P.kwargs) -> R:
        # A user's function may use the same names of axes for other lengths.
        with jaxtyped("context"):  # pyright: ignore
            return fn(*args, **kwargs)

    return jaxtyped(body, typechecker=beartype)  # pyright: ignore


def whole_number(value: Any, name: str, *, least: int) -> int:
    """Checks a count: a whole number, not a boolean, and not too small."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(
            f"`{name}` is {value!r}, but must be a whole number of at least {least}."
        )
    if number < least:
        raise ValueError(f"`{name}` is {number}, but must be at least {least}.")
    return number


def takes(fn: Any, count: int, name: str, form: str) -> None:
    """Checks that a function can be called with so many arguments.

    **Arguments:**

    - `fn`: the function.
    - `count`: how many arguments it is given, all by position.
    - `name`: the argument that it was given as.
    - `form`: what it should look like, for the error.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # One that is written in C may not say.
    try:
        signature.bind_partial(*range(count))
    except TypeError as error:
        called = getattr(fn, "__name__", type(fn).__name__)
        raise TypeError(
            f"`{name}`: the function `{called}{signature}` is called as `{form}`: "
            f"{error}."
        ) from None


def prng_key(key: Any) -> jax.Array:
    """Checks that an argument is one PRNG key, of the new kind or the old."""
    is_typed = isinstance(key, jax.Array) and jnp.issubdtype(
        key.dtype, jax.dtypes.prng_key
    )
    is_raw = (
        isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.shape in _RAW
    )
    if not (is_raw or (is_typed and key.shape == ())):
        raise TypeError(
            f"`key` is {key!r}, not one PRNG key. Give `jax.random.key(0)`."
        )
    return key

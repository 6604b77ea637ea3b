"""The type-checker at the boundary, and the names its annotations share."""

import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import jaxtyped

from .names import nearest_names

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


def whole_number(
    value: Any, name: str, *, least: int | None = None, most: int | None = None
) -> int:
    """Checks a whole number: not a boolean, not too small and not too large."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        bound = "" if least is None else f" of at least {least}"
        raise TypeError(f"`{name}` is {value!r}, but must be a whole number{bound}.")
    if least is not None and number < least:
        raise ValueError(f"`{name}` is {number}, but must be at least {least}.")
    if most is not None and number > most:
        raise ValueError(f"`{name}` is {number}, but must be at most {most}.")
    return number


def takes_methods(
    owner: type, methods: Mapping[str, tuple[str, ...]], name: str
) -> None:
    """Checks that methods of a user's class can be called as they will be.

    **Arguments:**

    - `owner`: the class.
    - `methods`: from the name of a method to those of the arguments that it is given by
        position; one that ends in `=` is given by keyword.
    - `name`: what an error calls an instance.
    """
    for method, given in methods.items():
        fn = getattr(owner, method, None)
        # What is wrapped, or no function at all, may not say what it takes.
        if inspect.isfunction(fn):
            is_bound = not isinstance(
                inspect.getattr_static(owner, method), staticmethod | classmethod
            )
            keywords = [word[:-1] for word in given if word.endswith("=")]
            form = f"{owner.__name__}.{method}({', '.join(given)})"
            takes(fn, is_bound + len(given) - len(keywords), name, form, keywords)


def boolean(value: Any, name: str) -> bool:
    """Checks a switch: a boolean of Python or of NumPy, or 0 or 1."""
    if isinstance(value, bool | np.bool_) or (
        isinstance(value, int) and value in (0, 1)
    ):
        return bool(value)
    raise TypeError(f"`{name}` is {value!r}, but must be `True` or `False`.")


def file_path(value: Any, name: str) -> Path:
    """Checks the path of a file or a directory."""
    try:
        path = os.fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str):
        raise TypeError(
            f"`{name}` is {value!r}, but must be a path: a string or a `pathlib.Path`."
        )
    try:
        is_name = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise ValueError(f"`{name}` is {path!r}, which no file can be called.")
    return Path(path)


def takes(
    fn: Any, count: int, name: str, form: str, keywords: Iterable[str] = ()
) -> None:
    """Checks that a function can be called with these arguments.

    **Arguments:**

    - `fn`: the function.
    - `count`: how many arguments it is given by position.
    - `name`: the argument that it was given as.
    - `form`: what it should look like, for the error.
    - `keywords`: the names of the arguments that it is given by keyword.
    """
    if isinstance(fn, type):
        raise TypeError(
            f"`{name}` is the class `{fn.__name__}`, but must be a function, which is "
            f"called as `{form}`."
        )
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # One that is written in C may not say.
    try:
        signature.bind(*range(count), **dict.fromkeys(keywords))
    except TypeError as error:
        called = getattr(fn, "__name__", type(fn).__name__)
        raise TypeError(
            f"`{name}`: the function `{called}{signature}` is called as `{form}`: "
            f"{error}."
        ) from None


def refuse_unknown(
    options: Mapping[str, Any], known: Sequence[str], function: str
) -> None:
    """Refuses keyword arguments that a function does not have, by its own name."""
    for name in options:
        if name not in known:
            nearest = nearest_names(name, known)
            raise TypeError(f"`{function}` has no argument `{name}`. {nearest}")


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

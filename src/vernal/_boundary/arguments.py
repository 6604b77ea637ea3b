"""Values that a user gives as arguments, checked."""

import contextlib
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .names import in_few_words, nearest_names

MOST_STEPS = 2**31 - 1
"""Steps are counted in 32 bits."""

# The shapes of raw keys of JAX's generators: threefry, and the two of XLA.
_RAW = ((2,), (4,))


def whole_number(
    value: Any, name: str, *, least: int | None = None, most: int | None = None
) -> int:
    """Checks a whole number, which is not a boolean, against its bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        bound = "" if least is None else f" of at least {least}"
        raise TypeError(
            f"`{name}` is {in_few_words(value)}, but must be a whole number{bound}."
        )
    if least is not None and number < least:
        raise ValueError(f"`{name}` is {number}, but must be at least {least}.")
    if most is not None and number > most:
        raise ValueError(f"`{name}` is {number}, but must be at most {most}.")
    return number


def step_limit(value: Any, name: str) -> int:
    """Checks a number of steps to wait for, at least 1, and cuts what none reaches."""
    return min(whole_number(value, name, least=1), MOST_STEPS)


def boolean(value: Any, name: str) -> bool:
    """Checks a boolean, of Python or of NumPy, or 0 or 1."""
    if isinstance(value, int | np.bool_) and value in (0, 1):
        return bool(value)
    raise TypeError(
        f"`{name}` is {in_few_words(value)}, but must be `True` or `False`."
    )


def file_path(value: Any, name: str) -> Path:
    """Checks the path of a file or a directory."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str):
        raise TypeError(
            f"`{name}` is {value!r}, but must be a path: a string or a `pathlib.Path`."
        )
    with contextlib.suppress(UnicodeEncodeError):
        if b"\0" not in os.fsencode(path):
            return Path(path)
    raise ValueError(f"`{name}` is {path!r}, which no file can be called.")


def one_of(value: Any, names: Sequence[str], name: str) -> Any:
    """Checks that an argument is one of several names."""
    if isinstance(value, str) and value in names:
        return value
    *others, last = (f'"{known}"' for known in names)
    raise ValueError(
        f"`{name}` is {value!r}, but must be {', '.join(others)} or {last}."
    )


def refuse_unknown(
    options: Mapping[str, Any], known: Sequence[str], function: str
) -> None:
    """Refuses keyword arguments that a function does not have."""
    for name in options:
        if name not in known:
            nearest = nearest_names(name, known)
            if name.startswith("_"):
                nearest = (
                    "`dataclasses.replace` gives fields as arguments, which they are "
                    "not: use the method `replace`, or `eqx.tree_at`."
                )
            raise TypeError(
                f"`{function}` has no argument `{name}`. {nearest}"
            ) from None


def prng_key(key: Any) -> jax.Array:
    """Checks one PRNG key: a typed one, or a raw one."""
    if isinstance(key, jax.Array) and (
        (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ())
        or (key.dtype == jnp.uint32 and key.shape in _RAW)
    ):
        return key
    raise TypeError(
        f"`key` is {in_few_words(key)}, not one PRNG key. Give `jax.random.key(0)`."
    )

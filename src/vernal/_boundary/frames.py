"""Tracebacks and warnings that point to the user's code, some given once."""

import functools as ft
import inspect
import itertools
import re
import warnings
import weakref
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .arguments import refuse_unknown
from .debugging import undebugged
from .foreign import has_been_deleted, is_deleted, unsorted
from .names import spelled_leaves

P = ParamSpec("P")
R = TypeVar("R")

# What JAX says of a dictionary whose keys do not compare, and of floats as an index.
_UNSORTED = "while sorting pytree dictionary keys"
_NO_INDEX = re.compile("(Indexer|indices) must have (an )?integer")

_LIBRARIES = frozenset(
    {
        "beartype",
        "contextlib",
        "equinox",
        "functools",
        "jax",
        "jaxlib",
        "jaxtyping",
        "lineax",
        "matfree",
        "optax",
        "optimistix",
        "vernal",
    }
)


class PrecisionWarning(UserWarning):
    """Data lose digits that matter, because JAX computes in float32.

    ```python
    warnings.filterwarnings("ignore", category=vn.PrecisionWarning)
    ```
    """


class ObjectiveWarning(UserWarning):
    """A trainer's class defines `residuals` beside `loss` or `nll`.

    A term that only one of them has, such as a prior, is missing from what the methods
    that use another compute. If that is on purpose:

    ```python
    warnings.filterwarnings("ignore", category=vn.ObjectiveWarning)
    ```
    """


def _is_users(frame: FrameType) -> bool:
    package, *_ = frame.f_globals.get("__name__", "").split(".")
    return package not in _LIBRARIES


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns, and points to the line of the user's code that led here."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_back is not None and not _is_users(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


# The warnings that were given, and the filters at that time. Under other filters, as in
# the next test of a suite, each is given again.
_said: set[object] = set()
_filters: list[object] = [None]


def warn_once(message: str, category: type[Warning], of: object) -> None:
    """Warns at the user's line of code, once for each value of `of`."""
    if _filters[0] is not warnings.filters:
        _filters[0] = warnings.filters
        _said.clear()
    if of not in _said:
        warn(message, category)
        _said.add(of)


def warn_once_of(kind: type, message: str, *of: object) -> None:
    """Warns once for each class, and for each value of `of`."""
    warn_once(message, UserWarning, (weakref.ref(kind), *of))


def entrance(fn: Callable[P, R]) -> Callable[P, R]:
    """Makes the tracebacks of a function show the user's frames.

    If an error comes from the user's code that this function called, the frames of
    libraries in between, some forty, are left out. Otherwise the traceback stays whole;
    with JAX's option `jax_traceback_filtering="off"` it always does.

    JAX's checks of every value for NaN are off meanwhile: see `undebugged`.
    """
    fn = undebugged(fn)

    @ft.wraps(fn)
    def entered(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            _refuse_misspelt(error, fn, args, kwargs)
            if clearer := _clearer(error, fn, args, kwargs):
                raise clearer from None
            _advise(error, fn, args, kwargs)
            if getattr(jax.config, "jax_traceback_filtering", None) != "off":
                users = _users(error.__traceback__)
                error.__traceback__ = users or error.__traceback__
            raise

    return entered


def _refuse_misspelt(error: Exception, fn: Any, args: Any, given: Any) -> None:
    """Refuses an argument that the function does not have, in place of Python."""
    if not isinstance(error, TypeError):
        return
    known = inspect.signature(fn).parameters
    if any(x.kind is inspect.Parameter.VAR_KEYWORD for x in known.values()):
        return
    name = fn.__qualname__
    kind: Any = type(args[0]) if args else None
    if name.endswith(".__init__"):
        if kind.__init__.__qualname__ == name:
            # Rather than the class that it has it from.
            name = kind.__name__
        name = name.removesuffix(".__init__")
        fields = getattr(kind, "__dataclass_fields__", {})
        odd = [x for x in given if x in fields and x not in known]
        # `dataclasses.replace` gives the private ones, too.
        if odd and not any(x.startswith("_") for x in given):
            raise TypeError(
                f"`{name}` has no argument `{odd[0]}`, which is a field of "
                f"`{kind.__name__}`. Set it in an `__init__` of that class, by "
                f"`self.{odd[0]} = {odd[0]}` before `super().__init__(model, ...)`."
            ) from None
    refuse_unknown(given, [x for x in known if x != "self"], name)


def _clearer(
    error: Exception, fn: Callable[..., Any], args: Any, kwargs: Any
) -> ValueError | None:
    """Returns an error that names what JAX cannot use among the arguments, if any."""
    if isinstance(error, RuntimeError) and "has been deleted" in str(error):
        look = _deleted
    elif isinstance(error, ValueError) and _UNSORTED in str(error):
        look = unsorted
    else:
        return None
    named = _named(fn, args, kwargs)
    return next(filter(None, map(look, named, named.values())), None)


def _named(fn: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    given = inspect.signature(fn).bind_partial(*args, **kwargs).arguments
    return {"trainer" if k == "self" else k: x for k, x in given.items()}


def _advise(error: Exception, fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Adds to an error of floats as an index which of the data may be meant."""
    is_kind = isinstance(error, TypeError | ValueError)
    if not (is_kind and _NO_INDEX.match(str(error))):
        return
    named = _named(fn, args, kwargs)
    given = {name: named[name] for name in ("batch", "data") if name in named}
    leaves = itertools.chain(*itertools.starmap(spelled_leaves, given.items()))
    if found := [where for where, leaf in leaves if _is_whole(leaf)]:
        advice = f"Whole numbers, but floats: {', '.join(found)}. Use `.astype(int)`."
        if advice not in getattr(error, "__notes__", ()):
            error.add_note(advice)


def _is_whole(leaf: Any) -> bool:
    if not (isinstance(leaf, np.ndarray) or getattr(leaf, "is_fully_addressable", 0)):
        return False
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0
    return is_float and bool((np.asarray(leaf) == np.round(np.asarray(leaf))).all())


def _deleted(name: str, tree: Any) -> ValueError | None:
    for where, leaf in spelled_leaves(name, tree):
        if isinstance(leaf, jax.Array) and is_deleted(leaf):
            return has_been_deleted(where.replace("._progress", ""))
    return None


def _users(traceback: TracebackType | None) -> TracebackType | None:
    """Returns the user's frames of a traceback, or `None`."""
    kept = []
    while traceback is not None:
        if _is_users(traceback.tb_frame):
            kept.append(traceback)
        traceback = traceback.tb_next
    users = None
    for part in reversed(kept):
        users = TracebackType(users, part.tb_frame, part.tb_lasti, part.tb_lineno)
    return users

"""The objects that pictures are drawn of, checked with a remedy."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

from .._boundary import checked, in_few_words
from .._fit import FitResult
from .._profile import Profile
from .._projection import EigenProjector
from .._report import Report
from .._storage import History
from .._trainer import Trainer

P = ParamSpec("P")
R = TypeVar("R")

# What a user calls each, and where it is found.
_REMEDIES: dict[Any, str] = {
    Trainer: "a trainer, such as `result.trainer`",
    FitResult: "the result of a fit",
    History: "a history, such as `result.history`",
    EigenProjector: "a projector, such as `trainer.whiten(batch).projector`",
    Report: "a report, such as `trainer.report(batch)`",
    Profile: "a profile, such as `trainer.profile(solver, batch, name)`",
    optx.AbstractMinimiser: "a minimiser of Optimistix",
    optx.AbstractLeastSquaresSolver: "a least-squares solver",
    Callable: "a function",
}


def drawn(fn: Callable[P, R]) -> Callable[P, R]:
    """Checks a public function as `checked` does, whose errors show objects whole."""
    signature, hints = inspect.signature(fn), get_type_hints(fn)
    kinds = {name: _kinds(hints[name]) for name in signature.parameters}
    full = checked(fn)

    @functools.wraps(fn)
    def body(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            known = kinds[name]
            if known and not isinstance(value, known):
                words = ", or ".join(_REMEDIES[kind] for kind in known)
                raise TypeError(
                    f"`{name}` is {in_few_words(value)}, but must be {words}."
                )
        return full(*args, **kwargs)

    return body


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Returns the classes of a union, if all have a remedy."""
    is_union = get_origin(hint) in (Union, types.UnionType)
    parts = get_args(hint) if is_union else (hint,)
    found = tuple(get_origin(part) or part for part in parts)
    return found if all(kind in _REMEDIES for kind in found) else ()


def as_numbers(value: Any) -> np.ndarray | None:
    """Returns real numbers as an array, `None` for anything else."""
    if jnp.issubdtype(getattr(value, "dtype", float), jax.dtypes.prng_key):
        return None
    try:
        found = np.asarray(value)
    except ValueError:  # of several shapes
        return None
    return found if found.dtype.kind in "fiu" else None

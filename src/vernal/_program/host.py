"""Programs that call functions on the host, and the errors that are raised there."""

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
from jax.extend.core import Jaxpr

from .._boundary import is_traced

_LOGGER = logging.getLogger("jax._src.callback")

# What XLA begins its errors with, whatever their type is.
_OF_XLA = re.compile("(INTERNAL|RESOURCE_EXHAUSTED|UNIMPLEMENTED|UNKNOWN): ")

_EQUINOX = "EquinoxRuntimeError: "
_OF_PYTHON = "Traceback (most recent call last)"


def calls_host(traced: Any) -> bool:
    """Whether a program that was traced calls functions on the host."""
    # A message to print, for instance, is an effect; a pure callback is not.
    calls = (eqn.primitive.name for eqn in equations(traced.jaxpr))
    return bool(traced.effects) or any("callback" in name for name in calls)


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Yields the equations of a function, and of those that it calls, once each."""
    todo, seen = [jaxpr], {id(jaxpr)}
    while todo:
        for eqn in todo.pop().eqns:
            yield eqn
            new = [inner for inner in inner_jaxprs(eqn) if id(inner) not in seen]
            seen.update(map(id, new))
            todo += new


def inner_jaxprs(eqn: Any) -> list[Jaxpr]:
    """Returns the functions that an equation calls."""
    # Before JAX 0.12, a function with its constants is another class, around this one.
    leaves = (getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(eqn.params))
    return [leaf for leaf in leaves if isinstance(leaf, Jaxpr)]


def jaxpr_of(fn: Callable[..., Any], *args: Any) -> Jaxpr | None:
    """Traces a function, to be looked at; returns `None` if it raises an error."""
    try:
        return eqx.filter_make_jaxpr(fn)(*args)[0].jaxpr
    except Exception:  # what a fit meets, if it takes a step, it raises itself
        return None


def with_host_errors(
    waits: Callable[[], bool], jitted: Callable[..., Any], *args: Any
) -> Any:
    """Runs a program, all of whose errors are a `RuntimeError`.

    That of `equinox.error_if` is raised as Equinox raises it, any other of XLA, such as
    of a callback, as JAX's own. If `waits`, it is raised here, and not where a result
    is first looked at.
    """
    # JAX also writes to the log what it raises.
    quiet = lambda record: not record.getMessage().endswith("callback failed")
    _LOGGER.addFilter(quiet)
    try:
        result = jitted(*args)
        # A tracer says at length that it cannot be waited for.
        if waits() and not is_traced(result):
            jax.block_until_ready(result)
        return result
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if f"_{_EQUINOX}" in str(error):
            _raise_as_equinox(error)
        # Those of a program that JAX finds the quick way are a `ValueError`.
        if isinstance(error, ValueError) and _OF_XLA.match(str(error)):
            raise jax.errors.JaxRuntimeError(str(error)) from None
        raise
    finally:
        _LOGGER.removeFilter(quiet)


def is_of_host(error: Exception) -> bool:
    """Whether an error of a program was raised by a function on the host."""
    return any(mark in str(error) for mark in (_EQUINOX, _OF_PYTHON))


def words_of(error: Exception) -> str:
    """Returns the first line of what a program's error has to say.

    That of `equinox.error_if` is in a long text, and what a callback raised is at the
    end of a traceback.
    """
    text = str(error).strip()
    said = text.partition(_EQUINOX)[2]
    if not said and _OF_PYTHON in text:
        said = text.rpartition('\n  File "')[2].partition("\n")[2]
    return (said or text).partition("\n")[0]


@eqx.filter_jit
def _raise_as_equinox(error: Exception) -> None:
    raise error

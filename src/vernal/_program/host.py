"""Programs that call functions on the host, and the errors that are raised there."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
from jax.extend.core import Jaxpr

from .._boundary import is_traced

_LOGGER = logging.getLogger("jax._src.callback")


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


def with_host_errors(
    waits: Callable[[], bool], jitted: Callable[..., Any], *args: Any
) -> Any:
    """Runs a program; an error of `equinox.error_if` is raised as Equinox raises it.

    If `waits`, it is raised here, and not where a result is first looked at.
    """
    # JAX also writes to the log what it raises.
    quiet = lambda record: record.getMessage() != "jax.pure_callback failed"
    _LOGGER.addFilter(quiet)
    try:
        result = jitted(*args)
        # A tracer says at length that it cannot be waited for.
        if waits() and not is_traced(result):
            jax.block_until_ready(result)
        return result
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "_EquinoxRuntimeError: " in str(error):
            _raise_as_equinox(error)
        raise
    finally:
        _LOGGER.removeFilter(quiet)


@eqx.filter_jit
def _raise_as_equinox(error: Exception) -> None:
    raise error

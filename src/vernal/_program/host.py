"""Programs that call functions on the host, and the errors that are raised there."""

import logging
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr

_LOGGER = logging.getLogger("jax._src.callback")


def calls_host(traced: Any) -> bool:
    """Whether a program that was traced calls functions on the host."""
    # A message to print, for instance, is an effect; a pure callback is not.
    todo, seen = [traced.jaxpr], set[int]()
    if traced.effects:
        return True
    while todo:
        for eqn in todo.pop().eqns:
            if "callback" in eqn.primitive.name:
                return True
            for inner in jax.tree.leaves(eqn.params):
                inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                if isinstance(inner, Jaxpr) and id(inner) not in seen:
                    seen.add(id(inner))
                    todo.append(inner)
    return False


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
        return _whole(result) if waits() else result
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "_EquinoxRuntimeError: " in str(error):
            eqx.filter_jit(_raises(error))()
        raise
    finally:
        _LOGGER.removeFilter(quiet)


def _whole(result: Any) -> Any:
    """Waits for a result, unless it is traced."""
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(result)):
        jax.block_until_ready(result)
    return result


def _raises(error: Exception) -> Callable[[], None]:
    def again() -> None:
        raise error

    return again

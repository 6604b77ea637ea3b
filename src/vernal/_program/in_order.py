"""Programs whose operations do not overtake each other on a CPU."""

import functools

import jax

_IN_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@functools.cache
def options_in_order() -> dict[str, str] | None:
    """Returns the options of the compiler for a program that is run in order.

    On a CPU, XLA orders operations so that several may run at once. With jaxlib 0.10,
    the loop of a solver that decomposes by QR then sometimes computes something else
    from the same numbers: one program of Optimistix's `Dogleg` took 6 steps in most
    calls, and 9 to 43 in 0.1 to 25 % of them, the more the less other work there was.
    In the order that needs the least memory it took 6 in each of 12,000.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=_IN_ORDER).lower().compile()
    except RuntimeError:  # an XLA that does not know it
        return None
    return _IN_ORDER

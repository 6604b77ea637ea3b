"""SIGTERM, as a cluster sends it before it takes a machine away."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Defers a SIGTERM to the end of a block; gives what says whether there was one."""
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    # `None` is a handler that Python does not know of: it could not be put back.
    handler = signal.getsignal(signal.SIGTERM) if is_main else None
    if handler is not None:
        signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
        if received:
            signal.raise_signal(signal.SIGTERM)

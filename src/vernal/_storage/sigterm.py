"""SIGTERM, as a cluster sends it before it takes a machine away."""

import signal
import threading
from typing import Any


class DeferredSigterm:
    """Notes a SIGTERM within a block, and raises it again at the end of the block."""

    def __init__(self):
        self.is_received, self._handler = False, None

    def __enter__(self) -> "DeferredSigterm":
        is_main = threading.current_thread() is threading.main_thread()
        # `None` is a handler that Python does not know of: it could not be put back.
        self._handler = signal.getsignal(signal.SIGTERM) if is_main else None
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, *_: Any) -> None:
        self.is_received = True

    def __exit__(self, *exc: Any) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        if self.is_received:
            signal.raise_signal(signal.SIGTERM)

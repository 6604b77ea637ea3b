"""The progress bar of a fit."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

# The width if a terminal does not know its own, such as one that a program opened.
_DEFAULT_COLUMNS = 80


class ProgressBar:
    """A context manager that shows the progress of a fit, where it is interactive.

    The bar says "compiling" until the first step is taken.
    """

    def __init__(self, steps: int, taken: int, *, shown: bool, unit: str = "it"):
        """`taken` of the `steps` were taken already, by a fit that is resumed."""
        self._bar, self._taken = None, taken
        self._is_compiling = True
        if shown and steps > taken and is_interactive():
            # Imported here, since a fit without a bar should not wait for it.
            from tqdm.auto import tqdm

            # `update` is called about twice a second, and each call should draw.
            options = {"desc": "compiling", "miniters": 1, "unit": unit}
            self._bar = tqdm(total=steps, initial=taken, **options, **_width())

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.initial = self._taken
            self._bar.close()

    def update(self, steps: int, shown: Callable[[], dict[str, str]]) -> None:
        """Advances by a number of steps, and shows the values that `shown` returns."""
        if self._bar is None:
            return
        values = ", ".join(f"{name}={value}" for name, value in shown().items())
        self._bar.set_postfix_str(values, refresh=False)
        if not self._is_compiling:
            self._bar.update(steps)
            return
        # The time for compiling says nothing about the time that is left: until the bar
        # is closed, the rate counts from here, where `initial` is.
        self._is_compiling = False
        self._bar.set_description("", refresh=False)
        self._bar.n += steps
        self._bar.initial = self._bar.last_print_n = self._bar.n
        self._bar.last_print_t = time.time()
        self._bar.refresh()


def _width() -> dict[str, Any]:
    try:
        is_unknown = os.get_terminal_size(sys.stderr.fileno()).columns == 0
    except (OSError, ValueError, AttributeError):  # It is not a terminal.
        is_unknown = False
    return {"ncols": _DEFAULT_COLUMNS} if is_unknown else {"dynamic_ncols": True}


def is_interactive() -> bool:
    """Whether a user sees the bar: in a terminal or a notebook, not in a log file."""
    # Without a console there is no standard error.
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    ipython = sys.modules.get("IPython")
    is_notebook = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
    return is_terminal or is_notebook

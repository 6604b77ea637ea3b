"""The progress bar of a fit."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

# How wide to draw where a terminal does not know how wide it is, as some that a program
# opens for another do not.
_COLUMNS = 80


class Bar:
    """A progress bar, which says that it compiles until the first step is taken.

    It is a context manager, and shows nothing where nobody looks, as in the log file
    of a batch job.
    """

    def __init__(self, steps: int, taken: int, *, shown: bool):
        """**Arguments:**

        - `steps`: how many there will be.
        - `taken`: how many were taken already, by a fit that goes on.
        - `shown`: whether the user wants to see it.
        """
        self._bar, self._taken = None, taken
        self._is_compiling = True
        if shown and steps > taken and _somebody_looks():
            # Here, since a fit without a bar should not wait for the import.
            from tqdm.auto import tqdm

            # It is asked to draw only about twice a second, and then should.
            look = {"desc": "compiling", "miniters": 1, **_width()}
            self._bar = tqdm(total=steps, initial=taken, **look)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.initial = self._taken
            self._bar.close()

    def update(self, steps: int, shown: Callable[[], dict[str, str]]) -> None:
        """Moves on by so many steps, and shows where the fit is."""
        if self._bar is None:
            return
        self._bar.set_postfix_str(_joined(shown()), refresh=False)
        if not self._is_compiling:
            self._bar.update(steps)
            return
        # What compiling took tells nothing of the time that is left: the rate counts
        # from here, where `initial` is, and the average in the end from the start.
        self._is_compiling = False
        self._bar.set_description("", refresh=False)
        self._bar.n += steps
        self._bar.initial = self._bar.last_print_n = self._bar.n
        self._bar.last_print_t = time.time()
        self._bar.refresh()


def _joined(shown: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def _width() -> dict[str, Any]:
    try:
        is_unknown = os.get_terminal_size(sys.stderr.fileno()).columns == 0
    except (OSError, ValueError, AttributeError):  # It is no terminal.
        is_unknown = False
    return {"ncols": _COLUMNS} if is_unknown else {"dynamic_ncols": True}


def _somebody_looks() -> bool:
    # There is no standard error where there is no console.
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_terminal or _is_in_notebook()


def _is_in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")

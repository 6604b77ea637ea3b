"""The progress bar of a fit."""

import sys
from collections.abc import Callable
from typing import Any


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
        self._bar = None
        if shown and steps > taken and _somebody_looks():
            # Here, since a fit without a bar should not wait for the import.
            from tqdm.auto import tqdm

            self._bar = tqdm(total=steps, initial=taken, desc="compiling")

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, steps: int, shown: Callable[[], dict[str, str]]) -> None:
        """Moves on by so many steps, and shows where the fit is."""
        if self._bar is None:
            return
        self._bar.set_description("fitting", refresh=False)
        self._bar.set_postfix(shown(), refresh=False)
        self._bar.update(steps)


def _somebody_looks() -> bool:
    # There is no standard error where there is no console.
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_terminal or _is_in_notebook()


def _is_in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")

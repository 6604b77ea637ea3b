"""Warnings that point at the user's own line, each of them once."""

import sys
import warnings


class PrecisionWarning(UserWarning):
    """Data lose digits that matter, since JAX computes in float32.

    ```python
    warnings.filterwarnings("ignore", category=vn.PrecisionWarning)
    ```
    """


class ObjectiveWarning(UserWarning):
    """A trainer's class defines `residuals` beside `loss` or `nll`.

    What is in one of them alone, such as a prior, is left out by the methods that use
    another. If that is on purpose:

    ```python
    warnings.filterwarnings("ignore", category=vn.ObjectiveWarning)
    ```
    """


# What stands between a user's line and what warns of it.
_INSIDE = frozenset({"vernal", "equinox", "jaxtyping", "beartype", "jax"})

# What was said, and the filters under which it was: with others, as in the next test
# of a suite, it is said again.
_said: set[object] = set()
_filters: list[object] = [None]


def warn(message: str, category: type[Warning], once: object) -> None:
    """Warns at the line outside of this package, and not again of the same.

    **Arguments:**

    - `message`, `category`: as for `warnings.warn`.
    - `once`: what tells this warning from others.
    """
    if _filters[0] is not warnings.filters:
        _filters[0] = warnings.filters
        _said.clear()
    if once in _said:
        return
    level, frame = 1, sys._getframe()
    while frame is not None and _package(frame) in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
    _said.add(once)


def _package(frame: object) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".")[0]  # pyright: ignore[reportAttributeAccessIssue]

"""Categories of warnings, and how to give each warning once."""

import warnings
import weakref

from .frames import warn


class PrecisionWarning(UserWarning):
    """Data lose digits that matter, because JAX computes in float32.

    ```python
    warnings.filterwarnings("ignore", category=vn.PrecisionWarning)
    ```
    """


class ObjectiveWarning(UserWarning):
    """A trainer's class defines `residuals` beside `loss` or `nll`.

    A term that only one of them has, such as a prior, is missing from what the methods
    that use another compute. If that is on purpose:

    ```python
    warnings.filterwarnings("ignore", category=vn.ObjectiveWarning)
    ```
    """


# The warnings that were given, and the filters at that time. Under other filters, as in
# the next test of a suite, each is given again.
_said: set[object] = set()
_filters: list[object] = [None]


def warn_once(message: str, category: type[Warning], of: object) -> None:
    """Warns at the user's line of code, once for each value of `of`."""
    if _filters[0] is not warnings.filters:
        _filters[0] = warnings.filters
        _said.clear()
    if of not in _said:
        warn(message, category)
        _said.add(of)


def warn_once_of(kind: type, message: str, *of: object) -> None:
    """Warns once for each class, and for each value of `of`."""
    warn_once(message, UserWarning, (weakref.ref(kind), *of))

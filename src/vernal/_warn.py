"""What is warned of, each of it once."""

import warnings

from ._frames import warn


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


# What was said, and the filters under which it was: with others, as in the next test
# of a suite, it is said again.
_said: set[object] = set()
_filters: list[object] = [None]


def warn_once(message: str, category: type[Warning], of: object) -> None:
    """Warns at the user's line, and not again of the same.

    **Arguments:**

    - `message`, `category`: as for `warnings.warn`.
    - `of`: what tells this warning from others.
    """
    if _filters[0] is not warnings.filters:
        _filters[0] = warnings.filters
        _said.clear()
    if of not in _said:
        warn(message, category)
        _said.add(of)

"""Beartype behind a switch: what `--annotations` has jaxtyping check vernal with."""

import contextlib
import functools

from beartype import beartype

_is_on = True


def checks(fn):
    """Checks the annotations of a function at each call, while they are checked."""
    checked = beartype(fn)

    @functools.wraps(fn)
    def call(*args, **kwargs):
        return (checked if _is_on else fn)(*args, **kwargs)

    return call


@contextlib.contextmanager
def unchecked():
    """Leaves a wrong argument to what vernal itself says of it."""
    global _is_on
    _is_on = False
    try:
        yield
    finally:
        _is_on = True

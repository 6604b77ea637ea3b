"""How much Python does, which no busy machine changes."""

import itertools
import sys


def calls_of(fn):
    """Counts the functions that are called, and their returns."""
    count = itertools.count()
    sys.setprofile(lambda *_: next(count))
    try:
        fn()
    finally:
        sys.setprofile(None)
    return next(count)

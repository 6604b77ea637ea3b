"""Marks for some of the cases of a table."""

import pytest


def marked(mark, cases, *some):
    """Returns all cases, for `parametrize`; those that are named have a mark."""
    return [pytest.param(case, marks=mark if case in some else ()) for case in cases]

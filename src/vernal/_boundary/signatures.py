"""Functions and methods of a user, checked before they are called."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any


def takes(
    fn: Any, count: int, name: str, form: str, keywords: Iterable[str] = ()
) -> None:
    """Checks that a function can be called with `count` arguments, and with `keywords`.

    An error calls it `name`, and shows the call as `form`.
    """
    if isinstance(fn, type):
        raise TypeError(
            f"`{name}` is the class `{fn.__name__}`, but must be a function, which is "
            f"called as `{form}`."
        )
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # A function written in C may have none.
    try:
        signature.bind(*range(count), **dict.fromkeys(keywords))
    except TypeError as error:
        called = getattr(fn, "__name__", type(fn).__name__)
        raise TypeError(
            f"`{name}`: the function `{called}{signature}` is called as `{form}`: "
            f"{error}."
        ) from None


def takes_methods(
    owner: type, methods: Mapping[str, tuple[str, ...]], name: str
) -> None:
    """Checks that the methods of a user's class can be called with these arguments.

    Arguments that end in `=` are given by keyword. An error calls an instance `name`.
    """
    for method, given in methods.items():
        fn = getattr(owner, method, None)
        # The signature of a wrapper may not say what it takes.
        if inspect.isfunction(fn):
            is_bound = not isinstance(
                inspect.getattr_static(owner, method), staticmethod | classmethod
            )
            keywords = [word[:-1] for word in given if word.endswith("=")]
            form = f"{owner.__name__}.{method}({', '.join(given)})"
            takes(fn, is_bound + len(given) - len(keywords), name, form, keywords)

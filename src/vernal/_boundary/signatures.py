"""Functions, methods and classes of a user, checked before they are called."""

import dataclasses
import functools as ft
import inspect
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import equinox as eqx

if sys.version_info >= (3, 14):
    import annotationlib


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


def refuse_taken(kind: Any, base: Any, free: Collection[str] = ()) -> None:
    """Refuses a user's class in which a name of vernal's `base` means something else.

    A method may be overridden by what can be called; a property or a field only if its
    name is in `free`.
    """
    # Of a class that cloudpickle has made, the fields of its bases are others, too.
    users = (one for one in kind.__mro__ if one not in base.__mro__)
    written = frozenset[str]().union(*map(_annotated, users))
    for name, what in _names(base).items():
        new, old = (getattr(x, name, None) for x in (kind, base))
        fields, known = (x.__dataclass_fields__.get(name) for x in (kind, base))
        is_field = fields is not known and name in written
        if what == "method":
            # Without a default, a field hides the method in instances alone.
            is_taken = not callable(new) or (is_field and new is old)
        else:
            is_taken = name not in free and (is_field or new is not old)
        if is_taken:
            raise TypeError(
                f"`{kind.__name__}`: `{name}` is a {what} of every `{base.__name__}`. "
                "Give yours another name."
            )


def _annotated(kind: type) -> Collection[str]:
    """Returns the names that a class itself annotates."""
    if sys.version_info >= (3, 14):
        # What they mean is not asked, and may not be known yet.
        strings = annotationlib.Format.STRING
        return annotationlib.get_annotations(kind, format=strings)
    return inspect.get_annotations(kind)


@ft.cache
def _names(base: Any) -> dict[str, str]:
    """Returns what each name is that a class of vernal adds to a module."""
    names = dict.fromkeys((x.name for x in dataclasses.fields(base)), "field")
    for name in sorted(set(dir(base)) - set(dir(eqx.Module))):
        attribute = getattr(base, name)
        if isinstance(attribute, property):
            names[name] = "property"
        elif callable(attribute):
            names[name] = "method"
    return names

"""Methods of modules, bound without a delay."""

import functools
import types
from typing import TYPE_CHECKING, Any

import equinox as eqx

from .portable import build


class _Example(eqx.Module):
    def method(self) -> None: ...


_example = vars(_Example().method)
_BoundMethod = type(_Example().method)
_COPIED = tuple(name for name in _example if name not in ("__func__", "__self__"))


class PlainMethods:
    """A mixin for `equinox.Module`: methods are bound as Python binds them.

    For modules whose methods only vernal calls: each attribute is looked up at the
    speed of Python's own classes, also where a tree is taken apart.
    """

    if not TYPE_CHECKING:
        __getattribute__ = object.__getattribute__


class QuickMethods:
    """A mixin for `equinox.Module`: looking a method up takes little time.

    It returns what Equinox returns, a bound method that is a pytree. Equinox calls an
    `__init__` for each, which takes as long as a step of a small model.
    """

    if not TYPE_CHECKING:

        def __getattribute__(self, name: str) -> Any:
            value = object.__getattribute__(self, name)
            if type(value) is not types.MethodType or value.__self__ is not self:
                return value
            if name.startswith("__"):
                return value
            fn: Any = value.__func__
            about = _about(fn) if type(fn) is types.FunctionType else _read(fn)
            return build(_BoundMethod, {**about, "__func__": fn, "__self__": self})


def _read(fn: Any) -> dict[str, Any]:
    """Returns the name, the documentation and the annotations of a function."""
    return {name: getattr(fn, name) for name in _COPIED if hasattr(fn, name)}


_about = functools.lru_cache(512)(_read)

"""What `--annotations` has check vernal: jaxtyping with beartype, behind a switch."""

import contextlib
import functools
import inspect
import types
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

# A warning of vernal points to the first frame of the user, which is none of these.
__name__ = "beartype.annotations"

_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
_jaxtyped = jaxtyping.jaxtyped
_is_on = True
# By the code of a nested function: its annotations, and what checks them.
_nested = {}


def install():
    """Checks vernal, which is to be imported after it, with jaxtyping's hook.

    The hook decorates with `jaxtyping.jaxtyped`. Its wrapper takes ten times as long as
    that of beartype, which is enough where no annotation has axes to compare.
    """
    jaxtyping.install_import_hook("vernal", "annotations.checks")
    jaxtyping.jaxtyped = jaxtyped


@functools.wraps(_jaxtyped)
def jaxtyped(*args, **kwargs):
    decorate = _jaxtyped(*args, **kwargs)
    if args:
        return decorate
    return lambda checked: (checks_plain if is_plain(checked) else decorate)(checked)


def is_plain(checked) -> bool:
    """Whether it is a function of vernal without any of jaxtyping's annotations."""
    if not (inspect.isfunction(checked) and checked.__module__.startswith("vernal")):
        return False
    try:
        return "jaxtyping" not in str(typing.get_type_hints(checked))
    except NameError:  # of what only a type checker imports: jaxtyping passes over it
        return False


def checks(fn):
    """Checks the annotations of a function at each call, while they are checked."""
    return switched(fn, _beartype(fn))


def checks_plain(fn):
    """The same without jaxtyping, for what has no axes to compare."""
    # Python itself calls this one, with a name, wherever there is a dot.
    if fn.__name__ == "__getattribute__":
        return fn
    return switched(fn, checked_as_before(fn) if fn.__closure__ else _beartype(fn))


def checked_as_before(fn):
    """Checks a nested function by what beartype has made for another of its code.

    To make it takes as long as to trace a small function, and a new one would be made
    at each call of what is around it. This one is of an empty function, so that it
    keeps nothing alive; `__beartype_func` is the function that it calls.
    """
    if fn.__defaults__ or fn.__kwdefaults__:
        return _beartype(fn)
    code, hints = fn.__code__, fn.__annotations__
    known, made = _nested.get(code, (None, None))
    if known != hints:
        cells = tuple(types.CellType() for _ in fn.__closure__)
        empty = types.FunctionType(code, fn.__globals__, closure=cells)
        empty = functools.update_wrapper(empty, fn)
        del empty.__wrapped__
        made = _beartype(empty)
        _nested[code] = hints, made
    if made.__code__ is code:  # it has none
        return fn
    checked = types.FunctionType(made.__code__, made.__globals__)
    checked.__kwdefaults__ = made.__kwdefaults__ | {"__beartype_func": fn}
    return checked


def switched(fn, checked):
    """The function that is checked while annotations are."""
    if checked is fn:  # it has none
        return fn

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

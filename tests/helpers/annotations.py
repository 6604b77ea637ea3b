"""What `--annotations` has check vernal: jaxtyping with beartype, behind a switch."""

import contextlib
import functools
import inspect
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

# A warning of vernal points to the first frame of the user, which is none of these.
__name__ = "beartype.annotations"

_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
_jaxtyped = jaxtyping.jaxtyped
_other_axes = jaxtyping.jaxtyped("context")
_is_on = True


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
    checked = _beartype(fn)
    if checked is fn:  # it has none
        return fn

    @functools.wraps(fn)
    def call(*args, **kwargs):
        return (checked if _is_on else fn)(*args, **kwargs)

    return call


def checks_plain(fn):
    """The same without jaxtyping: what it calls has its own axes nevertheless."""
    checked = _beartype(fn)
    # Python itself calls this one, with a name, wherever there is a dot.
    if checked is fn or fn.__name__ == "__getattribute__":
        return fn

    @functools.wraps(fn)
    def call(*args, **kwargs):
        if not _is_on:
            return fn(*args, **kwargs)
        with _other_axes:
            return checked(*args, **kwargs)

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

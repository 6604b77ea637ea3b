"""Functions in pickles: by their names, or by where their code is."""

import copy
import functools
import hashlib
import importlib
import importlib.abc
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

# Pickle knows a function by its module and its name. Functions within functions, of
# which Optax's transformations consist, have no name there, but the code of their
# module contains their code.


class Stand:
    """Stands for an object in a pickle, and is loaded as that object."""

    __slots__ = ("args", "make", "state")

    def __init__(self, make: Any, *args: Any):
        """It is loaded as what a function of a module, `make`, returns for `args`."""
        self.make, self.args = make, args
        self.state: Any = None

    def __reduce__(self) -> Any:
        if self.state is None:
            return self.make, self.args
        # Set once the function is made, since it may hold itself.
        return self.make, self.args, self.state, None, None, _fill


def _fill(fn: types.FunctionType, state: tuple[Any, ...]) -> None:
    contents, fn.__defaults__, fn.__kwdefaults__, attributes = state
    for cell, content in zip(fn.__closure__ or (), contents, strict=True):
        for value in content:
            cell.cell_contents = value
    fn.__dict__.update(attributes)


def is_named(obj: Any) -> bool:
    """Whether an object is found in its module under its name."""
    found = sys.modules.get(getattr(obj, "__module__", None) or "")
    for name in _name_of(obj).split("."):
        found = getattr(found, name, None)
    return found is obj and found is not None


def _name_of(obj: Any) -> str:
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    return name if isinstance(name, str) else ""


def by_name(obj: Any) -> Stand:
    """Refers to an object of a module by its name."""
    return Stand(_named, obj.__module__, _name_of(obj))


def _named(module: str, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def by_code(fn: types.FunctionType, cells: tuple[Any, ...]) -> Stand:
    """Refers to a function by its code in its module, with `cells` for its closure."""
    code, scope, names = fn.__code__, fn.__globals__, metadata(fn)
    module = scope.get("__name__", "")
    is_module = scope is vars(sys.modules.get(module, types))
    for _ in range(2 if is_module else 0):
        if any(known == code for known in _codes_in(module)):
            names = {name: names[name] for name in _NAMES}
            known_by = module, code.co_qualname, digest_of(code)
            return Stand(_coded, *known_by, names, cells)
        # It may have been imported again since.
        _codes_in.cache_clear()
    # Cloudpickle accepts it by value, and `_renamed` restores the name. Pickle refuses
    # it with an error that has the name.
    empty = bare(code, scope, names, tuple(new_cell() for _ in cells))
    empty.__qualname__ += (
        f" ({code.co_filename}:{code.co_firstlineno}), which no module has under this "
        "name. Move it to one, or use `cloudpickle` instead of `pickle`"
    )
    return Stand(_renamed, empty, fn.__qualname__, cells)


def bare(
    code: types.CodeType,
    scope: dict[str, Any],
    metadata: Mapping[str, Any],
    cells: tuple[types.CellType, ...],
) -> types.FunctionType:
    """Makes a function without its defaults and attributes."""
    fn = types.FunctionType(code, scope, closure=cells)
    for name, value in metadata.items():
        setattr(fn, name, value)
    return fn


_NAMES = ("__name__", "__qualname__", "__module__", "__doc__")


def metadata(fn: types.FunctionType) -> dict[str, Any]:
    """Returns what a function has beside its code and its contents."""
    # Lazy annotations may fail when they are asked for; what makes them can be kept.
    lazy = hasattr(fn, "__annotate__")
    names = (*_NAMES, "__annotate__" if lazy else "__annotations__")
    return {name: getattr(fn, name) for name in names}


def _coded(
    module: str,
    name: str,
    digest: bytes,
    names: Mapping[str, Any],
    cells: tuple[types.CellType, ...],
) -> types.FunctionType:
    scope = vars(importlib.import_module(module))
    found = [code for code in _codes_in(module) if code.co_qualname == name]
    for code in found:
        if digest_of(code) == digest:
            return bare(code, scope, names, cells)
    what = "has other code" if found else "is not there"
    raise pickle.UnpicklingError(
        f"The function `{name}` of `{module}` {what}. It was pickled under another "
        f"version of Python or of `{module.split('.')[0]}`. Pickles are for processes "
        "of one environment; to keep a trainer, use `vernal.save`."
    )


def _renamed(
    fn: types.FunctionType, name: str, cells: tuple[types.CellType, ...]
) -> types.FunctionType:
    fn.__qualname__ = name
    return bare(fn.__code__, fn.__globals__, metadata(fn), cells)


def new_cell() -> types.CellType:
    return types.CellType()


def content_of(cell: types.CellType) -> tuple[Any, ...]:
    """Returns what a cell holds, in a tuple: an empty one if it holds nothing yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


@functools.lru_cache(maxsize=256)
def _codes_in(module: str) -> tuple[types.CodeType, ...]:
    """Returns all code within a module, none if its source cannot be found."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    loader = getattr(spec, "loader", None)
    if isinstance(loader, importlib.abc.SourceLoader):
        # What a hook, such as jaxtyping's, makes of a source must not be kept in the
        # file of its plain code, where a process without the hook would find it.
        loader = copy.copy(loader)
        vars(loader)["set_data"] = lambda *_, **__: None
    get_code = getattr(loader, "get_code", None)
    try:
        code = None if get_code is None else get_code(module)
    except (ImportError, OSError, SyntaxError):
        code = None
    return () if code is None else tuple(_within(code))


def _within(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _within(constant)


@functools.lru_cache(maxsize=4096)
def digest_of(code: types.CodeType) -> bytes:
    """Hashes what code does, whatever its place in the file."""
    parts = (
        code.co_code,
        code.co_exceptiontable,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        code.co_flags,
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        [_constant(constant) for constant in code.co_consts],
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _constant(value: Any) -> Any:
    match value:
        case types.CodeType():
            return digest_of(value)
        case tuple():
            return [_constant(item) for item in value]
        case frozenset():
            return sorted(map(repr, value))
    return value

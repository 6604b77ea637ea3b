"""Which code belongs to a library, and so does not change while a program runs."""

import functools
import os
import sys
import sysconfig
import types
import weakref
from pathlib import Path

_OWN = f"{Path(__file__).parents[1]}{os.sep}"
_STANDARD = tuple(
    f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib")
)


@functools.lru_cache(maxsize=4096)
def is_library_file(path: str) -> bool:
    """Whether a file is one of the standard library, of a package, or of vernal."""
    if path.startswith("<frozen") or path.startswith((_OWN, *_STANDARD)):
        return True
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)


def is_library_module(name: str, module: types.ModuleType | None) -> bool:
    if name == "__main__":
        return False
    # Not `getattr`: a module may define `__getattr__`.
    path = None if module is None else vars(module).get("__file__")
    if path is not None:
        return is_library_file(path)
    return name.split(".")[0] in sys.stdlib_module_names


def module_of(kind: type) -> str:
    """Returns the name of a class's module; `""` for those of C without one."""
    name = kind.__module__
    return name if isinstance(name, str) else ""


def is_of_python(kind: type) -> bool:
    """Whether a class was made by a `class` statement, not in C."""
    heap_type = 1 << 9
    return bool(kind.__flags__ & heap_type)


_library_kinds: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def is_library(kind: type) -> bool:
    found = _library_kinds.get(kind)
    if found is None:
        name = module_of(kind)
        module = sys.modules.get(name)
        found = is_library_module(name, module)
        # A class made by a call, such as `type("Fit", (Trainer,), {...})`, has the
        # module of what made it, and one made by `exec` may have that of the builtins.
        # Neither is there under its name.
        is_doubtful = name == "builtins" or "." not in kind.__qualname__
        if found and module is not None and is_of_python(kind) and is_doubtful:
            found = vars(module).get(kind.__name__) is kind
        _library_kinds[kind] = found
    return found

"""Functions and modules in pickles.

`portable` finds what to pickle in place of an object, and has the mixin of vernal's
modules. `code` refers to a function by its name or its code. `library` says which code
is a library's.
"""

from .code import (
    bare as bare,
    content_of as content_of,
    digest_of as digest_of,
    is_named as is_named,
    metadata as metadata,
)
from .library import (
    is_library as is_library,
    is_library_file as is_library_file,
    is_library_module as is_library_module,
    is_of_python as is_of_python,
    module_of as module_of,
)
from .portable import (
    ModuleMeta as ModuleMeta,
    Portable as Portable,
    build as build,
    packed as packed,
)

"""Functions and modules in pickles.

`portable` finds what to pickle in place of an object, and has the mixin of vernal's
modules; `quick_methods` has another one. `code` refers to a function by its name or its
code. `library` says which code is a library's.
"""

from .code import bare, content_of, digest_of, is_named, metadata
from .library import (
    is_library,
    is_library_file,
    is_library_module,
    is_of_python,
    module_of,
)
from .portable import Portable, build, packed
from .quick_methods import PlainMethods, QuickMethods

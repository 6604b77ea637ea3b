"""Functions and modules in pickles."""

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
    module_of as module_of,
)
from .portable import Portable as Portable, build as build, packed as packed

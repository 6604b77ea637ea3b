"""Compiled programs, which follow the code that they were made from.

`programs` finds the program of a call, or compiles it again where its code has changed.
`shelves` decides which compiled programs are kept.
"""

from .programs import (
    Version as Version,
    forget as forget,
    program as program,
    version_of as version_of,
)

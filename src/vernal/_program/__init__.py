"""Compiled programs: found again, and dropped."""

from .programs import (
    Version as Version,
    forget as forget,
    program as program,
    version_of as version_of,
)

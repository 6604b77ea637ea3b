"""Many fits in one program."""

from .fit_many import fit_many
from .result import ManyResult

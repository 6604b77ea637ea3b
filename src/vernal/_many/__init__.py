"""Many fits in one program."""

from .fit_many import fit_many as fit_many
from .result import ManyResult as ManyResult

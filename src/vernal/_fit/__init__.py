"""A fit on the host: what happens between the chunks of steps."""

from .arrival import edm_note
from .fit import OPTIONS, FitOptions, fit
from .one_trainer import BadEnd, One
from .result import FitResult

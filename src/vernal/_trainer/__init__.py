"""The trainer: what a user subclasses and calls."""

from .explain_retrace import explain_retrace
from .fit_function import fit
from .trainer import Trainer

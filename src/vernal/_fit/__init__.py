"""A fit on the host: what happens between the chunks of steps."""

from .arrival import edm_note as edm_note
from .fit import fit as fit
from .one_trainer import OneTrainer as OneTrainer
from .options import OPTIONS as OPTIONS, FitKeywords as FitKeywords
from .result import FitResult as FitResult
from .subject import AbstractSubject as AbstractSubject, BadEnd as BadEnd

"""A fit on the host: what happens between the chunks of steps."""

from .arrival import distance_here
from .ending import Ending
from .fit import fit
from .one_trainer import OneTrainer
from .options import OPTIONS, FitKeywords
from .progress_bar import ProgressBar
from .result import FitResult
from .subject import AbstractSubject, BadEnd

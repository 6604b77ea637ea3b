"""Whitening by a Fisher or covariance matrix."""

from .blocks import find_blocks as find_blocks
from .decompose import (
    ROUNDING as ROUNDING,
    jacobian_cut as jacobian_cut,
    whiten as whiten,
)
from .dense import (
    DenseWhitening as DenseWhitening,
    OnNull as OnNull,
    check_options as check_options,
    check_rank_kind as check_rank_kind,
    of_spectrum as of_spectrum,
)
from .projector import EigenProjector as EigenProjector
from .whitening import Unchanged as Unchanged

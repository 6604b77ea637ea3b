"""Batches: what a user gives, as arrays of JAX, and the sources of a fit.

`batch` turns one batch into arrays, or refuses a leaf that would lose its meaning;
`omit` leaves data out, and `sources` has the minibatches and the streams that a fit
takes its batches from.
"""

from .batch import as_batch, as_given
from .omit import Omitted, omit
from .sources import (
    Minibatches,
    Source,
    Stream,
    StreamExhaustedError,
    Whole,
    as_source,
    batch_shapes,
    in_whole,
)

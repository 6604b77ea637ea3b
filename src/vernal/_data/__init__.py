"""Batches, and where they come from."""

from .sources import (
    Minibatches as Minibatches,
    Source as Source,
    Stream as Stream,
    StreamExhaustedError as StreamExhaustedError,
    Whole as Whole,
    as_batch as as_batch,
    as_given as as_given,
    as_source as as_source,
)

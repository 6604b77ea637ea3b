"""Whitening: linear maps that make every direction of the parameters alike.

`projector` has the users' `EigenProjector` and the ways to make one. It has a whitening
for each of its blocks (`blocks`): `whitening` declares what that is, `dense` makes one
from a matrix or a Jacobian, `low_rank` from products. `nulls` is about the directions
that the data do not constrain.
"""

from .blocks import Block, find_blocks
from .dense import ROUNDING, DenseWhitening, jacobian_rtol, whiten, whiten_spectrum
from .nulls import NullPolicy, written_directions
from .projector import (
    EigenProjector,
    encode_near,
    make_block_projector,
    make_projector,
)
from .whitening import Unchanged

"""What the data say of the parameters.

`fisher` has the Fisher matrix, `whiten` the projector at the current point,
`uncertainty` standard errors and the likelihood for samplers, `table` their table.
`derivatives` is the compiled program beneath them.
"""

from .derivatives import Passes as Passes
from .fisher import (
    Blocks as Blocks,
    curvature as curvature,
    fisher as fisher,
    has_likelihood as has_likelihood,
)
from .table import table as table
from .uncertainty import objective as objective, standard_errors as standard_errors
from .whiten import OF_WHITEN as OF_WHITEN, whitened as whitened

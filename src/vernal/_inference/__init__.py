"""What the data say of the parameters: Fisher matrices, errors, tables."""

from .metric import (
    OF_WHITEN as OF_WHITEN,
    Blocks as Blocks,
    curvature as curvature,
    fisher as fisher,
    has_likelihood as has_likelihood,
    whitened as whitened,
)
from .uncertainty import (
    objective as objective,
    standard_errors as standard_errors,
    table as table,
)

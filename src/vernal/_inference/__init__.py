"""What the data say of the parameters.

`fisher` has the Fisher matrix, `whiten` the projector at the current point,
`uncertainty` standard errors and the likelihood for samplers, `report` what there is to
read, `propagate` errors of functions of the model. `derivatives` is the
compiled program beneath them, `laplace` the normal approximation that it makes, with
`sandwich` for data of unknown scatter, and `expansion` what else it says of one point.
`counts` has the mean and the variance of a deviance.
"""

from .derivatives import Passes, derive
from .expansion import NO_ACCIDENT, Around, around, how_far, seen_again
from .fisher import (
    Blocks,
    ErrorKind,
    FisherKind,
    checked_kind,
    curvature,
    fisher,
    has_likelihood,
    require_likelihood,
)
from .laplace import ErrorOptions, laplace
from .propagate import draw, propagate
from .report import ROUNDING, hidden_by_rounding, report, table
from .sandwich import NO_SANDWICH, few_text
from .uncertainty import (
    KnownErrors,
    errors_or_nan,
    objective,
    params_at,
    standard_errors,
)
from .whiten import OF_WHITEN, whitened, whitens_free

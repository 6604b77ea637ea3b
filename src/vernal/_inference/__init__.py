"""What the data say of the parameters.

`derivatives` has the Fisher matrix, and the compiled program beneath all else. `whiten`
has the projector at the current point, `uncertainty` standard errors and the likelihood
for samplers, `report` what there is to read, `propagate` errors of functions of the
model. `laplace` is the normal approximation of the likelihood, with
`sandwich` for data of unknown scatter, and `expansion` what else it says of one point.
`counts` has the mean and the variance of a deviance.
"""

from .derivatives import (
    Blocks,
    ErrorKind,
    FisherKind,
    Passes,
    checked_kind,
    curvature,
    derive,
    fisher,
    has_likelihood,
    require_likelihood,
)
from .expansion import NO_ACCIDENT, Around, around, how_far, seen_again
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

"""What the data say of the parameters.

`fisher` has the Fisher matrix, `whiten` the projector at the current point,
`uncertainty` standard errors and the likelihood for samplers, `table` their table.
`derivatives` is the compiled program beneath them.
"""

from .derivatives import Passes, linearised
from .fisher import Blocks, curvature, fisher, has_likelihood
from .table import table
from .uncertainty import objective, standard_errors
from .whiten import OF_WHITEN, whitened

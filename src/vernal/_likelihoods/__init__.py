"""Likelihoods of data that `residuals` of a trainer may return.

`likelihood` is the interface, and what they share: shapes, and data that are missing.
`gaussian`, `poisson` and `robust` are the likelihoods.
"""

from .counts import Moments, normal_moments
from .gaussian import Gaussian
from .likelihood import AbstractLikelihood, require_known
from .poisson import Poisson
from .robust import Robust

"""The estimated distance to the minimum (Minuit's EDM).

`distance` measures the surroundings of a trainer within a compiled program, `edm` has
the formulas and finds the distance on the host.
"""

from .distance import (
    MOST_PARAMETERS as MOST_PARAMETERS,
    measure as measure,
    settled as settled,
    what_falls as what_falls,
)
from .edm import (
    Distance as Distance,
    Local as Local,
    along as along,
    distance_of as distance_of,
)

"""The estimated distance to the minimum."""

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

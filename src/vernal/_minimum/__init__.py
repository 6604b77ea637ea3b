"""The estimated distance to the minimum (Minuit's EDM).

`distance` measures the surroundings of a trainer within a compiled program, `edm` has
the formulas and finds the distance on the host.
"""

from .distance import (
    MOST_PARAMETERS,
    has_jacobian,
    has_minimum,
    hessian_distance,
    measure,
    measure_jacobian,
    settled,
    spectral_distance,
    what_falls,
)
from .edm import (
    Curved,
    Distance,
    Local,
    Triangle,
    along,
    chi_squared_p_value,
    distance_of,
    edm_note,
    truth_p_values,
    underflows,
    unknown,
)

"""The estimated distance to the minimum (Minuit's EDM).

`distance` measures the surroundings of a trainer, `local` holds them as a compiled
program returns them, `formulas` finds the distance from them on the host, and `edm` is
what it says. `plateau` looks for lower points where something is held at its bound.
"""

from .distance import (
    MOST_PARAMETERS,
    has_jacobian,
    has_minimum,
    hessian_distance,
    measure,
    measure_jacobian,
    minimised,
    settled,
    spectral_distance,
    what_falls,
)
from .edm import (
    Distance,
    along,
    chi_squared_p_value,
    edm_note,
    saddle_words,
    share_p_value,
    truth_p_values,
    unknown,
)
from .formulas import distance_of
from .local import Curved, Local, Triangle, underflows
from .plateau import Lower, beyond

"""The estimated distance to the minimum (Minuit's EDM).

`distance` measures the surroundings of a trainer, `local` holds them as a compiled
program returns them, `formulas` finds the distance from them on the host, and `edm` is
what it says. `idle` looks for lower points where the data have no slope, `second_look`
for minima where they hardly have any.
`leftover` tells curvature from the gradient that a fit leaves, and `endless` a minimum
from a limit that the loss approaches without end.
"""

from .distance import (
    MOST_PARAMETERS,
    has_jacobian,
    has_minimum,
    measure,
    measure_jacobian,
    measure_spectrum,
    minimised,
    settled,
    surroundings,
    what_falls,
)
from .edm import (
    Distance,
    along,
    chi_squared_p_value,
    edm_note,
    endless_words,
    minimum_note,
    saddle_words,
    share_p_value,
    slope_note,
    truth_p_values,
    unknown,
)
from .endless import endless, may_be_endless, may_run_away
from .formulas import distance_of
from .idle import Lower, Site, is_idle, leaves_idle, lower_point
from .leftover import (
    MOST_STEPS,
    Leftover,
    closer,
    confirmed,
    leftover,
    moved,
    unrounded,
)
from .local import Curved, Local, Triangle, noise_of_zero, rounding_of, underflows
from .second_look import second_look

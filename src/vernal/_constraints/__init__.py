"""What is known of the parameters before the data.

`bounds` has the intervals that they lie in, `bijections` the maps to them from free
coordinates, or from real parts, `ties` the parameters that follow others, `priors`
their distributions. `owned` finds what a mapping says of each.
"""

from .bijections import Bijection, Bijections, RealParts, real_parts, tolerance_of
from .bounds import Bounds, as_bounds, flat_flags, held_at
from .priors import Normal, Priors, as_priors
from .ties import Ties, as_ties

"""What is known of the parameters before the data.

`bounds` has the intervals that they lie in, `bijections` the maps from free coordinates
to them, `ties` the parameters that follow others, `priors` their distributions.
`real_parts` takes complex parameters apart, `owned` finds what a mapping says of each.
"""

from .bijections import Bijection, Bijections, tolerance_of
from .bounds import Bounds, as_bounds, flat_flags, held_at
from .priors import Normal, Priors, as_priors
from .real_parts import RealParts, real_parts
from .ties import Ties, as_ties

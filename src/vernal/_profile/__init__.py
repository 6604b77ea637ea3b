"""The likelihood along one or two elements, with all others at their best.

`conditional` finds minima with some elements held, many in one compiled program;
`by_solver` finds one where that fails. `scan` says where to begin, `search` looks for
the value where the likelihood has fallen by so much, `elements` finds elements by
their names, and the values of those with a bijection. `profile` and `intervals` are
what users call, `plane` is for a picture.
"""

from .intervals import intervals, probability
from .plane import plane
from .profile import Profile, profile
from .scan import Options

"""The likelihood along one or two elements, with all others at their best.

`held` solves with elements held, within a compiled program. `walk` goes along given
values, `crossing` looks for the values where the likelihood has fallen by so much.
`scan` prepares both, `elements` finds elements by their names. `profile` and
`intervals` are what users call, `plane` is for a picture.
"""

from .intervals import intervals, probability
from .plane import plane
from .profile import Profile, profile
from .scan import Options

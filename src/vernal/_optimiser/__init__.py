"""An Optax transformation for each parameter.

`param_optimiser` finds the parameters by path, `partition` by label; `groups` updates
each group of them by its own transformation, and shares the traces of like groups.
`transform` makes pytrees of Optax's closures; `learning_rates` reads the rates in them.
"""

from .learning_rates import learning_rates as learning_rates
from .map_optimisers import map_optimisers as map_optimisers
from .param_optimiser import ParamOptimiser as ParamOptimiser
from .partition import partition as partition
from .precondition import precondition as precondition
from .schedule import delay as delay, window as window
from .transform import Transform as Transform, as_transform as as_transform

"""An Optax transformation for each parameter.

`param_optimiser` finds the parameters by path, `partition` by label; `groups` updates
each group of them by its own transformation, and shares the traces of like groups.
`transform` makes pytrees of Optax's closures; `learning_rates` reads the rates in them,
and `makers` by which functions of Optax they were made.
"""

from .learning_rates import learning_rates
from .makers import Maker, as_makers, joins_parameters, other_maker, state_makers
from .map_optimisers import map_optimisers
from .param_optimiser import ParamOptimiser
from .param_optimiser_state import ParamOptimiserState
from .partition import partition
from .precondition import precondition
from .schedule import delay, window
from .transform import Transform, as_transform

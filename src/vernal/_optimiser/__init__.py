"""An Optax transformation for each parameter."""

from .learning_rates import learning_rates as learning_rates
from .map_optimisers import map_optimisers as map_optimisers
from .param_optimiser import ParamOptimiser as ParamOptimiser
from .partition import partition as partition
from .precondition import precondition as precondition
from .schedule import delay as delay
from .transform import (
    Transform as Transform,
    as_transform as as_transform,
    window as window,
)

"""Several devices, several processes.

`placement` says where the arrays of a fit lie. `processes` lets processes decide
together; `same_inputs` finds out whether they were given the same.
"""

from .abstract_placement import ANYWHERE, AbstractPlacement
from .placement import Sharding, placement
from .processes import Decision, PeerError, Peers
from .same_inputs import fingerprint, leaf_fingerprints, same_inputs

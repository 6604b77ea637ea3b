"""Several devices, several processes.

`placement` says where the arrays of a fit lie. `processes` lets processes decide
together; `same_inputs` and `fingerprint` find out whether they were given the same.
"""

from .fingerprint import fingerprint, leaf_fingerprints
from .placement import ANYWHERE, Placement, Sharding, placement
from .processes import Decision, PeerError, Peers
from .same_inputs import same_inputs

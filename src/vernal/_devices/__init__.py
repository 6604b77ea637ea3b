"""Several devices, several processes.

`placement` says where the arrays of a fit lie. `processes` lets processes decide
together; `same_inputs` and `fingerprint` find out whether they were given the same.
"""

from .fingerprint import (
    fingerprint as fingerprint,
    leaf_fingerprints as leaf_fingerprints,
)
from .placement import (
    ANYWHERE as ANYWHERE,
    AbstractPlacement as AbstractPlacement,
    Sharding as Sharding,
    placement as placement,
)
from .processes import Decision as Decision, PeerError as PeerError, Peers as Peers
from .same_inputs import same_inputs as same_inputs

"""Several devices, several processes."""

from .meeting import meeting as meeting
from .placement import (
    Placement as Placement,
    Sharding as Sharding,
    context as context,
    placement as placement,
)
from .processes import (
    PeerError as PeerError,
    Peers as Peers,
    Wish as Wish,
    described as described,
    fingerprint as fingerprint,
)

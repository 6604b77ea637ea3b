"""Functions compared by value."""

from .closure import Closure as Closure
from .equality import (
    Hashed as Hashed,
    Same as Same,
    is_atom as is_atom,
    value_key as value_key,
)
from .reads import reads as reads
from .skeleton import (
    Function as Function,
    Group as Group,
    Leaf as Leaf,
    Part as Part,
    Plan as Plan,
    Shell as Shell,
    Skeleton as Skeleton,
    Static as Static,
)
from .static_fields import refuse_static_arrays as refuse_static_arrays
from .watch import Reads as Reads, Slot as Slot, kept as kept

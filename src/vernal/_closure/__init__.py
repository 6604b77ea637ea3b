"""Functions compared by value."""

from .closure import Closure as Closure
from .equality import Hashed as Hashed, is_atom as is_atom, value_key as value_key
from .reads import reads as reads, scope_key as scope_key
from .skeleton import Skeleton as Skeleton
from .static_fields import refuse_static_arrays as refuse_static_arrays
from .watch import Reads as Reads, Slot as Slot, kept as kept

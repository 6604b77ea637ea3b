"""Functions compared by value, as strictly as a compiled program needs.

`closure` takes an object apart into its arrays and the rest, a `skeleton`. `reads`
finds what code reads beside its arguments, and `watch` whether that has changed.
`equality` compares values. `static_fields` refuses arrays in static fields.
"""

from .closure import Closure as Closure
from .equality import Hashed as Hashed, is_atom as is_atom, value_key as value_key
from .reads import reads as reads, scope_key as scope_key
from .skeleton import Skeleton as Skeleton
from .static_fields import refuse_static_arrays as refuse_static_arrays
from .watch import Reads as Reads, Slot as Slot, kept as kept

"""Functions compared by value, as strictly as a compiled program needs.

`closure` takes an object apart into its arrays and the rest, a `skeleton`. `reads`
finds what code reads beside its arguments, and `watch` whether that has changed.
`equality` compares values. `static_fields` lists static fields, and refuses arrays in
them.
"""

from .closure import Closure
from .equality import Hashed, Same, StaticData, is_atom, strict_key, value_key
from .reads import reads, words_in
from .skeleton import Skeleton
from .static_fields import plain_statics, refuse_static_arrays
from .watch import Reads, Slot, kept

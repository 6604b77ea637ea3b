"""Compiled programs, which follow the code that they were made from.

`programs` finds the program of a call, or compiles it again where its code has changed.
`shelves` decides which compiled programs are kept. `prepared` prepares arguments.
`one_function` makes small loops fast, `branch` what would wait for the host.
`integers` follows integers to where they become floats, or index an array, and `sums`
finds sums over all pairs of elements, and means. `steep` finds where a function has no
derivative, `mapped_lapack` what JAX cannot map.
"""

from .branch import chosen
from .host import calls_host, is_of_host, jaxpr_of, words_of
from .integers import LookUp, look_ups, turned_into_floats
from .mapped_lapack import may_hang
from .one_function import (
    MOST_BYTES,
    are_on_one_cpu,
    as_one_function,
    is_refused,
    is_switched_on,
)
from .prepared import prepared
from .programs import (
    Version,
    forget,
    hash_of_code,
    program,
    version_of,
    version_of_flat,
)
from .steep import Steep, said_of_steep, steep
from .sums import mean_over, sums_over_pairs

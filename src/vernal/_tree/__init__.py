"""Trees of parameters: their leaves by name, compared, joined, saved.

`paths` lists parameters by path, `by_name` all leaves, and has dictionaries that say
which names are near; `selectors` choose among parameters; `structure` compares and
casts trees; `ravel` joins parameters into one vector; `named_arrays` has the leaves as
they are saved in files, `checksums` knows them again; `small` groups small trees.
"""

from .by_name import ByName, NamedTree, by_path, uniquely_named, unknown_name
from .checksums import (
    LeafSum,
    checksum,
    is_part,
    leaf_sums,
    row_sums,
    weighted_sum,
    words,
)
from .named_arrays import (
    Kind,
    LoadError,
    MismatchError,
    NamedArray,
    as_kind,
    from_arrays,
    is_key,
    require_alike_kinds,
    require_keepable,
    to_arrays,
)
from .paths import (
    LONG_DOUBLES,
    Leaf,
    UnknownPathError,
    is_float,
    is_inexact,
    named_leaves,
    paths,
)
from .ravel import (
    as_parameters,
    at_least_single,
    element_name,
    ravel,
    ravel_dtype,
    ravel_size,
    unravel,
    widest,
)
from .selectors import Selector, atoms, keep, require_atoms, resolve, split, written
from .small import by_element, is_split, joinable
from .structure import (
    LIKE_STATE,
    cast_alike,
    cast_like,
    choose,
    disagreements,
    is_alike,
    is_weak,
    owned,
    parameters,
    require_alike,
    shape_and_dtype,
    strong,
)
from .text_table import aligned, short_number

"""Parameters by name."""

from .named_arrays import (
    Kind as Kind,
    LoadError as LoadError,
    MismatchError as MismatchError,
    NamedArray as NamedArray,
    as_kind as as_kind,
    checksum as checksum,
    from_arrays as from_arrays,
    is_key as is_key,
    is_part as is_part,
    require_alike_kinds as require_alike_kinds,
    require_keepable as require_keepable,
    to_arrays as to_arrays,
)
from .named_tree import (
    NamedTree as NamedTree,
    by_path as by_path,
    uniquely_named as uniquely_named,
)
from .paths import (
    LONG_DOUBLES as LONG_DOUBLES,
    UnknownPathError as UnknownPathError,
    is_float as is_float,
    is_inexact as is_inexact,
    named_leaves as named_leaves,
    paths as paths,
)
from .ravel import (
    as_parameters as as_parameters,
    element_name as element_name,
    ravel as ravel,
    ravel_dtype as ravel_dtype,
    ravel_size as ravel_size,
    unravel as unravel,
    widest as widest,
)
from .selectors import (
    Selector as Selector,
    atoms as atoms,
    keep as keep,
    resolve as resolve,
    split as split,
)
from .structure import (
    LIKE_STATE as LIKE_STATE,
    cast_alike as cast_alike,
    cast_like as cast_like,
    disagreements as disagreements,
    is_alike as is_alike,
    is_weak as is_weak,
    parameters as parameters,
    require_alike as require_alike,
    shape_and_dtype as shape_and_dtype,
    strong as strong,
)
from .text_table import aligned as aligned

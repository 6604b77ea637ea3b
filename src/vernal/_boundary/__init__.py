"""What comes from a user: arguments checked, arrays refused, warnings, tracebacks.

`arguments` checks values, `signatures` functions and classes, `type_checks`
annotations; `foreign` refuses what JAX cannot use, `precision` narrows arrays in 64
bits, and warns where that matters, `explicit` has those on a mesh computed with;
`names` names the leaves of a tree; `of_objects` remembers what is known of one;
`frames` points to the user's code; `traced` and `debugging` see to what JAX is doing
when a function is called.
"""

from .arguments import (
    MOST_STEPS,
    boolean,
    file_path,
    one_of,
    prng_key,
    refuse_unknown,
    step_limit,
    whole_number,
)
from .debugging import debugged, is_debugged, undebugged
from .explicit import (
    is_explicit,
    off_mesh,
    outside_mesh,
    unmeshed_entrance,
    without_axes,
)
from .foreign import (
    has_been_deleted,
    is_deleted,
    refuse_foreign,
    refuse_meaning,
    require_numbers,
)
from .frames import (
    ObjectiveWarning,
    PrecisionWarning,
    entrance,
    warn,
    warn_once,
    warn_once_of,
)
from .names import (
    dotted,
    first_names,
    in_few_words,
    nearest_names,
    spelled,
    spelled_leaves,
    unaddressed,
)
from .of_objects import OfObjects
from .precision import (
    REMEDY,
    integers_at_hand,
    is_cut,
    is_wide,
    is_x64_on,
    narrowed,
    narrowed_leaves,
    narrowed_tree,
    rounded_integers,
    spacing,
    warn_of_rounded_integers,
    warn_of_single_leaves,
)
from .signatures import refuse_taken, takes, takes_methods
from .traced import UNROLL, RefusedError, is_traced, refuse_program, refuse_traced
from .type_checks import ModuleMeta, Params, PyTree, checked

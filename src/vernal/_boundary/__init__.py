"""What comes from a user: arguments checked, arrays refused, warnings, tracebacks.

`arguments` checks values, `signatures` functions, `type_checks` annotations; `foreign`
refuses arrays that JAX cannot use, and `precision` narrows those in 64 bits; `names`
names the leaves of a tree; `frames` and `warnings` point to the user's code; `traced`
and `debugging` see to what JAX is doing when a function is called.
"""

from .arguments import (
    boolean as boolean,
    file_path as file_path,
    prng_key as prng_key,
    refuse_unknown as refuse_unknown,
    whole_number as whole_number,
)
from .debugging import (
    debugged as debugged,
    is_debugged as is_debugged,
    undebugged as undebugged,
)
from .foreign import (
    has_been_deleted as has_been_deleted,
    is_deleted as is_deleted,
    refuse_foreign as refuse_foreign,
    refuse_meaning as refuse_meaning,
    require_numbers as require_numbers,
)
from .frames import entrance as entrance, warn as warn
from .names import (
    dotted as dotted,
    nearest_names as nearest_names,
    segment as segment,
    spelled as spelled,
    spelled_leaves as spelled_leaves,
)
from .precision import (
    REMEDY as REMEDY,
    is_cut as is_cut,
    is_wide as is_wide,
    is_x64_on as is_x64_on,
    narrowed as narrowed,
    narrowed_model as narrowed_model,
    narrowed_tree as narrowed_tree,
    spacing as spacing,
)
from .signatures import takes as takes, takes_methods as takes_methods
from .traced import (
    UNROLL as UNROLL,
    refuse_program as refuse_program,
    refuse_traced as refuse_traced,
)
from .type_checks import Params as Params, PyTree as PyTree, checked as checked
from .warnings import (
    ObjectiveWarning as ObjectiveWarning,
    PrecisionWarning as PrecisionWarning,
    warn_once as warn_once,
)

"""What comes from a user: arguments checked, arrays refused, warnings, tracebacks."""

from .arguments import (
    Params as Params,
    PyTree as PyTree,
    boolean as boolean,
    checked as checked,
    file_path as file_path,
    prng_key as prng_key,
    refuse_unknown as refuse_unknown,
    takes as takes,
    takes_methods as takes_methods,
    whole_number as whole_number,
)
from .debugging import (
    debugged as debugged,
    is_debugged as is_debugged,
    undebugged as undebugged,
)
from .foreign import (
    is_deleted as is_deleted,
    refuse_foreign as refuse_foreign,
    refuse_meaning as refuse_meaning,
    refuse_sparse as refuse_sparse,
    require_number as require_number,
)
from .frames import entrance as entrance, warn as warn
from .names import (
    dotted as dotted,
    nearest_names as nearest_names,
    segment as segment,
    spelled as spelled,
)
from .precision import (
    REMEDY as REMEDY,
    is_cut as is_cut,
    is_on as is_on,
    is_wide as is_wide,
    narrowed as narrowed,
    narrowed_model as narrowed_model,
    narrowed_tree as narrowed_tree,
    spacing as spacing,
)
from .traced import (
    UNROLL as UNROLL,
    refuse_program as refuse_program,
    refuse_traced as refuse_traced,
)
from .warnings import (
    ObjectiveWarning as ObjectiveWarning,
    PrecisionWarning as PrecisionWarning,
    warn_once as warn_once,
)

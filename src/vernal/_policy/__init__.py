"""What users compose: policies for non-finite values, and stop criteria.

`nan_policy` and `stop_criterion` have the base classes and the subclasses of vernal;
`returned` checks what they return; `finite` has the checks of arrays, `stop_reason` the
reasons why a fit ends.
"""

from .finite import (
    all_finite,
    any_non_finite,
    debug_nan_check,
    each_finite,
    zero_nan_check,
)
from .nan_policy import (
    SKIP_ADVICE,
    BreakOnNan,
    NanCount,
    NanPolicy,
    NonFiniteError,
    RaiseOnNan,
    SkipStep,
    StopAfter,
    StopFit,
    Verdict,
    ZeroNans,
)
from .returned import asked, judged
from .stop_criterion import Converged, Patience, StepView, StopCriterion
from .stop_reason import AT_NON_FINITE, StopReason

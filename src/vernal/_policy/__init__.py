"""What users compose: policies for non-finite values, and stop criteria.

`nan_policy` and `stop_criterion` have the base classes and the subclasses of vernal;
`returned` checks what they return; `finite` has the checks of arrays, `stop_reason` the
reasons why a fit ends.
"""

from .finite import (
    all_finite as all_finite,
    debug_nan_check as debug_nan_check,
    is_finite as is_finite,
    zero_nan_check as zero_nan_check,
)
from .nan_policy import (
    SKIP_ADVICE as SKIP_ADVICE,
    BreakOnNan as BreakOnNan,
    NanCount as NanCount,
    NanPolicy as NanPolicy,
    NonFiniteError as NonFiniteError,
    RaiseOnNan as RaiseOnNan,
    SkipStep as SkipStep,
    StopAfter as StopAfter,
    StopFit as StopFit,
    Verdict as Verdict,
    ZeroNans as ZeroNans,
)
from .returned import asked as asked, judged as judged
from .stop_criterion import (
    Converged as Converged,
    Patience as Patience,
    StepView as StepView,
    StopCriterion as StopCriterion,
)
from .stop_reason import AT_NON_FINITE as AT_NON_FINITE, StopReason as StopReason
